"""What a run knows of its shards before it opens one: how large each is, and how many samples it has."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clipx.data.index import FORMAT, find_index, index_paths, make_index, read_head, read_table, write_table
from clipx.data.tar import DataError

MANY = 1000                 # shards; for so many, what their indexes say is kept in one file
TOLD = ("samples", "readable", "total", "cut")      # what the head of an index tells of its shard
ROW = np.dtype([("bytes", "<i8"), ("mtime", "<i8"), *((name, "<i8") for name in TOLD)])


@dataclass(frozen=True)
class Catalogue:
    """Some shards, in their order."""

    shards: list[Path]
    rows: np.ndarray        # (shards,) bytes, time of the last change (ns), and TOLD

    @property
    def id(self) -> str:
        """Names, sizes and counts; not places, and not times."""
        lines = zip(self.shards, self.rows["bytes"].tolist(), self.rows["samples"].tolist(), strict=True)
        text = "\n".join(f"{shard.name} {size} {samples}" for shard, size, samples in lines)
        return blake2b(text.encode(), digest_size=16).hexdigest()


def open_catalogue(shards: Sequence[Path], index_dir: Path) -> Catalogue:
    """Size and samples of each shard; indexes that are missing or stale are made first, on all cores, with progress.

    Raises:
        DataError: a shard is not there, is not a tar, or is damaged.
    """
    rows = np.zeros(len(shards), ROW)
    for number, shard in enumerate(shards):
        rows[number] = (*size_and_time(shard), 0, 0, 0, 0)
    known = read_catalogue(shards, index_dir)
    fresh = np.zeros(len(shards), bool)
    if known is not None:
        fresh = (known["bytes"] == rows["bytes"]) & (known["mtime"] == rows["mtime"])
        rows[fresh] = known[fresh]
    stale = np.flatnonzero(~fresh).tolist()
    indexes = open_indexes([shards[number] for number in stale], index_dir)
    for number, index in zip(stale, indexes, strict=True):
        head = read_head(index)
        rows[number] = (rows[number]["bytes"], rows[number]["mtime"], *(head[name] for name in TOLD))
    if len(stale) and len(shards) >= MANY:
        write_table(catalogue_paths(shards, index_dir), {"format": FORMAT}, rows)
    return Catalogue(list(shards), rows)


def size_and_time(shard: Path) -> tuple[int, int]:
    """Bytes and time of the last change (ns) of a shard."""
    try:
        stat = os.stat(shard)
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def read_catalogue(shards: Sequence[Path], index_dir: Path) -> np.ndarray | None:
    """What was kept of just these shards, if anything was."""
    if len(shards) < MANY:
        return None
    for path in catalogue_paths(shards, index_dir):
        if path.exists() and read_head(path).get("format") == FORMAT:
            return read_table(path)
    return None


def catalogue_paths(shards: Sequence[Path], index_dir: Path) -> list[Path]:
    """Where the catalogue of some shards may stand, best first."""
    names = blake2b("\n".join(shard.name for shard in shards).encode(), digest_size=4).hexdigest()
    return index_paths(shards[0].with_name(f"shards-{names}"), index_dir)


def open_indexes(shards: Sequence[Path], index_dir: Path) -> list[Path]:
    """The index files of some shards, made where they are missing or stale."""
    found = {shard: find_index(shard, index_dir) for shard in shards}
    stale = [shard for shard, index in found.items() if index is None]
    if stale:
        total = sum(shard.stat().st_size for shard in stale)
        with tqdm(total=total, unit="B", unit_scale=True, desc="index", disable=None) as bar:
            for shard, index in zip(stale, make_indexes(stale, index_dir), strict=True):
                found[shard] = index
                bar.update(shard.stat().st_size)
    return [found[shard] for shard in shards]


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_indexes(shards: Sequence[Path], index_dir: Path) -> Iterator[Path]:
    """Index each of the shards; gives each index when it is made."""
    if len(shards) == 1:
        yield make_index(shards[0], index_dir)
        return
    with ProcessPoolExecutor(min(usable_cores(), len(shards)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(make_index, shards, [index_dir] * len(shards))
