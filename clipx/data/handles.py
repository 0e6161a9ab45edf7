"""Open shards: positioned reads from local tars and from copies of remote ones."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from clipx.data.files import retry_read
from clipx.data.remote.cache import RemoteShard
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import find_index, read_table

OPEN_SHARDS = 256  # most open shards per source, with two file descriptors each
OPEN_FILES = 4096  # limit of a process, if the system allows it
Args = ParamSpec("Args")
Result = TypeVar("Result")


class OpenShard:
    """A tar that stays open for positioned reads while it is referenced.

    Args:
        path: the tar.
        size: its bytes when the run started.
        index_dir: directory of its index if that is not next to it.

    Raises:
        DataError: it cannot be read, or has changed since.
    """

    def __init__(self, path: Path, size: int, index_dir: Path):
        self.path, self.size = path, size
        self.descriptor = retry_read(path, os.open, path, os.O_RDONLY)
        self.stat = os.fstat(self.descriptor)
        if self.stat.st_size != size:
            raise self.changed()
        index = retry_read(path, find_index, path, index_dir)  # compares the tar's ends
        if index is None:
            raise self.changed()
        self.samples = np.asarray(read_table(index))  # indexing a memmap is slow

    def changed(self) -> DataError:
        return DataError(
            f"{self.path} changed during the run; restore it and rerun the same command to resume, or start a new run "
            "(name=...) on the changed data"
        )

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes from the tar."""
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self.stat.st_size, self.stat.st_mtime_ns):
            raise self.changed()
        return retry_read(self.path, os.pread, self.descriptor, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class CachedShard:
    """The copy of a remote tar, opened for each read so that eviction frees its space at once.

    Raises:
        DataError: it cannot be read or copied.
    """

    def __init__(self, remote: RemoteShard):
        self.remote, self.path, self.size = remote, remote.path, remote.size
        self.samples = self.wait_and_read(read_table, remote.index)

    def wait_and_read(self, read: Callable[Args, Result], *args: Args.args, **options: Args.kwargs) -> Result:
        while True:
            try:
                return read(*args, **options)
            except FileNotFoundError:
                self.remote.cache.wait_for(self.remote)

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes from the tar."""
        return retry_read(self.path, self.wait_and_read, self.read_once, offset, size)

    def read_once(self, offset: int, size: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


def max_open_shards() -> int:
    """Return how many shards a source may keep open: an eighth of this process's limit of open files.

    The soft limit (256 on macOS, mostly 1,024 on Linux) is first raised as far as the hard one allows.
    """
    soft, hard = (
        OPEN_FILES if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    if soft < (most := min(hard, OPEN_FILES)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(1, min(OPEN_SHARDS, max(soft, most) // 8))
