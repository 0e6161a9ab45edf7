"""The catalogue of a run's shards: size and number of samples of each."""

import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clipx.data.handles import CachedShard, OpenShard
from clipx.data.remote.cache import Cache, RemoteShard
from clipx.data.remote.sizes import ask_all
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import (
    COUNTS,
    FORMAT,
    find_index,
    index_paths,
    make_index,
    read_head,
    read_table,
    temporary_dir,
    write_table,
)
from clipx.devices import available_cores

logger = logging.getLogger("clipx")

MANY = 1000  # shards from which the catalogue is cached in a file
ROW = np.dtype([("bytes", "<i8"), ("mtime", "<i8"), *((name, "<i8") for name in COUNTS)])


@dataclass(frozen=True)
class Catalogue:
    """Shards in order, with their sizes and counts."""

    shards: list[Path]  # a remote shard's path in the cache
    rows: np.ndarray  # (shards,) bytes, mtime (ns; 0 if remote), COUNTS
    index_dir: Path  # directory of indexes that are not next to their shard
    remotes: Mapping[int, RemoteShard] = field(default_factory=dict)  # by number

    def open(self, number: int) -> OpenShard | CachedShard:
        """Open a shard for reading."""
        if number in self.remotes:
            return CachedShard(self.remotes[number])
        return OpenShard(self.shards[number], int(self.rows[number]["bytes"]), self.index_dir)

    def sidecar_dirs(self) -> dict[Path, str]:
        """Return the local directories of the shards' sidecar files, and their names in messages."""
        local = {
            shard.parent: str(shard.parent) for number, shard in enumerate(self.shards) if number not in self.remotes
        }
        return local | {remote.index.parent: remote.url.rpartition("/")[0] for remote in self.remotes.values()}

    @property
    def id(self) -> str:
        """A hash of names, sizes and counts, not of directories and times."""
        lines = zip(self.shards, self.rows["bytes"].tolist(), self.rows["samples"].tolist(), strict=True)
        text = "\n".join(f"{shard.name} {size} {samples}" for shard, size, samples in lines)
        return blake2b(text.encode(), digest_size=16).hexdigest()


def open_catalogue(shards: Sequence[Path], index_dir: Path) -> Catalogue:
    """Return the catalogue of local shards; missing or stale indexes are made first, on all cores.

    Raises:
        DataError: a shard is missing, unreadable, not a tar, or corrupt.
    """
    rows = np.zeros(len(shards), ROW)
    for number, shard in enumerate(shards):
        rows[number]["bytes"], rows[number]["mtime"] = size_and_time(shard)
    known = read_catalogue(shards, index_dir)
    fresh = np.zeros(len(shards), bool)
    if known is not None:
        fresh = (known["bytes"] == rows["bytes"]) & (known["mtime"] == rows["mtime"])
        rows[fresh] = known[fresh]
    stale = np.flatnonzero(~fresh).tolist()
    try:
        indexes = open_indexes([shards[number] for number in stale], index_dir)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    for number, index in zip(stale, indexes, strict=True):
        head = read_head(index)
        rows[number] = (rows[number]["bytes"], rows[number]["mtime"], *(head[name] for name in COUNTS))
    if len(stale) and len(shards) >= MANY:
        write_table(catalogue_paths(shards, index_dir), {"format": FORMAT}, rows)
    return Catalogue(list(shards), rows, index_dir)


def size_and_time(shard: Path) -> tuple[int, int]:
    """Return bytes and mtime (ns) of a shard."""
    try:
        found = os.stat(shard)
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{shard} is not a file; leave it out")
    return found.st_size, found.st_mtime_ns


def read_catalogue(shards: Sequence[Path], index_dir: Path) -> np.ndarray | None:
    """Read the cached rows of exactly these shards, if there are any."""
    if len(shards) < MANY:
        return None
    for path in catalogue_paths(shards, index_dir):
        if os.access(path, os.R_OK) and read_head(path).get("format") == FORMAT:
            known = read_table(path)
            return known if (known.dtype, len(known)) == (ROW, len(shards)) else None
    return None


def catalogue_paths(shards: Sequence[Path], index_dir: Path) -> list[Path]:
    """Return the paths at which the catalogue may be cached, best first."""
    names = blake2b("\n".join(shard.name for shard in shards).encode(), digest_size=4).hexdigest()
    return index_paths(shards[0].with_name(f"shards-{names}"), index_dir)


def open_indexes(shards: Sequence[Path], index_dir: Path) -> list[Path]:
    """Return the index files of some shards, after making missing or stale ones."""
    found = {shard: index for shard in shards if (index := find_index(shard, index_dir))}
    stale = [shard for shard in dict.fromkeys(shards) if shard not in found]
    if stale:
        total = sum(shard.stat().st_size for shard in stale)
        with tqdm(total=total, unit="B", unit_scale=True, desc="index", disable=None) as bar:
            for shard, index in zip(stale, make_indexes(stale, index_dir), strict=True):
                found[shard] = index
                bar.update(shard.stat().st_size)
        if temporary := sum(temporary_dir() in found[shard].parents for shard in stale):
            logger.warning(
                "%d indexes are in the temporary directory %s, as %s is not writable; set "
                "data.index_dir=DIR to keep them",
                temporary,
                temporary_dir(),
                stale[0].parent,
            )
    return [found[shard] for shard in shards]


def make_indexes(shards: Sequence[Path], index_dir: Path) -> Iterator[Path]:
    """Index shards; yield the path of each index once it is made."""
    if len(shards) == 1:
        yield make_index(shards[0], index_dir)
        return
    with ProcessPoolExecutor(min(available_cores(), len(shards)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(make_index, shards, [index_dir] * len(shards))


def open_all(shards: Sequence[Path | str], cache: Cache) -> Catalogue:
    """Return the catalogue of local and remote shards."""
    urls = {number: shard for number, shard in enumerate(shards) if isinstance(shard, str)}
    local = open_catalogue([shard for shard in shards if isinstance(shard, Path)], cache.index_dir)
    if not urls:
        return local
    far = np.isin(np.arange(len(shards)), list(urls))
    rows = np.zeros(len(shards), ROW)
    rows[~far] = local.rows
    rows[far] = [(size, 0, *counts) for size, *counts in ask_all(list(urls.values()), cache)]
    remotes = {
        number: cache.remote(url, int(rows[number]["bytes"]), int(rows[number]["samples"]))
        for number, url in urls.items()
    }
    paths = [remotes[number].path if isinstance(shard, str) else shard for number, shard in enumerate(shards)]
    return Catalogue(paths, rows, cache.index_dir, remotes)
