"""The order of training: a pure function from position to sample.

A position counts samples from the start of training.  The plan maps it to a source, an epoch and a sample, from the
seed alone; workers, ranks and batch sizes slice the sequence and do not change it.
"""

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import count
from typing import NamedTuple

import numpy as np

BLOCK = 1000  # positions; each block has the exact proportions of a mix


class Place(NamedTuple):
    """The sample at a position."""

    source: int  # which of the data sources
    epoch: int  # of that source
    sample: int  # id, from 0, in shard order; the ids of the second source follow those of the first


class Window(NamedTuple):
    """A shuffle window and the shards that it reads."""

    start: int  # first position
    shards: list[int]  # in the order of the sources' shards


def digest(*words: int | str) -> int:
    """Return a 64-bit hash, the same on every machine and Python version."""
    return int.from_bytes(blake2b(repr(words).encode(), digest_size=8).digest(), "little")


def permutation(size: int, *words: int | str) -> np.ndarray:
    """Return a permutation of ``range(size)`` seeded by ``words``.

    Philox's raw stream is fixed by NumPy's compatibility policy; ``Generator.permutation`` is not.
    """
    return np.argsort(np.random.Philox(key=digest(*words)).random_raw(size), kind="stable")


class Plan:
    """Position to sample, for one source.

    In each epoch the shards are permuted and concatenated, the sequence is cut into windows, and each window is
    permuted.  Every sample comes exactly once an epoch, and a window reads few shards.

    Args:
        sizes: samples of each shard.
        seed: of the order.
        window: samples per window (``data.shuffle_window``).
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, seed: int, window: int):
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.seed, self.window = seed, window
        self.samples = int(self.sizes.sum())  # of an epoch
        self.first = np.cumsum(self.sizes) - self.sizes  # (shards,), id of each shard's first sample
        self.shard_order = lru_cache(maxsize=2)(self.draw_shard_order)
        self.window_order = lru_cache(maxsize=2)(self.draw_window_order)

    @property
    def id(self) -> str:
        return f"{self.seed} {self.window} {self.samples}"

    @property
    def largest_batch(self) -> int:
        """Size of the largest batch without a repeated picture."""
        return self.samples

    def __reduce__(self) -> tuple[type["Plan"], tuple[np.ndarray, int, int]]:
        return Plan, (self.sizes, self.seed, self.window)

    def __getitem__(self, position: int) -> Place:
        epoch, index = divmod(position, self.samples)
        return self.at(epoch, index)

    def substitute(self, position: int, attempt: int) -> Place:
        """Return the replacement of a bad sample: one of the same window, chosen by a hash."""
        epoch, index = divmod(position, self.samples)
        start = index - index % self.window
        width = min(self.window, self.samples - start)
        return self.at(epoch, start + digest(self.seed, "substitute", position, attempt) % width)

    def at(self, epoch: int, index: int) -> Place:
        window, offset = divmod(index, self.window)
        line = window * self.window + int(self.window_order(epoch, window)[offset])  # index in the permuted shards
        shards, ends = self.shard_order(epoch)
        shard = int(np.searchsorted(ends, line, side="right"))
        return Place(0, epoch, int(self.first[shards[shard]] + line - (ends[shard] - self.sizes[shards[shard]])))

    def windows(self, position: int) -> Iterator[Window]:
        """Yield windows endlessly, starting with the one of ``position``."""
        begun, index = divmod(position, self.samples)
        first = index // self.window
        for epoch in count(begun):
            shards, ends = self.shard_order(epoch)
            for start in range(first * self.window, self.samples, self.window):
                a, b = np.searchsorted(ends, [start, min(start + self.window, self.samples) - 1], side="right")
                yield Window(epoch * self.samples + start, [int(s) for s in shards[a : b + 1] if self.sizes[s]])
            first = 0

    def draw_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the permuted shards of an epoch and their cumulative sizes."""
        order = permutation(len(self.sizes), self.seed, "shards", epoch)
        return order, np.cumsum(self.sizes[order])

    def draw_window_order(self, epoch: int, window: int) -> np.ndarray:
        width = min(self.window, self.samples - window * self.window)
        return permutation(width, self.seed, "window", epoch, window)


