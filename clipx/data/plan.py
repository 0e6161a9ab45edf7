"""The one order of training: which sample stands at which position, as arithmetic alone.

A position counts samples from the start of training and never ends.  The plan maps it to an epoch and a sample, a
pure function of the seed and the index: workers, ranks and batches cut the sequence, none of them changes it.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """What stands at a position."""

    source: int     # which of the data sources
    epoch: int      # of that source
    sample: int     # id in that source, from 0, in the order of its shards


def digest(*words: int | str) -> int:
    """A 64-bit hash of some words, the same on every machine and with every library."""
    return int.from_bytes(blake2b(repr(words).encode(), digest_size=8).digest(), "little")


def permutation(size: int, *words: int | str) -> np.ndarray:
    """The permutation of ``range(size)`` that belongs to some words.

    Philox's raw stream is fixed by NumPy's compatibility policy; ``Generator.permutation`` is not.
    """
    return np.argsort(np.random.Philox(key=digest(*words)).random_raw(size), kind="stable")


class Plan:
    """Position to sample, for one source.

    In each epoch the shards are permuted and laid end to end, the line is cut into windows, and each window is
    permuted.  Every sample stands exactly once in an epoch, and neighbours in the plan are near in few shards.

    Args:
        sizes: samples of each shard.
        seed: of the run.
        window: samples of a window (``data.shuffle_window``).
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int):
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.seed, self.window = seed, window
        self.samples = int(self.sizes.sum())                        # of an epoch
        self.first = np.cumsum(self.sizes) - self.sizes             # (shards,), id of each shard's first sample
        self.shard_order = lru_cache(maxsize=2)(self.shard_order)
        self.window_order = lru_cache(maxsize=2)(self.window_order)

    @property
    def id(self) -> str:
        return f"{self.seed} {self.window} {self.samples}"

    def __getstate__(self) -> dict:
        return {"sizes": self.sizes, "seed": self.seed, "window": self.window}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __getitem__(self, position: int) -> Place:
        epoch, index = divmod(position, self.samples)
        return self.at(epoch, index)

    def substitute(self, position: int, attempt: int) -> Place:
        """What stands in for a bad sample: one of the same window, chosen by a hash, so no neighbour comes twice."""
        epoch, index = divmod(position, self.samples)
        start = index - index % self.window
        width = min(self.window, self.samples - start)
        return self.at(epoch, start + digest(self.seed, "substitute", position, attempt) % width)

    def at(self, epoch: int, index: int) -> Place:
        window, offset = divmod(index, self.window)
        line = window * self.window + int(self.window_order(epoch, window)[offset])     # place in the line of shards
        shards, ends = self.shard_order(epoch)
        shard = int(np.searchsorted(ends, line, side="right"))
        return Place(0, epoch, int(self.first[shards[shard]] + line - (ends[shard] - self.sizes[shards[shard]])))

    def shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and where each of them ends in the line."""
        order = permutation(len(self.sizes), self.seed, "shards", epoch)
        return order, np.cumsum(self.sizes[order])

    def window_order(self, epoch: int, window: int) -> np.ndarray:
        width = min(self.window, self.samples - window * self.window)
        return permutation(width, self.seed, "window", epoch, window)
