"""RemoteShard shards: copied ahead of need, in the plan's order, into a directory of bounded size.

A shard stands at ``data.cache/shards-PLACE/NAME`` as soon as it is whole, its index at ``data.index_dir/PLACE/
NAME.index``; PLACE is a hash of the URL's directory.  One process fills the directory.  Workers and other ranks look
for the file and wait; why it will not come is written into the file ``failed``.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from multiprocessing import parent_process
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import mkstemp
from threading import Event
from typing import NamedTuple

from clipx.data.remote.stores import PIPE, download, run_with_retries
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import belongs, make_index, read_head

logger = logging.getLogger("clipx")

MAX_PARALLEL = 4                         # copies side by side
AHEAD = 64                          # windows that are copied ahead, where there is room
CHECKED = 4096                      # windows whose size is known to fit before a run starts
LOOK = 0.02                         # seconds between two looks for a shard


class RemoteShard(NamedTuple):
    """A shard on a server."""

    url: str
    path: Path                  # its copy
    index: Path                 # of its copy
    size: int | None = None     # bytes, as far as they are known
    samples: int | None = None

    def is_cached(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == self.size and self.index.exists()


class Cache:
    """Where copies stand.

    Args:
        directory: of the copies (``data.cache``).
        limit: bytes of all copies together.
        index_dir: of their indexes, which stay.
    """

    def __init__(self, directory: Path, limit: int, index_dir: Path):
        self.directory, self.limit, self.index_dir = directory, limit, index_dir
        self.kept: list[RemoteShard] = []        # are never evicted
        self.filled = False                 # somebody copies what is missing
        self.failed = directory / "failed"

    def remote(self, url: str, size: int | None = None, samples: int | None = None) -> RemoteShard:
        """Where the copy of a shard goes, and its index."""
        where, _, name = url.partition("?")[0].rpartition("/")          # a query may hold passwords and dates
        if url.startswith(PIPE):
            where, name = url, (re.findall(r"[\w.-]+\.tar", url) or ["pipe.tar"])[-1]
        place = blake2b(where.encode(), digest_size=8).hexdigest()
        index = self.index_dir / place / f"{name}.index"
        return RemoteShard(url, self.directory / f"shards-{place}" / name, index, size, samples)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the one process that fills the directory.

        Raises:
            DataError: another one does, or it cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / "lock").open("w")
        except OSError as error:
            raise DataError(f"data.cache={self.directory} cannot be written: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"data.cache={self.directory} is filled by another run; give this one its own: data.cache=DIR"
                ) from error
            try:
                self.failed.unlink(missing_ok=True)
                for part in self.directory.glob("shards-*/*.part"):
                    part.unlink()
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)        # closing it would not do: forked workers have it open, too

    def fetch(
        self, remotes: Sequence[RemoteShard], wanted: Collection[RemoteShard], pool: ThreadPool, stopped: Event
    ) -> None:
        """Copy some shards, side by side, into room that others give which are not wanted.

        Raises:
            DataError: there is no room, or one cannot be copied.
        """
        self.make_room(sum(remote.size or 0 for remote in remotes), {remote.path for remote in (*wanted, *self.kept)})
        work = partial(copy, stopped=stopped, most=self.limit)
        run_with_retries(pool, work, {remote: remote.url for remote in remotes}, stopped)

    def fetch_now(self, remotes: Sequence[RemoteShard]) -> None:
        """Copy those shards that are not there while everything waits."""
        missing = [remote for remote in remotes if not remote.is_cached()]
        if missing:
            with self.locked(), ThreadPool(MAX_PARALLEL) as pool:
                for start in range(0, len(missing), MAX_PARALLEL):
                    self.fetch(missing[start : start + MAX_PARALLEL], (), pool, Event())
                self.make_room(0, {remote.path for remote in self.kept})        # what came through a pipe had no size

    def keep(self, remotes: Sequence[RemoteShard]) -> None:
        """Copy some shards, and never evict them."""
        self.kept += remotes
        need = sum(remote.size for remote in self.kept)
        if need > self.limit:
            raise self.too_small(need, "the validation shards")
        self.fetch_now(remotes)

    def make_room(self, size: int, wanted: Collection[Path]) -> None:
        """Evict what is not wanted, the oldest first, until ``size`` bytes more fit."""
        files = [(path, path.stat()) for path in self.directory.glob("shards-*/*")]
        used = size + sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if used > self.limit and path not in wanted:
                path.unlink()
                used -= stat.st_size
        if used > self.limit:
            raise self.too_small(used, "the shards that are needed at once")

    def too_small(self, need: int, what: str) -> DataError:
        return DataError(
            f"data.cache_gb={self.limit / 1e9:g} is too small for {what}; give at least "
            f"data.cache_gb={1.01 * need / 1e9:.3g}"
        )

    def wait_for(self, remote: RemoteShard) -> None:
        """Return in a moment, or when it is there.

        Raises:
            DataError: it will not come.
        """
        if not self.filled:
            self.fetch_now([remote])
            return
        if self.failed.exists():
            raise DataError(self.failed.read_text())
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            raise DataError(f"the process that copied {remote.url} has ended")
        time.sleep(LOOK)


def copy(remote: RemoteShard, stopped: Event, most: int) -> None:
    """Copy a shard of ``most`` bytes at most; it stands in its place when it is whole and has its index.

    Raises:
        DataError: it has not as many samples as was said, or more bytes.
        OSError: it has not as many bytes, or its server fails.
    """
    for path in remote.path, remote.index:
        path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = mkstemp(".part", dir=remote.path.parent)
    part = Path(name)
    try:
        os.close(descriptor)
        download(remote.url, part, stopped, most if remote.size is None else remote.size)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        size = part.stat().st_size
        if remote.size not in (None, size):
            raise OSError(f"{size:,} bytes came, not {remote.size:,}")
        if not belongs(remote.index, part):
            try:
                make_index(part, remote.index.parent, remote.index)
            except DataError as error:
                raise DataError(str(error).replace(name, remote.url)) from error
        if remote.samples not in (None, counts(remote.index)):
            raise DataError(
                f"{remote.url} holds {counts(remote.index):,} samples, not {remote.samples:,} as what stands beside it "
                f"says; mend that, delete {remote.index.parent}, and start another run (name=...)"
            )
        os.replace(part, remote.path)
    finally:
        part.unlink(missing_ok=True)


def counts(index: Path) -> int | None:
    """The samples of an index."""
    return read_head(index).get("samples")
