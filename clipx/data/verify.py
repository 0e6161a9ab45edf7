"""Shards that are there already: their index, what img2dataset says of them, and every sample read once."""

import json
import logging
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clipx.data.catalogue import open_catalogue
from clipx.data.index import published
from clipx.data.layouts import Tars
from clipx.data.processes import spread
from clipx.data.report import write
from clipx.data.sample import BadSample
from clipx.data.shards import PICTURES, Shards, told_of_cuts

logger = logging.getLogger("clipx")

SHOWN = 5                   # bad samples that the console names


def index(tars: Tars) -> None:
    """Make the indexes of shards and tell what they hold.

    Raises:
        DataError: one is not a tar.
    """
    catalogue = open_catalogue(tars.shards, tars.index_dir)
    rows = catalogue.rows
    logger.info("indexed   %s samples in %s shards, %.1f MB", f"{rows['samples'].sum():,}", f"{len(rows):,}",
                rows["bytes"].sum() / 1e6)
    for told in told_of_cuts(catalogue):
        logger.warning(told)
    for shard, found in zip(tars.shards, rows["samples"].tolist(), strict=True):
        counted = published(shard)
        if counted not in (None, found):
            logger.warning("%s holds %d samples, but %s_stats.json says %d", shard, found, shard.stem, counted)


def verify(tars: Tars, listing: Path, workers: int) -> int:
    """Read and decode every sample once; gives back how many are bad.

    Args:
        tars: indexed shards.
        listing: file for one line of JSON for each bad sample: shard, key, offset of the picture in the tar (of the
            sample's first member where it has none), reason.
        workers: processes; 0 works in this one.
    """
    work = partial(verify_shard, root=tars.root, caption_key=tars.caption_key, index_dir=tars.index_dir)
    bad: list[dict[str, Any]] = []
    total = int(open_catalogue(tars.shards, tars.index_dir).rows["samples"].sum())
    bar = tqdm(total=total, unit="sample", desc="verify", disable=None)
    with bar, closing(spread(work, tars.shards, workers)) as done:
        for samples, found in done:
            bad += found
            bar.update(samples)
    bad.sort(key=lambda row: (row["shard"], row["offset"]))
    listing.parent.mkdir(parents=True, exist_ok=True)
    write(listing, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad))
    for row in bad[:SHOWN]:
        logger.warning("%(shard)s, %(key)s, byte %(offset)s: %(reason)s", row)
    logger.info("verified  %s samples, %s of them bad%s", f"{total:,}", f"{len(bad):,}",
                f"; {listing} lists them" if bad else "")
    return len(bad)


def verify_shard(shard: Path, root: Path, caption_key: str | None, index_dir: Path) -> tuple[int, list[dict[str, Any]]]:
    """How many samples a shard has, and those of them that are bad."""
    from clipx.data.images import decode  # brings torch

    source = Shards(open_catalogue([shard], index_dir), caption_key, index_dir)
    bad = []
    for sample in range(sum(source.sizes)):
        try:
            decode(source.read(sample).picture)
        except BadSample as error:
            _, row = source.row(sample)
            bad.append({"shard": shard.relative_to(root).as_posix(), "key": row["__key__"].decode("utf-8", "replace"),
                        "offset": where(row), "reason": str(error)})
    return sum(source.sizes), bad


def where(row: np.void) -> int:
    """The offset of a sample's picture, or else of its first member."""
    offsets = {kind: int(row[kind][0]) for kind in row.dtype.names[1:] if row[kind][0]}
    pictures = [offsets[kind] for kind in PICTURES if kind in offsets]
    return (pictures or sorted(offsets.values()) or [0])[0]
