"""What a source of data is: samples by number, whatever they are kept in."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np

MOST_HELD_OUT = 5000        # pictures; more tell nothing more


class BadSample(Exception):
    """A sample cannot be used, for what its bytes show."""


class Sample(NamedTuple):
    """One picture and what is said of it."""

    key: str
    picture: bytes          # an encoded file
    captions: list[str]     # one or more


class Source(Protocol):
    """Samples in shards, read by number.  (A folder is one shard.)"""

    sizes: Sequence[int]    # samples of each shard
    id: str                 # changes when the data do

    def keys(self) -> np.ndarray:
        """(samples,) bytes; the key of every sample, in order."""

    def locate(self, sample: int) -> str:
        """File and key of a sample, for people."""

    def read(self, sample: int) -> Sample:
        """Raises BadSample where its bytes do not hold a picture and a caption, OSError where they cannot be read."""


@dataclass(frozen=True)
class Data:
    """What a data config makes: the two sources of a run, and how they are used."""

    train: Source
    val: Source | None
    shuffle_window: int                             # samples among which the plan shuffles
    max_skipped: float                              # share of the samples that may be bad
    crop: tuple[float, float] = (0.9, 1.0)          # share of a training picture's area that is kept, least and most


class Subset:
    """Some samples of a source, as a source.

    Args:
        source: the whole.
        chosen: (samples,) bool; which of them belong.
    """

    def __init__(self, source: Source, chosen: np.ndarray):
        self.source = source
        self.samples = np.flatnonzero(chosen)
        ends = np.cumsum(source.sizes)
        self.sizes = np.diff(np.searchsorted(self.samples, ends), prepend=0)
        self.id = f"{source.id} {blake2b(np.packbits(chosen).tobytes(), digest_size=8).hexdigest()}"

    def keys(self) -> np.ndarray:
        return self.source.keys()[self.samples]

    def locate(self, sample: int) -> str:
        return self.source.locate(int(self.samples[sample]))

    def read(self, sample: int) -> Sample:
        return self.source.read(int(self.samples[sample]))


def hold_out(source: Source, share: float) -> tuple[Source, Source | None]:
    """Split a source into training and validation by a hash of the keys alone.

    Args:
        source: all samples.
        share: of the pictures that validate, at most 5,000 of them; 0 holds out nothing.

    Returns:
        The training part, and the held-out part or None.
    """
    keys = source.keys()
    count = min(round(share * len(keys)), MOST_HELD_OUT)
    if count == 0:
        return source, None
    hashes = np.array([int.from_bytes(blake2b(key, digest_size=8).digest(), "little") for key in keys.tolist()], "u8")
    chosen = np.zeros(len(keys), bool)
    chosen[np.argsort(hashes, kind="stable")[:count]] = True
    return Subset(source, ~chosen), Subset(source, chosen)
