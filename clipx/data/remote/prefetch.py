"""Copy remote shards ahead of need, in the plan's order."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from multiprocessing.pool import ThreadPool
from threading import Event
from typing import Protocol, runtime_checkable

from clipx.data.files import write_atomic
from clipx.data.plan import MixPlan, Plan, Window
from clipx.data.remote import stores
from clipx.data.remote.cache import MAX_PARALLEL, RemoteShard, counts
from clipx.data.sample import Source
from clipx.data.tar.headers import DataError

logger = logging.getLogger("clipx")

AHEAD = 64  # most windows to prefetch
CHECKED = 4096  # windows whose size is checked before a run starts


@runtime_checkable
class RemoteSource(Protocol):
    """A source that has shards on servers."""

    @property
    def remotes(self) -> Mapping[int, RemoteShard]:
        """These shards, by number."""


def remotes_of(source: Source) -> Mapping[int, RemoteShard]:
    """Return the remote shards of a source, by number; most sources have none."""
    return source.remotes if isinstance(source, RemoteSource) else {}


class Prefetcher:
    """Context manager that copies the shards of a plan ahead of a position.

    Args:
        remotes: remote shards by number; without any, this is a no-op.
        plan: the order of all shards; None if none is remote.
        position: of the next sample to read; the reader keeps it up to date.
        reach: number of positions that may be read before ``position`` is updated.
        fill: whether this process copies; others wait.
    """

    def __init__(
        self, remotes: Mapping[int, RemoteShard], plan: Plan | MixPlan | None, position: int, reach: int, fill: bool
    ):
        self.remotes, self.plan, self.position, self.reach = remotes, plan, position, reach
        self.caches = list(dict.fromkeys(remote.cache for remote in remotes.values()))  # one for each source
        self.kept = [remote for cache in self.caches for remote in cache.kept]
        self.distinct = len({*self.kept, *remotes.values()})
        self.fills = fill and bool(remotes)
        self.stopped, self.stack = Event(), ExitStack()

    def __enter__(self) -> "Prefetcher":
        if self.fills:
            if len({(cache.directory, cache.limit) for cache in self.caches}) > 1:
                raise DataError(
                    "the sources of a mix share one cache; set the same data.sources.NAME.cache and cache_gb for all"
                )
            self.check_all_fit()
            self.stack.enter_context(self.caches[0].locked())
            for remote in self.remotes.values():
                if remote.path.exists() and not (remote.is_cached() and counts(remote.index) == remote.samples):
                    remote.path.unlink()  # outdated
        for cache in self.caches:
            cache.filled = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for cache in self.caches:
            cache.filled = False
        if self.fills and not self.caches[0].failed.exists():
            self.report_failure("the process that copies shards has ended")  # to workers that still wait
        self.stack.close()

    def start(self) -> None:
        """Start to copy; call it after forking, as children would inherit the threads' locks."""
        if self.fills:
            pool = self.stack.enter_context(ThreadPool(1 + MAX_PARALLEL))  # daemons: no wait at exit
            job = pool.apply_async(self.fill, (pool,), error_callback=self.fail)
            self.stack.callback(job.wait, stores.PAUSE + MAX_PARALLEL * stores.GRACE)

    def fill(self, pool: ThreadPool) -> None:
        while not self.stopped.is_set():
            wanted = self.wanted(self.position)
            missing = [remote for remote in wanted if not remote.is_cached()]
            if missing:
                self.caches[0].fetch(missing[:MAX_PARALLEL], wanted, pool, self.stopped)
            else:
                self.stopped.wait(stores.PAUSE)

    def fail(self, error: BaseException) -> None:
        """Handle an error in ``fill``."""
        if self.stopped.is_set():
            return
        if not isinstance(error, DataError):
            logger.error("the thread that copies shards failed", exc_info=error)
        self.report_failure(str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}")

    def report_failure(self, why: str) -> None:
        """Write the reason to the file ``failed`` for processes that wait."""
        write_atomic(self.caches[0].failed, why.encode())

    def wanted(self, position: int) -> list[RemoteShard]:
        """Return the shards to keep, the soonest needed first: those of the next windows that fit."""
        self.check_fits(position)
        found = dict.fromkeys(self.kept)
        room = self.caches[0].limit - sum(remote.size for remote in found)
        for window in islice(self.windows(position), AHEAD):
            for remote in self.remotes_of(window):
                if remote not in found:
                    room -= remote.size
                    if room < 0:
                        return list(found)
                    found[remote] = None
        return list(found)

    def need(self, position: int) -> int:
        """Return the bytes of all shards read before the next update of the position, and of pinned ones."""
        found = set(self.kept)
        for window in self.windows(position):
            if window.start >= position + self.reach or len(found) == self.distinct:
                break  # a small set repeats many times in one reach
            found.update(self.remotes_of(window))
        return sum(remote.size for remote in found)

    def check_fits(self, *positions: int) -> None:
        """Check that the shards needed at some positions fit.

        Raises:
            DataError: they do not.
        """
        need = max(map(self.need, positions))
        if need > self.caches[0].limit:
            raise self.caches[0].too_small(need, "two windows of shards (data.shuffle_window) and those of validation")

    def check_all_fit(self) -> None:
        """Check that each two consecutive windows fit, for the first ``CHECKED`` ones.

        Raises:
            DataError: they do not.
        """
        if not self.remotes:
            return
        windows = islice(self.windows(self.position), CHECKED)
        self.check_fits(*(max(self.position, window.start - 1) for window in windows))

    def windows(self, position: int) -> Iterator[Window]:
        assert self.plan is not None
        return self.plan.windows(position)

    def remotes_of(self, window: Window) -> list[RemoteShard]:
        return [self.remotes[number] for number in window.shards if number in self.remotes]
