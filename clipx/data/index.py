"""The index of a shard: where in a tar each member of each sample stands.

Made once by hopping from header to header, kept beside the shard (or under ``index_dir``), read by memory map.
The file is one line of JSON (format, shard, bytes, ends, samples, dtype), padded to 64 bytes, then one numpy record a
sample: its key, and for each kind of member the pair (offset, size) in the tar; (0, 0) where a sample has none.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clipx.errors import UserError

FORMAT = 1
KEY = "__key__"             # the field that holds the key, as WebDataset calls it
BLOCK = 512                 # bytes of a tar header, and what members are padded to
END = 16_384                # bytes at either end of a tar that tell whether it is still the same; a pad is 10,240
MAX_KINDS = 64              # kinds of member in a shard; more means that the dots in the names are not extensions


class DataError(UserError):
    """The data cannot be used as it is."""


@dataclass(frozen=True)
class ShardIndex:
    """One shard and its samples."""

    path: Path
    size: int               # bytes of the tar
    samples: np.ndarray     # (samples,) records: key, and (offset, size) by kind of member

    @property
    def id(self) -> str:
        return f"{self.path.name} {self.size} {len(self.samples)}"


def open_indexes(shards: Sequence[Path], index_dir: Path) -> list[ShardIndex]:
    """The indexes of some shards; those that are missing or stale are made first, on all cores, with progress.

    Raises:
        DataError: a shard is not a whole tar.
    """
    places = {shard: find_index(shard, index_dir) for shard in shards}
    stale = [shard for shard, place in places.items() if place is None]
    if stale:
        with tqdm(total=sum(shard.stat().st_size for shard in stale), unit="B", unit_scale=True, desc="index",
                  disable=None) as bar:
            for shard in make_indexes(stale, index_dir):
                bar.update(shard.stat().st_size)
        places.update({shard: find_index(shard, index_dir) for shard in stale})
    return [read_index(shard, places[shard]) for shard in shards]


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_indexes(shards: Sequence[Path], index_dir: Path) -> Iterator[Path]:
    """Index each of the shards; gives each back when it is done."""
    if len(shards) == 1:
        yield make_index(shards[0], index_dir)
        return
    with ProcessPoolExecutor(min(usable_cores(), len(shards)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(make_index, shards, [index_dir] * len(shards))


def make_index(shard: Path, index_dir: Path) -> Path:
    """Scan one tar and write its index beside it, or under ``index_dir`` where that cannot be written."""
    samples = scan(shard)
    head = {"format": FORMAT, "shard": shard.name, "bytes": shard.stat().st_size, "ends": ends(shard),
            "samples": len(samples), "dtype": samples.dtype.descr}
    line = json.dumps(head).encode()
    line += b" " * (-(len(line) + 1) % 64) + b"\n"
    for path in index_paths(shard, index_dir):
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(line + samples.tobytes())
            os.replace(temporary, path)
            return shard
        except OSError as error:
            reason = error
    raise DataError(f"the index of {shard} cannot be written beside it nor in data.index_dir={index_dir}: {reason}")


def index_paths(shard: Path, index_dir: Path) -> list[Path]:
    """Where the index of a shard may stand, best first."""
    place = blake2b(str(shard.resolve().parent).encode(), digest_size=8).hexdigest()
    return [shard.with_name(f"{shard.name}.index"), index_dir / place / f"{shard.name}.index"]


def find_index(shard: Path, index_dir: Path) -> Path | None:
    """The index that belongs to the shard as it is now, if there is one."""
    now = {"format": FORMAT, "bytes": shard.stat().st_size, "ends": ends(shard)}
    for path in index_paths(shard, index_dir):
        if path.exists() and now.items() <= read_head(path).items():
            return path
    return None


def ends(shard: Path) -> str:
    """A hash of the first and the last bytes of a tar: its size alone is padded, and times do not outlive a copy."""
    with shard.open("rb") as file:
        first = file.read(END)
        file.seek(max(0, shard.stat().st_size - END))
        return blake2b(first + file.read(END), digest_size=8).hexdigest()


def read_head(path: Path) -> dict:
    """The first line of an index file; empty where it is not one."""
    with path.open("rb") as file:
        try:
            return json.loads(file.readline(1 << 20))
        except ValueError:
            return {}


def read_index(shard: Path, path: Path) -> ShardIndex:
    """Map an index file into memory."""
    head = read_head(path)
    kinds = [(name, kind, *map(tuple, shape)) for name, kind, *shape in head["dtype"]]
    with path.open("rb") as file:
        start = len(file.readline())
    samples = (
        np.memmap(path, np.dtype(kinds), mode="r", offset=start, shape=(head["samples"],))
        if head["samples"]
        else np.empty(0, np.dtype(kinds))
    )
    return ShardIndex(shard, head["bytes"], samples)


def scan(shard: Path) -> np.ndarray:
    """The samples of a tar, as WebDataset groups them: neighbours whose names agree up to the first dot.

    Returns:
        (samples,) records: ``__key__`` (bytes), then for each extension the pair (offset, size).

    Raises:
        DataError: the tar is cut short or damaged, or has more kinds of member than a data set has.
    """
    keys: list[bytes] = []
    samples: list[dict[str, tuple[int, int]]] = []
    for name, offset, size in members(shard):
        folder, slash, base = name.rpartition(b"/")
        stem, _, extension = base.partition(b".")
        if not stem or not extension:
            continue
        key, kind = folder + slash + stem, extension.decode("utf-8", "replace").lower()
        if not keys or keys[-1] != key or kind in samples[-1]:
            keys.append(key)
            samples.append({})
        samples[-1][kind] = (offset, size)
    kinds = sorted({kind for sample in samples for kind in sample})
    if len(kinds) > MAX_KINDS:
        raise DataError(
            f"{shard} has {len(kinds)} kinds of member ({', '.join(kinds[:3])}, ...): what follows the first dot of a "
            "name is its kind; rename the members so that keys have no dots"
        )
    dtype = [(KEY, f"S{max(map(len, keys), default=1)}"), *((kind, "<i8", (2,)) for kind in kinds)]
    table = np.zeros(len(keys), dtype)
    table[KEY] = keys
    for kind in kinds:
        table[kind] = [sample.get(kind, (0, 0)) for sample in samples]
    return table


def members(shard: Path) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and size of each regular file in a tar (ustar, GNU or pax), reading headers only.

    Raises:
        DataError: the tar ends inside a member, or a header is damaged.
    """
    end = shard.stat().st_size
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        position, count, long_name, long_size = 0, 0, None, None
        while position < end:
            header = os.pread(descriptor, BLOCK, position)
            if not header.strip(b"\0"):
                return                                      # the end mark
            name, size, kind = parse_header(header, shard, count)
            start = position + BLOCK
            if kind in b"xgLK":
                data = os.pread(descriptor, size, start)
                if kind == b"L":
                    long_name = data.rstrip(b"\0")
                elif kind == b"x":
                    fields = pax_fields(data)
                    long_name, long_size = fields.get(b"path", long_name), fields.get(b"size")
            else:
                size = int(long_size) if long_size else size
                if start + size > end:
                    raise cut_short(shard, count)
                if kind in b"0\0" or kind == b"7":
                    yield long_name or name, start, size
                    count += 1
                long_name, long_size = None, None
            position = start + size + -size % BLOCK
        if position > end:
            raise cut_short(shard, count)
    finally:
        os.close(descriptor)


