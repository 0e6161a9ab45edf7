"""Who is lost: each rank tells that it lives, and looks after the next one."""

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

LOOK = 0.1          # seconds between two looks for what another rank writes
BEAT = 1.0          # seconds between two signs of life
SILENT = 30.0       # seconds without one after which a rank counts as lost
BEATS = 4           # that a rank may leave out when something is known to have failed
GRACE = 10.0        # seconds that a step has to fail by itself when a rank is lost; then the process ends
GOES_ON = "the same command goes on from the last checkpoint"
NO_STORE = f"rank 0 or its machine is lost: the store of the ranks does not answer; {GOES_ON}"


def meet(store: dist.Store, rank: int, world_size: int) -> str:
    """A word that the ranks share which are here now.

    torchrun's store still holds what was written before a restart, so each rank brings a word that nobody has used,
    and rank 0 answers it with its own.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"here {rank}", own)
        while not (answer := read(store, f"answer {rank}")).startswith(own):
            time.sleep(LOOK)
        word = answer.split()[1]
        store.set(f"met {rank}", word)
        return word
    waiting = set(range(1, world_size))
    while waiting:
        for other in waiting:
            store.set(f"answer {other}", f"{read(store, f'here {other}')} {own}")
        time.sleep(LOOK)
        waiting = {other for other in waiting if read(store, f"met {other}") != own}
    return own


def read(store: dist.Store, key: str) -> str:
    """What stands under a key; empty where nothing does."""
    return store.get(key).decode() if store.check([key]) else ""


class Watchdog:
    """Ends a rank with an error that names the lost one, within a minute of its loss, for the length of a ``with``.

    A thread beats into a store that all ranks see.  When the rank next to it falls silent, or a rank ends with an
    error, that is written there once, and all read it.  What then fails in the ``with`` is told as the loss.  A
    process that hangs in a collective is ended.

    Args:
        store: of a connection of its own.
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
        if isinstance(error, RuntimeError) and (why := self.why()):         # a collective, most likely
            self.stopped.set()
            raise UserError(why) from error
        if error is not None:
            self.declare(f"rank {self.rank} has ended: {error or kind.__name__}")
        self.stopped.set()

    def run(self) -> None:
        beat, seen, since = 0, "", time.monotonic()
        after = (self.rank + 1) % self.world_size
        while not self.stopped.wait(BEAT):
            try:
                beat += 1
                self.store.set(f"beat {self.rank}", str(beat))
                now = self.sign(after)
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > SILENT:
                    self.declare(f"rank {after} is lost: it has given no sign of life for {SILENT:.0f} s")
                lost = self.lost()
            except dist.DistError:
                lost = NO_STORE
            if lost and not self.stopped.wait(GRACE):
                logger.critical("%s", lost)
                os._exit(1)

    def sign(self, rank: int) -> str:
        return read(self.store, f"beat {rank}")

    def lost(self) -> str:
        """Who is lost, and why; empty where nobody is."""
        return read(self.store, "lost")

    def declare(self, why: str) -> None:
        """Tell all; the first one holds."""
        with suppress(dist.DistError):      # then the others find out by themselves
            self.store.compare_set("lost", "", f"{why}; {GOES_ON}")

    def why(self) -> str:
        """Who is to blame for what has failed here; looks at all ranks for some beats."""
        try:
            before = [self.sign(rank) for rank in range(self.world_size)]
            for _ in range(BEATS):
                if lost := self.lost():
                    return lost
                time.sleep(BEAT)
            for rank in range(self.world_size):
                if self.sign(rank) == before[rank]:
                    self.declare(f"rank {rank} is lost: it has ended without a word")
            return self.lost()
        except dist.DistError:
            return NO_STORE

    def tell(self, turn: str) -> None:
        """Let those go on who wait for it."""
        self.store.set(turn, "1")

    def wait(self, turn: str) -> None:
        """Wait for another rank, however long it needs.

        Raises:
            UserError: a rank is lost.
        """
        while not self.store.check([turn]):
            if lost := self.lost():
                raise UserError(lost)
            time.sleep(LOOK)
