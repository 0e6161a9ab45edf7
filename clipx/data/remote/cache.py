"""Cache of remote shards: a directory of bounded size.

A complete shard is at ``data.cache/shards-PLACE/NAME``, its index at ``data.index_dir/PLACE/NAME.index``; PLACE is a
hash of the URL's directory.  One process fills the directory; workers and other ranks poll for the file.  If copying
fails, the reason is in the file ``failed``.
"""

import fcntl
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from multiprocessing import parent_process
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import mkstemp
from threading import Event

from clipx.data.remote.stores import PIPE, download, run_with_retries
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import INDEX_DIR, belongs, expand_home, make_index, read_head

MAX_PARALLEL = 4  # parallel copies
UNLIMITED = 1 << 60  # bytes
LOOK = 0.02  # seconds between two polls for a shard


@dataclass(frozen=True)
class RemoteShard:
    """A shard on a server."""

    url: str
    path: Path  # its copy
    index: Path  # of its copy
    cache: "Cache" = field(compare=False)
    size: int = 0  # bytes; 0 if unknown
    samples: int | None = None  # if known

    def __str__(self) -> str:
        return self.url

    def is_cached(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == self.size and self.index.exists()


class Cache:
    """Directory of copies.

    Args:
        directory: of the copies (``data.cache``).
        limit: largest size of all copies, bytes.
        index_dir: of their indexes, which are never evicted.
        key: of the directory in the config, for errors.
    """

    def __init__(self, directory: Path, limit: int, index_dir: Path, key: str = "data.cache"):
        self.directory, self.limit, self.index_dir, self.key = directory, limit, index_dir, key
        self.kept: list[RemoteShard] = []  # never evicted
        self.filled = False  # a prefetcher copies missing shards
        self.failed = directory / "failed"

    @classmethod
    def unlimited(cls, directory: str, key: str) -> "Cache":
        """A cache that evicts nothing; ``directory`` may begin with ``~``."""
        return cls(expand_home(directory), UNLIMITED, expand_home(INDEX_DIR), key)

    def remote(self, url: str, size: int = 0, samples: int | None = None) -> RemoteShard:
        """Return a shard with the paths of its copy and index."""
        where, _, name = url.partition("?")[0].rpartition("/")  # a query may hold credentials and dates
        if url.startswith(PIPE):
            where, name = url, (re.findall(r"[\w.-]+\.tar", url) or ["pipe.tar"])[-1]
        place = blake2b(where.encode(), digest_size=8).hexdigest()
        index = self.index_dir / place / f"{name}.index"
        return RemoteShard(url, self.directory / f"shards-{place}" / name, index, self, size, samples)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory for the one process that fills it.

        Raises:
            DataError: another process holds the lock, or the directory is not writable.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / "lock").open("w")
        except OSError as error:
            raise DataError(f"{self.key}={self.directory} cannot be written: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"{self.key}={self.directory} is in use by another run; use another one: {self.key}=DIR"
                ) from error
            try:
                self.failed.unlink(missing_ok=True)
                for part in self.directory.glob("shards-*/*.part"):
                    part.unlink()
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: forked workers have it open, too

    def fetch(
        self, remotes: Sequence[RemoteShard], wanted: Collection[RemoteShard], pool: ThreadPool, stopped: Event
    ) -> None:
        """Copy shards in parallel, evicting others that are not wanted.

        Raises:
            DataError: they do not fit, or one cannot be copied.
        """
        self.make_room(sum(remote.size for remote in remotes), {remote.path for remote in (*wanted, *self.kept)})
        work = partial(copy, stopped=stopped, most=self.limit)
        run_with_retries(pool, work, remotes, stopped)

    def fetch_now(self, remotes: Sequence[RemoteShard]) -> None:
        """Copy missing shards and wait for them."""
        missing = [remote for remote in dict.fromkeys(remotes) if not remote.is_cached()]
        if missing:
            with self.locked(), ThreadPool(MAX_PARALLEL) as pool:
                for start in range(0, len(missing), MAX_PARALLEL):
                    self.fetch(missing[start : start + MAX_PARALLEL], (), pool, Event())
                self.make_room(0, {remote.path for remote in self.kept})  # sizes of pipes are known only now

    def keep(self, remotes: Sequence[RemoteShard]) -> None:
        """Copy shards and never evict them."""
        self.kept += remotes
        need = sum(remote.size for remote in self.kept)
        if need > self.limit:
            raise self.too_small(need, "the validation shards")
        self.fetch_now(remotes)

    def make_room(self, size: int, wanted: Collection[Path]) -> None:
        """Evict unwanted files, oldest first, until ``size`` more bytes fit."""
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
            f"{self.key}_gb={self.limit / 1e9:g} is too small for {what}; set at least "
            f"{self.key}_gb={1.01 * need / 1e9:.3g}"
        )

    def wait_for(self, remote: RemoteShard) -> None:
        """Wait a moment for a copy, or make it if there is no prefetcher.

        Raises:
            DataError: copying has failed.
        """
        if not self.filled:
            self.fetch_now([remote])
            return
        if self.failed.exists():
            raise DataError(self.failed.read_text())
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            raise DataError(f"the process that copies {remote.url} has ended")
        time.sleep(LOOK)


def copy(remote: RemoteShard, stopped: Event, most: int) -> None:
    """Copy a shard of at most ``most`` bytes and index it; the copy appears when both are complete.

    Raises:
        DataError: it has another number of samples than expected, or too many bytes.
        OSError: it has another size than expected, or its server fails.
    """
    for path in remote.path, remote.index:
        path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = mkstemp(".part", dir=remote.path.parent)
    part = Path(name)
    try:
        os.close(descriptor)
        download(remote.url, part, stopped, remote.size or most)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        size = part.stat().st_size
        if remote.size not in (0, size):
            raise OSError(f"got {size:,} bytes instead of {remote.size:,}")
        if not belongs(remote.index, part):
            try:
                make_index(part, remote.index.parent, remote.index)
            except DataError as error:
                raise DataError(str(error).replace(name, remote.url)) from error
        if remote.samples not in (None, counts(remote.index)):
            raise DataError(
                f"{remote.url} holds {counts(remote.index):,} samples, but the index or stats file next to it "
                f"says {remote.samples:,}; fix that file, delete {remote.index.parent}, and start a new run (name=...)"
            )
        os.replace(part, remote.path)
    finally:
        part.unlink(missing_ok=True)


def counts(index: Path) -> int | None:
    """Return the number of samples in an index."""
    return read_head(index).get("samples")
