"""The embedded data set: emoji of several vendors, with their names. See LICENSES.md in this folder."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from typing_extensions import Unpack

from clipx.data.sample import Data, DataOptions, KeyedSource, Source, Subset
from clipx.data.shards import Shards, open_shards

HERE = Path(__file__).parent
THINGS = HERE / "things.txt"  # all names, one per line

House = Literal["noto", "twemoji", "fluent"]  # who drew it; samples are named HOUSE-CODE


def open_emoji(without: Sequence[House] = (), **options: Unpack[DataOptions]) -> Data:
    """Open the embedded shards.

    Args:
        without: vendors to leave out of training; the held-out pictures of each are a validation set of that name.
        options: as in ``Data``.

    Raises:
        ValueError: no vendor is left.
    """
    data = open_shards(str(HERE), **options)
    if not without:
        return data
    kept = set(get_args(House)) - set(without)
    if not kept:
        raise ValueError(f"without={list(without)} leaves nothing to train on; leave out at most two")
    train, val = data.train, data.val
    assert isinstance(train, Shards) and isinstance(val, Shards)
    further: dict[str, Source] = {house: select(val, [house]) for house in dict.fromkeys(without)}
    return replace(data, train=select(train, kept), val=select(val, kept), further=further)


def select(source: KeyedSource, houses: Collection[str]) -> Subset:
    """The pictures of some vendors."""
    keys = [key.decode() for shard in range(len(source.sizes)) for key in source.keys(shard).tolist()]
    return Subset(source, np.flatnonzero([key.partition("-")[0] in houses for key in keys]))