class MixPlan:
    """Position to sample, for several sources with exact shares in each block of 1,000 positions.

    Args:
        sizes: samples of each shard, for each source.
        weights: of the sources; their proportions count.
        seed: of the order.
        window: samples of a window, in each source.

    Raises:
        ValueError: a weight gives a source no place among a thousand.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], weights: Sequence[float], seed: int, window: int):
        self.sizes, self.weights, self.seed, self.window = sizes, weights, seed, window
        seeds = [seed, *(digest(seed, "source", source) for source in range(1, len(sizes)))]
        self.plans = [Plan(part, own, window) for part, own in zip(sizes, seeds, strict=True)]
        self.shares = shares(weights)
        self.samples = sum(part.samples for part in self.plans)  # of an epoch
        self.first_sample = np.cumsum([0, *(part.samples for part in self.plans)]).tolist()
        self.first_shard = np.cumsum([0, *map(len, sizes)]).tolist()
        self.block = lru_cache(maxsize=4)(self.draw_block)

    @property
    def largest_batch(self) -> int:
        """Size of the largest batch without a repeated picture of any source."""
        return min(part.samples * BLOCK // share for part, share in zip(self.plans, self.shares, strict=True))

    @property
    def id(self) -> str:
        return " ".join([str(self.shares), *(part.id for part in self.plans)])

    def __reduce__(self) -> tuple[type["MixPlan"], tuple[Sequence[Sequence[int]], Sequence[float], int, int]]:
        return MixPlan, (self.sizes, self.weights, self.seed, self.window)

    def __getitem__(self, position: int) -> Place:
        source, index = self.source_position(position)
        return self.renumber(source, self.plans[source][index])

    def substitute(self, position: int, attempt: int) -> Place:
        """Return the replacement of a bad sample, from the same source and window."""
        source, index = self.source_position(position)
        return self.renumber(source, self.plans[source].substitute(index, attempt))

    def renumber(self, source: int, place: Place) -> Place:
        return Place(source, place.epoch, place.sample + self.first_sample[source])

    def source_position(self, position: int) -> tuple[int, int]:
        """Return the source at a position, and the position in that source's own plan."""
        block, offset = divmod(position, BLOCK)
        source = int(self.block(block)[offset])
        return source, self.count_before(source, position)

    def count_before(self, source: int, position: int) -> int:
        """Return how many earlier positions belong to a source."""
        block, offset = divmod(position, BLOCK)
        return block * self.shares[source] + int((self.block(block)[:offset] == source).sum())

    def draw_block(self, number: int) -> np.ndarray:
        """Return the source at each position of a block, (1000,)."""
        return np.repeat(np.arange(len(self.plans)), self.shares)[permutation(BLOCK, self.seed, "mix", number)]

    def windows(self, position: int) -> Iterator[Window]:
        """Yield the windows of all sources endlessly, in order of their start."""
        return heapq.merge(*(self.source_windows(source, position) for source in range(len(self.plans))))

    def source_windows(self, source: int, position: int) -> Iterator[Window]:
        for window in self.plans[source].windows(self.count_before(source, position)):
            number, rank = divmod(window.start, self.shares[source])
            start = number * BLOCK + int(np.flatnonzero(self.block(number) == source)[rank])
            yield Window(start, [shard + self.first_shard[source] for shard in window.shards])


def shares(weights: Sequence[float]) -> list[int]:
    """Return how many of 1,000 positions each weight gets; the largest remainders are rounded up.

    Raises:
        ValueError: a weight gets none.
    """
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    for source in sorted(range(len(exact)), key=lambda s: whole[s] - exact[s])[: BLOCK - sum(whole)]:
        whole[source] += 1
    if min(whole) < 1:
        raise ValueError(f"weights={list(weights)}: each needs at least a thousandth of their sum")
    return whole
