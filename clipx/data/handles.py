"""Open shards: positioned reads from local tars and from copies of remote ones."""

import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipx.data.files import retry_read
from clipx.data.remote.cache import Cache, RemoteShard
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import find_index, read_table

OPEN_SHARDS = 256           # that a source keeps open at most, with two file descriptors each
OPEN_FILES = 4096           # of a process, where the system lets it raise its limit so far


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
        self.descriptor = retry_read(partial(os.open, path, os.O_RDONLY), path)
        self.stat = os.fstat(self.descriptor)
        if self.stat.st_size != size:
            raise self.changed()
        index = retry_read(partial(find_index, path, index_dir), path)   # holds the tar's ends against it
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
        return retry_read(partial(os.pread, self.descriptor, size, offset), self.path)

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

    def __init__(self, remote: RemoteShard, cache: Cache):
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
        return retry_read(partial(self.when_there, partial(self.read_once, offset, size)), self.path)

    def read_once(self, offset: int, size: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


def max_open_shards() -> int:
    """How many shards a source may keep open: an eighth of the files that this process may open, for there are others.

    The soft limit is raised first, as far as the hard one lets it: macOS has 256, Linux mostly 1,024.
    """
    soft, hard = (OPEN_FILES if limit == resource.RLIM_INFINITY else limit for limit in
                  resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < (most := min(hard, OPEN_FILES)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(1, min(OPEN_SHARDS, max(soft, most) // 8))
