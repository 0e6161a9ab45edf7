"""Detect lost ranks: each rank sends heartbeats and watches the next rank."""

import logging
import os
import secrets
import time
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread
from types import TracebackType

import torch.distributed as dist

from clipx.errors import UserError

logger = logging.getLogger("clipx")

POLL = 0.1  # seconds between two reads of the store
BEAT = 1.0  # seconds between two heartbeats
SILENT = 30.0  # seconds without a heartbeat after which a rank is lost
BEATS = 4  # heartbeats to wait for after a failure
GRACE = 10.0  # seconds for a step to fail by itself after a rank is lost; then the process exits
REMEDY = "rerun the same command to resume from the last checkpoint"
NO_STORE = f"rank 0 or its machine is lost: the distributed store does not respond; {REMEDY}"


def meet(store: dist.Store, rank: int, world_size: int) -> str:
    """Agree on a token that only the current ranks share.

    torchrun's store still has the keys from before a restart, so each rank writes a fresh token and rank 0 answers it
    with its own.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"here {rank}", own)
        while not (answer := read(store, f"answer {rank}")).startswith(own):
            time.sleep(POLL)
        token = answer.split()[1]
        store.set(f"met {rank}", token)
        return token
    waiting = set(range(1, world_size))
    while waiting:
        for other in waiting:
            store.set(f"answer {other}", f"{read(store, f'here {other}')} {own}")
        time.sleep(POLL)
        waiting = {other for other in waiting if read(store, f"met {other}") != own}
    return own


def read(store: dist.Store, key: str) -> str:
    """The value of a key; empty if it is not set."""
    return store.get(key).decode() if store.check([key]) else ""


class Watchdog:
    """End this rank, with an error that names the lost rank, within a minute of the loss; a context manager.

    A thread writes heartbeats to the store that all ranks share.  If the next rank falls silent, or a rank ends with an
    error, that is recorded there for all ranks.  A RuntimeError in the ``with`` block is then raised as the loss; a
    process that hangs in a collective is ended.

    Args:
        store: with its own connection.
        rank, world_size: of this process.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        store.set_timeout(timedelta(seconds=SILENT))
        self.stopped, self.thread = Event(), Thread(target=self.run, daemon=True)

    def __enter__(self) -> "Watchdog":
        self.store.set(f"beat {self.rank}", "0")
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and (why := self.find_lost()):  # a collective, most likely
            self.stopped.set()
            raise UserError(why) from error
        if error is not None:
            self.report_lost(f"rank {self.rank} failed: {str(error) or type(error).__name__}")
        self.stopped.set()

    def run(self) -> None:
        beat, seen, since = 0, "", time.monotonic()
        neighbour = (self.rank + 1) % self.world_size
        while not self.stopped.wait(BEAT):
            try:
                beat += 1
                self.store.set(f"beat {self.rank}", str(beat))
                now = self.heartbeat(neighbour)
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > SILENT:
                    self.report_lost(f"rank {neighbour} is lost: no heartbeat for {SILENT:.0f} s")
                lost = self.lost()
            except dist.DistError:
                lost = NO_STORE
            if lost and not self.stopped.wait(GRACE):
                logger.critical("%s", lost)
                os._exit(1)

    def heartbeat(self, rank: int) -> str:
        return read(self.store, f"beat {rank}")

    def lost(self) -> str:
        """Which rank is lost and why; empty if none is."""
        return read(self.store, "lost")

    def report_lost(self, why: str) -> None:
        """Report a loss to all ranks; the first report wins."""
        with suppress(dist.DistError):  # the other ranks notice by themselves
            self.store.compare_set("lost", "", f"{why}; {REMEDY}")

    def find_lost(self) -> str:
        """Which lost rank caused a failure here; waits for some heartbeats of all ranks."""
        try:
            before = [self.heartbeat(rank) for rank in range(self.world_size)]
            for _ in range(BEATS):
                if lost := self.lost():
                    return lost
                time.sleep(BEAT)
            for rank in range(self.world_size):
                if self.heartbeat(rank) == before[rank]:
                    self.report_lost(f"rank {rank} is lost: it ended without an error message")
            return self.lost()
        except dist.DistError:
            return NO_STORE

    def announce(self, event: str) -> None:
        """Release the ranks that wait for an event."""
        self.store.set(event, "1")

    def wait_for(self, event: str) -> None:
        """Wait for another rank to announce an event, without a time limit.

        Raises:
            UserError: a rank is lost.
        """
        while not self.store.check([event]):
            if lost := self.lost():
                raise UserError(lost)
            time.sleep(POLL)
