"""The index of a shard: the byte range of each member of each sample.

It is made once from the headers, stored next to the shard (or under ``index_dir``) and memory-mapped.  The file is one
line of JSON, padded to 64 bytes (format, shard, bytes, ends; samples, how many are readable, how many there were when
the tar was complete, whether it is cut, how many samples are parts of one; dtype), then one numpy record per sample:
its key, and for each kind of member the pair (offset, size) in the tar, (0, 0) if missing.
"""

import json
import os
import tempfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from clipx.data.files import write_atomic
from clipx.data.tar.headers import MAX_NAME, CutShort, DataError, members

INDEX_DIR = "~/.cache/clipx"  # for indexes of tars in read-only directories
FORMAT = 2  # format 1 stopped at the first end mark and did not count parts
KEY = "__key__"  # the field that holds the key, as WebDataset calls it
END = 16_384  # bytes at either end of a tar that are hashed to detect changes; padding is 10,240
COUNTS = ("samples", "readable", "total", "cut", "parts")  # counts in the head of an index
MAX_SAMPLES = 1 << 40  # per shard; a higher count is forged
MAX_KINDS = 64  # extensions per shard; with more, the dots in names do not mark extensions


def make_index(shard: Path, index_dir: Path, place: Path | None = None) -> Path:
    """Scan a tar and write its index to ``place``, or next to it, or else under ``index_dir``.

    Raises:
        DataError: it is not a tar, is corrupt, or the index cannot be written.
    """
    samples, cut = scan(shard)
    size = shard.stat().st_size
    readable = len(samples) - count_truncated(samples, size)
    total = max(len(samples), promised(shard, index_dir)) if cut else len(samples)
    name = place.stem if place else shard.name
    head = {
        "format": FORMAT,
        "shard": name,
        "bytes": size,
        "ends": ends(shard),
        "readable": readable,
        "total": total,
        "cut": cut,
        "parts": parts(samples),
    }
    return write_table([place] if place else index_paths(shard, index_dir), head, samples)


def scan(shard: Path) -> tuple[np.ndarray, bool]:
    """Scan the samples of a tar as WebDataset groups them: adjacent names that agree up to the first dot.

    Returns:
        (samples,) records: ``__key__`` (bytes), then for each extension the pair (offset, size); and whether the
        tar is cut short.

    Raises:
        DataError: the tar is corrupt, or has more than ``MAX_KINDS`` extensions.
        OSError: it cannot be read.
    """
    keys: list[bytes] = []
    samples: list[dict[str, tuple[int, int]]] = []
    cut = False
    try:
        for name, offset, size in members(shard):
            folder, slash, base = name.rpartition(b"/")
            stem, _, extension = base.partition(b".")
            key, kind = folder + slash + stem, extension.decode("utf-8", "replace").lower()
            if not stem or not extension or kind == KEY:
                continue
            if not keys or keys[-1] != key or kind in samples[-1]:
                keys.append(key)
                samples.append({})
            samples[-1][kind] = (offset, size)
    except CutShort:
        cut = True
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(shard)) from error  # a read's error has no file name
    found = sorted({kind for sample in samples for kind in sample})
    if len(found) > MAX_KINDS:
        raise DataError(
            f"{shard} has {len(found)} kinds of member ({', '.join(found[:3])}, ...): everything after the first "
            "dot of a name is its extension; rename the members so that keys have no dots"
        )
    dtype = [(KEY, f"S{max(map(len, keys), default=1)}"), *((kind, "<i8", (2,)) for kind in found)]
    table = np.zeros(len(keys), dtype)
    table[KEY] = keys
    for kind in found:
        table[kind] = [sample.get(kind, (0, 0)) for sample in samples]
    return table, cut


def parts(samples: np.ndarray) -> int:
    """Count samples that are parts of one whose members are not adjacent, as in unsorted tars.

    Complete samples that share a key are not counted; they have members of the same kind.
    """
    _, key, times = np.unique(samples[KEY], return_inverse=True, return_counts=True)
    again = times > 1
    if not again.any():
        return 0
    most = np.zeros(len(times), int)  # members per key, for the commonest kind
    for kind in kinds(samples.dtype):
        most = np.maximum(most, np.bincount(key, samples[kind][:, 0] > 0, len(times)).astype(int))
    return int(times[again & (most == 1)].sum())


def count_truncated(samples: np.ndarray, size: int) -> int:
    """Count samples that extend past the end of a tar of ``size`` bytes."""
    after = [samples[kind].sum(axis=1) > size for kind in kinds(samples.dtype)]
    return int(np.any(after, axis=0).sum()) if len(samples) else 0


def kinds(dtype: np.dtype) -> tuple[str, ...]:
    """Return the kinds of member that samples may have: the extensions."""
    assert dtype.names is not None
    return dtype.names[1:]


def byte_ranges(sample: np.void) -> dict[str, tuple[int, int]]:
    """Return offset and size of each member of a sample, by kind."""
    found = {kind: sample[kind].tolist() for kind in kinds(sample.dtype)}
    return {kind: (offset, size) for kind, (offset, size) in found.items() if offset}