def parse_header(header: bytes, shard: Path, count: int) -> tuple[bytes, int, bytes]:
    """Name, size and type flag of a tar header, its checksum held."""
    try:
        # adler32's low half is 1 + the sum of the bytes modulo 65521; the checksum counts its own field as spaces
        total = int(header[148:156].strip(b"\0 "), 8)
        if (total + sum(header[148:156]) - 256 + 1) % 65521 != zlib.adler32(header) & 0xFFFF:
            raise ValueError
        large = header[124] & 0x80          # GNU's way to write 8 GB and more
        size = int.from_bytes(header[125:136], "big") if large else int(header[124:136].strip(b"\0 ") or b"0", 8)
    except (ValueError, IndexError):
        if len(header) < BLOCK:
            raise cut_short(shard, count) from None
        raise DataError(f"{shard} is damaged behind its first {count:,} members; pack it again") from None
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name, size, header[156:157]


def pax_fields(data: bytes) -> dict[bytes, bytes]:
    """The records ``length key=value`` of a pax header."""
    fields = {}
    while data:
        length = int(data.partition(b" ")[0])
        key, _, value = data[:length].partition(b" ")[2].partition(b"=")
        fields[key] = value[:-1]
        data = data[length:]
    return fields


def cut_short(shard: Path, count: int) -> DataError:
    return DataError(f"{shard} is cut short behind its first {count:,} members; pack it again")
