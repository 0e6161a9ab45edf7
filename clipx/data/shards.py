"""WebDataset shards as a source: plain tars, each sample read by its byte ranges."""

import logging
import math
import os
import re
import resource
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from glob import glob
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from pydantic import PositiveFloat
from typing_extensions import Unpack

from clipx.data.captions import MOST_WORDS, one_a_line, read_captions
from clipx.data.catalogue import Catalogue, open_all
from clipx.data.mix import Chain
from clipx.data.remote.cache import Cache, Remote
from clipx.data.remote.stores import PIPE, matches_of, persist
from clipx.data.sample import MOST_PICTURE, VALIDATION, BadSample, Data, How, Sample, Source, check_bytes, hold_out
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import KEY, find_index, in_home, read_table

logger = logging.getLogger("clipx")

PICTURES = ("jpg", "jpeg", "png", "webp")
WORDS = ("txt", "json")
OPEN_SHARDS = 256           # that a source keeps open at most, with two file descriptors each
OPEN_FILES = 4096           # of a process, where the system lets it raise its limit so far
WAITS = (0.2, 1.0, 3.0)     # seconds before a read that failed is tried again
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://")


class Shards:
    """Some indexed tars.

    Args:
        catalogue: the tars, in their order.
        caption_key: the key of ``.json`` that holds the captions; None for ``.txt``, else json's ``caption``.
        index_dir: where an index stands that is not beside its shard.
        cache: where the remote ones are copied to, if there are any.
    """

    def __init__(
        self, catalogue: Catalogue, caption_key: str | None, index_dir: Path, cache: Cache | None = None
    ):
        self.catalogue, self.caption_key, self.index_dir, self.cache = catalogue, caption_key, index_dir, cache
        self.one_a_line = one_a_line(dict(map(self.place, range(len(catalogue.shards)))))
        self.sizes = catalogue.rows["samples"]
        self.id = catalogue.id + " one caption a line" * self.one_a_line
        self.ends = np.cumsum(self.sizes)
        self.open = lru_cache(most_open())(self.open)

    def __reduce__(self) -> tuple:
        return type(self), (self.catalogue, self.caption_key, self.index_dir, self.cache)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The members that may hold the captions, best first."""
        return WORDS if self.caption_key is None else ("json",)

    def captions(self, members: Mapping[str, bytes]) -> list[str]:
        return read_captions(members, self.caption_key, self.one_a_line)

    def remote(self, shard: int) -> Remote:
        row = self.catalogue.rows[shard]
        return self.cache.remote(self.catalogue.urls[shard], int(row["bytes"]), int(row["samples"]))

    def place(self, shard: int) -> tuple[Path, str]:
        """Where what belongs to a shard's directory is read, and what that is called."""
        if shard in self.catalogue.urls:
            return self.remote(shard).index.parent, self.catalogue.urls[shard].rpartition("/")[0]
        return (directory := self.catalogue.shards[shard].parent), str(directory)

    def open(self, shard: int) -> "OpenShard | CachedShard":
        if shard in self.catalogue.urls:
            return CachedShard(self.remote(shard), self.cache)
        row = self.catalogue.rows[shard]
        return OpenShard(self.catalogue.shards[shard], int(row["bytes"]), int(row["mtime"]), self.index_dir)

    def keys(self, shard: int) -> np.ndarray:
        return self.open(shard).samples[KEY]

    def row(self, sample: int) -> tuple["OpenShard | CachedShard", np.void]:
        shard = int(np.searchsorted(self.ends, sample, side="right"))
        tar = self.open(shard)
        return tar, tar.samples[sample - int(self.ends[shard] - self.sizes[shard])]

    def locate(self, sample: int) -> str:
        tar, row = self.row(sample)
        return f"{tar.path.name}/{row[KEY].decode('utf-8', 'replace')}"

    def read(self, sample: int) -> Sample:
        tar, row = self.row(sample)
        members = {kind: tuple(row[kind].tolist()) for kind in row.dtype.names[1:] if row[kind][0]}
        if min(map(min, members.values()), default=0) < 0:
            raise BadSample("its index names no place in its shard; delete the index")
        if max(map(sum, members.values()), default=0) > tar.size:
            raise BadSample("is lost: its shard is cut short")
        picture = next((members[kind] for kind in PICTURES if kind in members), None)
        if picture is None:
            raise BadSample(f"has no picture ({', '.join('.' + kind for kind in PICTURES)}){told_of_dots(members)}")
        kind = next((kind for kind in self.kinds if kind in members), None)
        if kind:
            check_bytes(f"its caption (.{kind})", members[kind][1], MOST_WORDS)
        check_bytes("its picture", picture[1], MOST_PICTURE)
        captions = self.captions({kind: tar.read(*members[kind])} if kind else {})
        return Sample(row[KEY].decode("utf-8", "replace"), tar.read(*picture), captions)


