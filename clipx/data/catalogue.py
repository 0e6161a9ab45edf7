"""The catalogue of a run's shards: size and number of samples of each."""

import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Event

import numpy as np
from tqdm import tqdm

from clipx.data.captions import DATASET_TYPE
from clipx.data.files import write_atomic
from clipx.data.handles import CachedShard, OpenShard
from clipx.data.remote.cache import Cache, RemoteShard
from clipx.data.remote.stores import PIPE, download, is_permanent, run_with_retries, size_of
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import (
    COUNTS,
    FORMAT,
    find_index,
    index_paths,
    make_index,
    read_head,
    read_table,
    successes,
    temporary_dir,
    write_table,
)
from clipx.devices import available_cores

logger = logging.getLogger("clipx")

MANY = 1000  # shards from which the catalogue is cached in a file
ASKED = 64  # parallel requests about remote shards
MAX_SIDECAR = 64 << 20  # bytes of an index or stats file on a server
KNOWN = f"remote-{FORMAT}.json"  # cache file of one remote directory
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
    rows[~far], rows[far] = local.rows, remote_rows(list(urls.values()), cache)
    remotes = {
        number: cache.remote(url, int(rows[number]["bytes"]), int(rows[number]["samples"]))
        for number, url in urls.items()
    }
    paths = [remotes[number].path if isinstance(shard, str) else shard for number, shard in enumerate(shards)]
    return Catalogue(paths, rows, cache.index_dir, remotes)


def remote_rows(urls: Sequence[str], cache: Cache) -> np.ndarray:
    """Return the rows of remote shards, from the cache or from their servers.

    Raises:
        DataError: a server does not answer, or a shard without an index or stats file cannot be copied.
    """
    remotes = [cache.remote(url) for url in urls]
    known = {place: read_known_rows(place) for place in {remote.index.parent for remote in remotes}}
    for place in known:
        place.mkdir(parents=True, exist_ok=True)
    missing = [remote for remote in dict.fromkeys(remotes) if remote.path.name not in known[remote.index.parent]]
    places = {remote.index.parent: remote for remote in remotes if not remote.url.startswith(PIPE)}
    untyped = [remote for place, remote in places.items() if not (place / DATASET_TYPE).exists()]
    with ThreadPool(ASKED) as pool, tqdm(total=len(missing), unit="shard", desc="ask", disable=None) as bar:
        run_with_retries(pool, fetch_dataset_type, untyped, Event())
        for start in range(0, len(missing), ASKED):
            some = missing[start : start + ASKED]
            answers = run_with_retries(pool, ask, some, Event())
            cache.fetch_now([answer for answer in answers.values() if isinstance(answer, RemoteShard)])
            for remote, answer in answers.items():
                row = index_row(remote.index) if isinstance(answer, RemoteShard) else answer
                known[remote.index.parent][remote.path.name] = row
            for place in {remote.index.parent for remote in some}:
                write_atomic(place / KNOWN, json.dumps(known[place]).encode())
            bar.update(len(some))
    rows = np.zeros(len(urls), ROW)
    for number, remote in enumerate(remotes):
        size, *counts = known[remote.index.parent][remote.path.name]
        rows[number] = (size, 0, *counts)
    return rows


def read_known_rows(place: Path) -> dict[str, list[int]]:
    """Read the cached bytes and COUNTS of the shards of a remote directory, by name."""
    return json.loads((place / KNOWN).read_bytes()) if (place / KNOWN).exists() else {}


def ask(remote: RemoteShard) -> list[int] | RemoteShard:
    """Return bytes and COUNTS of a remote shard; or, without an index or stats file, the shard with its size if known.

    Raises:
        DataError: obstore is not installed.
        OSError: the server fails.
    """
    if not remote.url.startswith(PIPE) and not remote.index.exists():
        found = fetch_small(sibling_url(remote.url, remote.index.name))
        if found is not None:
            write_atomic(remote.index, found)
    if remote.index.exists() and read_head(remote.index).get("format") == FORMAT:
        return index_row(remote.index)
    if remote.url.startswith(PIPE):
        return remote
    stats = fetch_small(sibling_url(remote.url, f"{remote.path.stem}_stats.json"))
    size, count = size_of(remote.url), successes(stats or b"")
    return replace(remote, size=size) if count is None else [size, count, count, count, 0, 0]


def fetch_dataset_type(remote: RemoteShard) -> None:
    """Cache CLIP_benchmark's dataset_type.txt of a remote directory, next to its shards or one level up.

    Raises:
        OSError: the server fails.
    """
    urls = [sibling_url(remote.url, DATASET_TYPE)]
    directory, mark, query = remote.url.partition("?")
    directory = directory.rpartition("/")[0]
    if "/" in directory.partition("://")[2]:  # not the root of a server or bucket
        urls.append(sibling_url(f"{directory}{mark}{query}", DATASET_TYPE))
    answers = filter(None, map(fetch_small, urls))
    write_atomic(remote.index.parent / DATASET_TYPE, next(answers, b""))


def index_row(index: Path) -> list[int]:
    head = read_head(index)
    return [int(head[name]) for name in ("bytes", *COUNTS)]


def sibling_url(url: str, name: str) -> str:
    """Return the URL of another file in the same directory."""
    path, mark, query = url.partition("?")
    return f"{path.rpartition('/')[0]}/{name}{mark}{query}"


def fetch_small(url: str) -> bytes | None:
    """Download a small file; None if it is missing or forbidden."""
    with NamedTemporaryFile() as part:
        try:
            download(url, Path(part.name), Event(), MAX_SIDECAR)
        except (OSError, DataError) as error:
            if is_permanent(error):
                return None
            raise
        return part.read()