def promised(shard: Path, index_dir: Path) -> int:
    """Return how many samples a truncated shard had, from an older index or img2dataset's count."""
    older = [read_head(path) for path in index_paths(shard, index_dir) if os.access(path, os.R_OK)]
    return max([head.get("total", 0) for head in older if head.get("format") in (1, FORMAT)] + [published(shard) or 0])


def published(shard: Path) -> int | None:
    """Read img2dataset's sample count from NNNNN_stats.json next to a shard."""
    try:
        return successes(shard.with_name(f"{shard.stem}_stats.json").read_bytes())
    except OSError:
        return None


def successes(stats: bytes) -> int | None:
    """Parse the count in a NNNNN_stats.json."""
    try:
        count = int(json.loads(stats)["successes"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return count if 0 <= count < MAX_SAMPLES else None


def index_paths(shard: Path, index_dir: Path) -> list[Path]:
    """Return the paths at which the index of a shard may be, best first."""
    place = blake2b(str(shard.resolve().parent).encode(), digest_size=8).hexdigest()
    below = [index_dir, *([temporary_dir()] if is_ours(temporary_dir()) else [])]
    return [directory / f"{shard.name}.index" for directory in (shard.parent, *(root / place for root in below))]


def temporary_dir() -> Path:
    """Return the directory of last resort for indexes; it may be emptied at any time."""
    return Path(tempfile.gettempdir()) / f"clipx-{os.getuid()}"


def is_ours(directory: Path) -> bool:
    """Whether a directory in a shared place is ours or does not exist."""
    try:
        return os.lstat(directory).st_uid == os.getuid()
    except FileNotFoundError:
        return True


def expand_home(path: str) -> Path:
    """Expand ``~`` to the home directory, or to a temporary one for users without a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # neither HOME nor an entry in /etc/passwd
        return temporary_dir() / Path(path).relative_to("~")


def find_index(shard: Path, index_dir: Path) -> Path | None:
    """Return the path of an up-to-date index of the shard, if there is one."""
    return next((path for path in index_paths(shard, index_dir) if belongs(path, shard)), None)


def belongs(index: Path, shard: Path) -> bool:
    """Whether the index exists and is up to date."""
    if not os.access(index, os.R_OK):  # Path.exists raises in unreadable directories
        return False
    now = {"format": FORMAT, "bytes": shard.stat().st_size, "ends": ends(shard)}
    head = read_head(index)
    return now.items() <= head.items() and head.keys() >= set(COUNTS) and head["dtype"][0][0] == KEY


def ends(shard: Path) -> str:
    """Hash the first and last bytes of a tar, as sizes are padded and mtimes are lost in a copy."""
    with shard.open("rb") as file:
        first = file.read(END)
        file.seek(max(0, shard.stat().st_size - END))
        return blake2b(first + file.read(END), digest_size=8).hexdigest()


def write_table(paths: list[Path], head: dict[str, Any], rows: np.ndarray) -> Path:
    """Atomically write a head and numpy records to the first writable path.

    Raises:
        DataError: none is writable.
    """
    line = json.dumps({**head, "samples": len(rows), "dtype": rows.dtype.descr}).encode()
    line += b" " * (-(len(line) + 1) % 64) + b"\n"
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, line + rows.tobytes())
            return path
        except OSError as error:
            reason = error
    raise DataError(f"{paths[0]} cannot be written, nor {paths[-1]}: {reason}; set data.index_dir=DIR to another one")


def read_head(path: Path) -> dict[str, Any]:
    """Read the head of an index file; empty if the file is not a complete index."""
    with path.open("rb") as file:
        try:
            head = json.loads(file.readline(1 << 20))
            records = head["samples"] * record(head).itemsize
            counts = [head.get(name, 0) for name in COUNTS]
            if not all(isinstance(count, int) and 0 <= count < MAX_SAMPLES for count in counts):
                return {}
        except (ValueError, KeyError, TypeError, RecursionError):
            return {}
        return head if os.fstat(file.fileno()).st_size == file.tell() + records else {}


def record(head: dict[str, Any]) -> np.dtype:
    """Return the dtype of the records, built from names and key size alone, as a forged one might hold pointers."""
    (first, kind, *_), *rest = head["dtype"]
    if first != KEY:
        return np.dtype([(name, "<i8") for name, *_ in head["dtype"]])  # of a catalogue
    if not 0 < int(kind[2:]) <= MAX_NAME:
        raise ValueError
    return np.dtype([(KEY, f"S{int(kind[2:])}"), *((name, "<i8", (2,)) for name, *_ in rest)])


def read_table(path: Path) -> np.ndarray:
    """Memory-map the records of an index file."""
    head = read_head(path)
    if not head["samples"]:
        return np.empty(0, record(head))
    with path.open("rb") as file:
        start = len(file.readline())
    return np.memmap(path, record(head), mode="r", offset=start, shape=(head["samples"],))
