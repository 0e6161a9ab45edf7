"""Remote shards: copied ahead of need, in the plan's order, into a directory of bounded size.

A shard stands at ``data.cache/shards-PLACE/NAME`` as soon as it is whole, its index at ``data.index_dir/PLACE/
NAME.index``; PLACE is a hash of the URL's directory.  One process fills the directory.  Workers and other ranks look
for the file and wait; why it will not come is written into the file ``failed``.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import blake2b
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import mkstemp
from threading import Event
from typing import NamedTuple

from clipx.data.plan import MixPlan, Plan, Window
from clipx.data.remote import stores
from clipx.data.remote.stores import PIPE, download, persist
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import belongs, make_index, read_head

logger = logging.getLogger("clipx")

AT_ONCE = 4                         # copies side by side
AHEAD = 64                          # windows that are copied ahead, where there is room
CHECKED = 4096                      # windows whose size is known to fit before a run starts
LOOK = 0.02                         # seconds between two looks for a shard


class Remote(NamedTuple):
    """A shard on a server."""

    url: str
    path: Path                  # its copy
    index: Path                 # of its copy
    size: int | None = None     # bytes, as far as they are known
    samples: int | None = None

    def is_there(self) -> bool:
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
        self.kept: list[Remote] = []        # are never evicted
        self.filled = False                 # somebody copies what is missing
        self.failed = directory / "failed"

    def remote(self, url: str, size: int | None = None, samples: int | None = None) -> Remote:
        """Where the copy of a shard goes, and its index."""
        where, _, name = url.partition("?")[0].rpartition("/")          # a query may hold passwords and dates
        if url.startswith(PIPE):
            where, name = url, (re.findall(r"[\w.-]+\.tar", url) or ["pipe.tar"])[-1]
        place = blake2b(where.encode(), digest_size=8).hexdigest()
        index = self.index_dir / place / f"{name}.index"
        return Remote(url, self.directory / f"shards-{place}" / name, index, size, samples)

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

    def fetch(self, remotes: Sequence[Remote], wanted: Collection[Remote], pool: ThreadPool, stopped: Event) -> None:
        """Copy some shards, side by side, into room that others give which are not wanted.

        Raises:
            DataError: there is no room, or one cannot be copied.
        """
        self.make_room(sum(remote.size or 0 for remote in remotes), {remote.path for remote in (*wanted, *self.kept)})
        work = partial(copy, stopped=stopped, most=self.limit)
        persist(pool, work, {remote: remote.url for remote in remotes}, stopped)

    def fetch_now(self, remotes: Sequence[Remote]) -> None:
        """Copy those shards that are not there while everything waits."""
        missing = [remote for remote in remotes if not remote.is_there()]
        if missing:
            with self.locked(), ThreadPool(AT_ONCE) as pool:
                for start in range(0, len(missing), AT_ONCE):
                    self.fetch(missing[start : start + AT_ONCE], (), pool, Event())
                self.make_room(0, {remote.path for remote in self.kept})        # what came through a pipe had no size

    def keep(self, remotes: Sequence[Remote]) -> None:
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

    def wait_for(self, remote: Remote) -> None:
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


class Ahead:
    """Copies the shards of a plan ahead of a position, for as long as this context is open.

    Args:
        caches: of the sources; those of a mix share one directory.
        remotes: the remote shards, by number; without any of them nothing happens.
        plan: their order.
        position: of the first sample that will be read; set it to where reading has got.
        reach: how many positions may be read before the next one is set.
        fill: whether this process copies; others only wait.
    """

    def __init__(
        self, caches: Sequence[Cache], remotes: Mapping[int, Remote], plan: Plan | MixPlan | None, position: int,
        reach: int, fill: bool,
    ):
        self.caches, self.remotes, self.plan, self.position, self.reach = caches, remotes, plan, position, reach
        self.kept = [remote for cache in caches for remote in cache.kept]
        self.distinct = len({*self.kept, *remotes.values()})
        self.fills = fill and bool(remotes)
        self.stopped, self.stack = Event(), ExitStack()

    def __enter__(self) -> "Ahead":
        if self.fills:
            if len({(cache.directory, cache.limit) for cache in self.caches}) > 1:
                raise DataError("the sources of a mix share their cache; give all the same data.sources.NAME.cache and "
                                "cache_gb")
            self.hold_all()
            self.stack.enter_context(self.caches[0].locked())
            for remote in self.remotes.values():
                if remote.path.exists() and not (remote.is_there() and counts(remote.index) == remote.samples):
                    remote.path.unlink()        # of another time
        for cache in self.caches:
            cache.filled = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for cache in self.caches:
            cache.filled = False
        if self.fills and not self.caches[0].failed.exists():
            self.tell("the process that copies shards has ended")       # for workers that still wait
        self.stack.close()

    def start(self) -> None:
        """Begin to copy; what is forked later would have these threads' locks."""
        if self.fills:
            pool = self.stack.enter_context(ThreadPool(1 + AT_ONCE))        # daemons: nobody waits for them at exit
            job = pool.apply_async(self.fill, (pool,), error_callback=self.fail)
            self.stack.callback(job.wait, stores.PAUSE + AT_ONCE * stores.GRACE)

    def fill(self, pool: ThreadPool) -> None:
        while not self.stopped.is_set():
            wanted = self.wanted(self.position)
            missing = [remote for remote in wanted if not remote.is_there()]
            if missing:
                self.caches[0].fetch(missing[:AT_ONCE], wanted, pool, self.stopped)
            else:
                self.stopped.wait(stores.PAUSE)

    def fail(self, error: BaseException) -> None:
        """What becomes of an error in ``fill``."""
        if self.stopped.is_set():
            return
        if not isinstance(error, DataError):
            logger.error("the thread that copies shards has ended", exc_info=error)
        self.tell(str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}")

    def tell(self, why: str) -> None:
        """Tell all who wait that nothing more will come."""
        failed = self.caches[0].failed
        failed.with_suffix(".new").write_text(why)
        os.replace(failed.with_suffix(".new"), failed)

    def wanted(self, position: int) -> list[Remote]:
        """What should be there, the soonest needed first: of the windows to come as many shards as fit."""
        self.hold(position)
        found = dict.fromkeys(self.kept)
        room = self.caches[0].limit - sum(remote.size for remote in found)
        for window in islice(self.plan.windows(position), AHEAD):
            for remote in self.remotes_of(window):
                if remote not in found:
                    room -= remote.size
                    if room < 0:
                        return list(found)
                    found[remote] = None
        return list(found)

    def need(self, position: int) -> int:
        """Bytes of all that is read before the position is set again, and of what is kept."""
        found = set(self.kept)
        for window in self.plan.windows(position):
            if window.start >= position + self.reach or len(found) == self.distinct:
                break       # a small set goes round many times in one reach
            found.update(self.remotes_of(window))
        return sum(remote.size for remote in found)

    def hold(self, *positions: int) -> None:
        """See that what is needed at some positions fits.

        Raises:
            DataError: it does not.
        """
        need = max(map(self.need, positions))
        if need > self.caches[0].limit:
            raise self.caches[0].too_small(need, "two windows of shards (data.shuffle_window) and those of validation")

    def hold_all(self) -> None:
        """See that the windows of the run fit, each with the one behind it, as far as is looked.

        Raises:
            DataError: they do not.
        """
        if not self.remotes:
            return
        windows = islice(self.plan.windows(self.position), CHECKED)
        self.hold(*(max(self.position, window.start - 1) for window in windows))

    def remotes_of(self, window: Window) -> list[Remote]:
        return [self.remotes[number] for number in window.shards if number in self.remotes]


def copy(remote: Remote, stopped: Event, most: int) -> None:
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
