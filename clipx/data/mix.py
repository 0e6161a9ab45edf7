"""Several sources at once, in exact proportions."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b

import numpy as np
from typing_extensions import Unpack

from clipx.data.origin import Origin, origin_of
from clipx.data.plan import MixPlan
from clipx.data.remote.cache import RemoteShard
from clipx.data.remote.prefetch import remotes_of
from clipx.data.sample import Data, DataOptions, Sample, Source, captions_of
from clipx.data.tar.headers import DataError


class Chain:
    """Concatenation of sources."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        self.sizes = [size for source in sources for size in source.sizes]
        self.ends = np.cumsum([sum(source.sizes) for source in sources])
        self.id = blake2b("\n".join(source.id for source in sources).encode(), digest_size=16).hexdigest()

    def find(self, sample: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self.ends, sample, side="right"))
        before = int(self.ends[number - 1]) if number else 0
        return self.sources[number], sample - before

    @property
    def remotes(self) -> dict[int, RemoteShard]:
        firsts = np.cumsum([0, *(len(source.sizes) for source in self.sources)]).tolist()
        return {
            first + number: remote
            for first, source in zip(firsts, self.sources, strict=False)
            for number, remote in remotes_of(source).items()
        }

    def locate(self, sample: int) -> str:
        source, own = self.find(sample)
        return source.locate(own)

    def read(self, sample: int) -> Sample:
        source, own = self.find(sample)
        return source.read(own)

    def read_captions(self, sample: int) -> list[str]:
        return captions_of(*self.find(sample))

    def origin(self, sample: int) -> Origin:
        return origin_of(*self.find(sample))


@dataclass(frozen=True)
class Mix(Data):
    """Data of several sources."""

    sizes: Sequence[Sequence[int]] = ()  # samples of each shard, for each source
    weights: Sequence[float] = ()
    names: Sequence[str] = ()  # of the sources

    def plan(self, seed: int) -> MixPlan:
        return MixPlan(self.sizes, self.weights, seed, self.shuffle_window)


def source_names(data: Data) -> Sequence[str]:
    """The names of the sources of a mix; empty for other data."""
    return data.names if isinstance(data, Mix) else ()


def open_mix(sources: dict[str, Data], weights: dict[str, float], **options: Unpack[DataOptions]) -> Mix:
    """Open training data from several sources; each has its own validation set, the first as ``val/...``.

    Args:
        sources: by name; another order is another run.
        weights: by name; each 1,000 samples have the exact proportions.
        options: as in ``Data``, for all sources; a source's own ``max_skipped`` bounds its lost samples.

    Raises:
        ValueError: the names differ, or a weight is too small.
        DataError: a source sets a key that only the mix can set.
    """
    if sources.keys() != weights.keys() or min(weights.values(), default=0) <= 0:
        raise ValueError(f"weights={weights}: expected a number above 0 for each of {', '.join(sources)}")
    for name, data in sources.items():
        for field in fields(Data):
            own = getattr(data, field.name)
            own = tuple(own) if isinstance(own, list) else own
            if field.name in DataOptions.__annotations__.keys() - {"max_skipped"} and own != field.default:
                raise DataError(f"data.sources.{name}.{field.name} is not used in a mix; set data.{field.name} for all")
    train = Chain([data.train for data in sources.values()])
    vals = [(name, data.val) for name, data in sources.items() if data.val is not None]
    mix = Mix(
        train,
        vals[0][1] if vals else None,
        **options,
        further=dict(vals[1:]),
        notes=[f"{name}: {note}" for name, data in sources.items() for note in data.notes],
        lost={shard: count for data in sources.values() for shard, count in data.lost.items()},
        sizes=[data.train.sizes for data in sources.values()],
        weights=[weights[name] for name in sources],
        names=[*sources],
    )
    mix.plan(seed=0)  # fail now if a weight is too small
    return mix