def told_of_dots(kinds: Iterable[str]) -> str:
    """Why members that look like pictures are none, where that is because of a dot in the key."""
    dotted = next((kind for kind in kinds if kind.rpartition(".")[2] in PICTURES), None)
    return (f" but .{dotted}: what follows the first dot of a name is its kind, so keys must have no dots; rename the "
            "members" if dotted else "")


def most_open() -> int:
    """How many shards a source may keep open: an eighth of the files that this process may open, for there are others.

    The soft limit is raised first, as far as the hard one lets it: macOS has 256, Linux mostly 1,024.
    """
    soft, hard = (OPEN_FILES if limit == resource.RLIM_INFINITY else limit for limit in
                  resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < (most := min(hard, OPEN_FILES)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(1, min(OPEN_SHARDS, max(soft, most) // 8))


class OpenShard:
    """A tar that stays open for positioned reads, for as long as anybody holds it.

    Args:
        path: the tar.
        size: its bytes when the run began, and
        mtime: the time of its last change (ns).
        index_dir: where its index stands if not beside it.

    Raises:
        DataError: it cannot be read, or is not what it was when the run began.
    """

    def __init__(self, path: Path, size: int, mtime: int, index_dir: Path):
        self.path, self.size = path, size
        self.descriptor = patiently(partial(os.open, path, os.O_RDONLY), path)
        self.stat = os.fstat(self.descriptor)
        if self.stat.st_size != size:
            raise self.changed()
        index = patiently(partial(find_index, path, index_dir), path)   # holds the tar's ends against it
        if index is None:
            raise self.changed()
        self.samples = np.asarray(read_table(index))      # rows of a memmap are slow to take

    def changed(self) -> DataError:
        return DataError(
            f"{self.path} has changed while the run used it; put it back and the same command goes on, or start "
            "another run (name=...) on what is there now"
        )

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of it."""
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self.stat.st_size, self.stat.st_mtime_ns):
            raise self.changed()
        return patiently(partial(os.pread, self.descriptor, size, offset), self.path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class CachedShard:
    """The copy of a remote tar.  It is opened for each read, so that its space is free as soon as it is evicted.

    Args:
        remote: the tar.
        cache: where its copy will stand.

    Raises:
        DataError: it cannot be read, or will not come.
    """

    def __init__(self, remote: Remote, cache: Cache):
        self.remote, self.cache, self.path, self.size = remote, cache, remote.path, remote.size
        self.samples = self.when_there(partial(read_table, remote.index))

    def when_there(self, read: Callable[[], Any]) -> Any:
        while True:
            try:
                return read()
            except FileNotFoundError:
                self.cache.wait_for(self.remote)

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of it."""
        return patiently(partial(self.when_there, partial(self.read_once, offset, size)), self.path)

    def read_once(self, offset: int, size: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


def patiently(read: Callable[[], Any], path: Path) -> Any:
    """Read; what fails is tried again after growing waits, and ends the run if it still fails.

    Raises:
        DataError: it cannot be read.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except OSError as error:
            if wait is None:
                raise DataError(
                    f"{path} cannot be read ({error.strerror}), after {len(WAITS) + 1} tries; when it can be, the same "
                    "command goes on from the last checkpoint"
                ) from error
            time.sleep(wait)


def open_shards(
    root: str | None = None,
    shards: str | list[str] | None = None,
    val_shards: str | list[str] | None = None,
    val: float | str = 0.02,
    caption_key: str | None = None,
    index_dir: str = "~/.cache/clipx",
    cache: str = "~/.cache/clipx/shards",
    cache_gb: PositiveFloat = 100,
    allow_pipe: bool = False,
    made_by: str | None = None,
    **how: Unpack[How],
) -> Data:
    """Training and validation shards, indexed.

    Args:
        root: directory with train/*.tar and val/*.tar (or another name in ``VALIDATION``), or with *.tar.
        shards: in place of ``root``: files, URLs, globs or brace lists, one or several.
        val_shards: likewise, for validation; those of them that ``shards`` names too do not train.
        val: where there are no validation shards, the share of the pictures held out, or a directory of shards.
        caption_key: the key of ``.json`` that holds the captions; None for ``.txt``, else json's ``caption``.
        index_dir: where an index goes that cannot stand beside its shard.
        cache: where remote shards are copied to; one run at a time.
        cache_gb: most that stands there, 1e9 bytes.
        allow_pipe: whether ``pipe:COMMAND`` may be among the shards.
        made_by: the source of ``clipx.prepare`` that makes such shards, or img2dataset; told when there are none.
        how: as in ``Data``.

    Raises:
        ValueError: there are no shards, or more of their samples are lost than ``max_skipped`` allows.
        DataError: one is not a tar, or remote ones cannot be had.
    """
    if (root is None) == (shards is None):
        raise ValueError(f"root={root} and shards={shards}: give one of them, a directory or names of tars")
    if shards is not None:
        train, held = expand(shards, "shards", allow_pipe), []
    else:
        train, held = in_root(root, made_by)
    notes = []
    if val_shards is not None:
        held = expand(val_shards, "val_shards", allow_pipe)
    elif isinstance(val, str):
        held = in_directory(Path(val).expanduser())
        if not held:
            raise ValueError(f"val={val} holds no shards (*.tar)")
    elif val and not all(isinstance(shard, Path) for shard in train):
        raise ValueError(
            f"val={val} would take pictures out of all shards, and these are remote; give data.val_shards=URL, "
            "or data.val=0 for none"
        )
    elif held:
        notes.append(f"validation pictures are those of {held[0].parent}")
    kept = not_validating(train, held)
    if shared := len(train) - len(kept):
        notes.append(f"{shared} of {len(train)} shards are validation shards and left out of training")
    copies = Cache(in_home(cache), int(1e9 * cache_gb), in_home(index_dir))
    source = open_source(kept, caption_key, copies)
    if held:
        split = source, open_source(held, caption_key, copies)
        if not sum(split[1].sizes):
            raise DataError(f"{held[0]} and the {len(held) - 1} shards after it, which validate, hold no samples; give "
                            "others (data.val_shards=...), or leave them out")
        copies.keep([split[1].remote(number) for number in split[1].catalogue.urls])
    else:
        split = hold_out(source, val, copies.index_dir)
    data = Data(*split, **how, lost=lost_samples(source.catalogue), notes=notes)
    tell_faults(source.catalogue, data)
    return data


def open_source(shards: list[Path | str], caption_key: str | None, cache: Cache) -> Shards:
    return Shards(open_all(shards, cache), caption_key, cache.index_dir, cache)


def totals(catalogue: Catalogue) -> np.ndarray:
    """(shards,) how many samples each had when it was whole; of an empty file, if nothing tells, the others' mean."""
    rows = catalogue.rows
    known = rows["total"] > 0
    mean = round(rows["total"][known].mean()) if known.any() else 0
    return np.where((rows["bytes"] == 0) & ~known, mean, rows["total"])


def lost_samples(catalogue: Catalogue) -> dict[str, int]:
    """How many samples each shard that is cut short had after the cut."""
    after = totals(catalogue) - catalogue.rows["samples"]
    return {catalogue.shards[number].name: int(after[number]) for number in np.flatnonzero(after)}


def faults(catalogue: Catalogue) -> Iterator[tuple[int, str]]:
    """How many samples of a shard cannot be used, and why, for each shard with something wrong that its index shows."""
    for shard, row, total in zip(catalogue.shards, catalogue.rows, totals(catalogue).tolist(), strict=True):
        readable = int(row["readable"])
        if row["bytes"] == 0:
            yield total, f"{shard} is empty (0 bytes); about {total:,} samples are lost; fetch or pack it again"
        elif row["cut"] and readable < total:
            yield total - readable, (
                f"{shard} is cut short: {readable:,} of its {total:,} samples can be read; pack it again"
            )
        elif row["cut"]:
            yield 0, f"{shard} has no end mark and may be cut short; {total:,} samples in it are used"
        if row["parts"]:
            yield int(row["parts"]), (
                f"{shard}: the members of a sample are not adjacent, so {row['parts']:,} of its {row['samples']:,} "
                f"samples lack some; write it in the order of the names (mkdir x && tar -xf {shlex.quote(str(shard))} "
                "-C x && tar --sort=name -cf NEW.tar -C x .)"
            )


def tell_faults(catalogue: Catalogue, data: Data) -> None:
    """Warn of each shard that is cut short, empty or out of order.

    Raises:
        ValueError: more samples cannot be used than ``max_skipped`` allows.
        DataError: there is nothing at all.
    """
    if not catalogue.rows["readable"].any():
        raise DataError(f"{catalogue.shards[0]} and the {len(catalogue.shards) - 1} shards after it hold no samples")
    found, total = list(faults(catalogue)), int(totals(catalogue).sum())
    bad = sum(count for count, _ in found)
    if bad > data.bad_limit:
        _, worst = max(found)
        share = math.ceil(1000 * bad / total) / 1000
        without = f", or set {share} to go on without them" if share < 1 else ""
        raise ValueError(f"max_skipped={data.max_skipped}: {worst}{without}")
    for _, fault in found:
        logger.warning(fault)


def in_root(name: str, made_by: str | None) -> tuple[list[Path], list[Path]]:
    """The training and the validation shards of a directory.

    Raises:
        ValueError: it has none; what makes them is told.
    """
    root = Path(name).expanduser()
    if SCHEME.match(name):
        raise ValueError(f"root={name} is a URL; name the shards: data.shards='{name}/{{00000..00099}}.tar'")
    train = in_directory(root / "train") or in_directory(root)
    if not train:
        validating = next((root / name for name in VALIDATION if in_directory(root / name)), None)
        if validating:
            raise ValueError(f"root={root} holds no shards to train on, but some in {validating.name}/; "
                             f"evaluate scores all of these with data.root={validating} data.val=0 split=train")
        reason = "holds no shards (*.tar, train/*.tar)" if root.is_dir() else "is not a directory"
        remedy = "for pictures with captions.txt use data=folder"
        if made_by == "img2dataset":
            remedy = "img2dataset makes them; give the directory that it wrote, data.root=DIR"
        elif made_by and root.is_dir() and os.listdir(root):
            new = f"{root}-shards"
            remedy = (f"make them with: python -m clipx.prepare source={made_by} src={root} out={new}, then "
                      f"data.root={new}")
        elif made_by:
            remedy = f"make its shards with: python -m clipx.prepare source={made_by} src=DIR out={root}"
        raise ValueError(f"root={root} {reason}; {remedy}")
    for directory in (root / name for name in VALIDATION):
        if held := in_directory(directory):
            return train, held
    return train, []


def not_validating(train: list[Path | str], held: list[Path | str]) -> list[Path | str]:
    """The training shards without those that are validation shards, too.

    Raises:
        ValueError: nothing is left to train on.
    """
    validating = {shard if isinstance(shard, str) else shard.resolve() for shard in held}
    kept = [shard for shard in train if (shard if isinstance(shard, str) else shard.resolve()) not in validating]
    if not kept:
        raise ValueError(f"all {len(train):,} training shards, such as {train[0]}, are validation shards; give others")
    return kept


def in_directory(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.tar"))


def expand(patterns: str | list[str], key: str, allow_pipe: bool = False) -> list[Path | str]:
    """The files and URLs that some names, globs and brace lists stand for, in order.

    Raises:
        ValueError: there is no such file, or a command is not allowed.
    """
    from webdataset.shardlists import expand_urls

    found: list[Path | str] = []
    for pattern in map(os.path.expanduser, [patterns] if isinstance(patterns, str) else patterns):
        for name in [pattern] if Path(pattern).is_file() else expand_urls(pattern):
            matches = named(name, key, allow_pipe)
            if not matches:
                raise ValueError(f"{key}={pattern}: there is no file {name}")
            found += matches
    if not found:
        raise ValueError(f"{key}={patterns} names no shards")
    return found


def named(name: str, key: str, allow_pipe: bool) -> list[Path | str]:
    """The files that one name or glob stands for; a URL where it is not a file of this machine."""
    if name.startswith(PIPE):
        if not allow_pipe:
            raise ValueError(f"{key}={name} would run a command; data.allow_pipe=true allows it")
        return [name]
    if SCHEME.match(name) and not name.startswith("file:"):
        if "*" not in name:
            return [name]
        with ThreadPool(1) as pool:
            return persist(pool, matches_of, {name: name}, Event())[name]
    path = re.sub(r"^file:(//(localhost)?(?=/))?", "", name)
    return [Path(path)] if Path(path).is_file() else [Path(match) for match in sorted(glob(path))]


def remote_parts(source: Source) -> Iterator[tuple[int, Shards]]:
    """Those parts of a source that are remote shards, at least some, each with the number of its first shard."""
    first = 0
    for part in source.sources if isinstance(source, Chain) else [source]:
        if isinstance(part, Shards) and part.catalogue.urls:
            yield first, part
        first += len(part.sizes)
