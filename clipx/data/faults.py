"""Faults that the indexes of shards reveal: cut short, empty, out of order."""

import logging
import math
import shlex
from collections.abc import Iterator

import numpy as np

from clipx.data.catalogue import Catalogue
from clipx.data.sample import Data
from clipx.data.tar.headers import DataError

logger = logging.getLogger("clipx")


def totals(catalogue: Catalogue) -> np.ndarray:
    """Return the number of samples of each shard when it was complete, (shards,); the mean for an empty file."""
    rows = catalogue.rows
    known = rows["total"] > 0
    mean = round(rows["total"][known].mean()) if known.any() else 0
    return np.where((rows["bytes"] == 0) & ~known, mean, rows["total"])


def lost_samples(catalogue: Catalogue) -> dict[str, int]:
    """Return the number of lost samples of each shard that is cut short."""
    after = totals(catalogue) - catalogue.rows["samples"]
    return {catalogue.shards[number].name: int(after[number]) for number in np.flatnonzero(after)}


def faults(catalogue: Catalogue) -> Iterator[tuple[int, str]]:
    """Yield the number of unusable samples of each faulty shard, and a message."""
    for shard, row, total in zip(catalogue.shards, catalogue.rows, totals(catalogue).tolist(), strict=True):
        readable = int(row["readable"])
        if row["bytes"] == 0:
            yield total, f"{shard} is empty (0 bytes); about {total:,} samples are lost; fetch or pack it again"
        elif row["cut"] and readable < total:
            yield (
                total - readable,
                (f"{shard} is cut short: {readable:,} of its {total:,} samples can be read; pack it again"),
            )
        elif row["cut"]:
            yield 0, f"{shard} has no end mark and may be cut short; its {total:,} samples are used"
        if row["parts"]:
            yield (
                int(row["parts"]),
                (
                    f"{shard}: the members of a sample are not adjacent, so {row['parts']:,} of its {row['samples']:,} "
                    "samples are incomplete; pack it again sorted by name "
                    f"(mkdir x && tar -xf {shlex.quote(str(shard))} "
                    "-C x && tar --sort=name -cf NEW.tar -C x .)"
                ),
            )


def check_faults(catalogue: Catalogue, data: Data) -> None:
    """Warn about each faulty shard.

    Raises:
        ValueError: more samples are unusable than ``max_skipped`` allows.
        DataError: there are no samples.
    """
    if not catalogue.rows["readable"].any():
        raise DataError(f"there are no samples in the shards, such as {catalogue.shards[0]}")
    found, total = list(faults(catalogue)), int(totals(catalogue).sum())
    bad = sum(count for count, _ in found)
    if bad > data.bad_limit:
        _, worst = max(found)
        share = math.ceil(1000 * bad / total) / 1000
        without = f", or set {share} to train without them" if share < 1 else ""
        raise ValueError(f"max_skipped={data.max_skipped}: {worst}{without}")
    for _, fault in found:
        logger.warning(fault)
