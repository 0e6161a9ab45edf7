"""Index and verify existing shards."""

import json
import logging
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipx.data.catalogue import open_catalogue
from clipx.data.faults import faults, lost_samples, totals
from clipx.data.prepare.layouts import Tars
from clipx.data.prepare.processes import run_tasks
from clipx.data.prepare.report import write
from clipx.data.sample import MIN_BAD_LIMIT, BadSample, Data
from clipx.data.shards import IMAGE_KINDS, Shards
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import KEY, byte_ranges, published

logger = logging.getLogger("clipx")

SHOWN = 5  # bad samples shown on the console


def index(tars: Tars, bad: int = 0) -> None:
    """Index shards and log what they hold.

    Args:
        tars: the shards.
        bad: number of bad samples that ``verify`` found.

    Raises:
        DataError: one is not a tar, or training would end at this number of bad samples.
    """
    catalogue = open_catalogue(tars.shards, tars.index_dir)
    rows = catalogue.rows
    logger.info(
        "indexed   %s samples in %s shards, %.1f MB",
        f"{rows['samples'].sum():,}",
        f"{len(rows):,}",
        rows["bytes"].sum() / 1e6,
    )
    found, total = list(faults(catalogue)), int(totals(catalogue).sum())
    for _, fault in found:
        logger.warning(fault)
    bad = max(bad + sum(lost_samples(catalogue).values()), sum(count for count, _ in found))
    if bad > max(MIN_BAD_LIMIT, int(Data.max_skipped * total)):
        raise DataError(
            f"{bad:,} of the {total:,} samples in {tars.root} cannot be used, but training tolerates "
            f"{Data.max_skipped:.0%} (data.max_skipped); pack them again, or set data.max_skipped to train without them"
        )
    for shard, samples in zip(tars.shards, rows["samples"].tolist(), strict=True):
        counted = published(shard)
        if counted not in (None, samples):
            logger.warning("%s holds %d samples, but %s_stats.json says %d", shard, samples, shard.stem, counted)


def verify(tars: Tars, listing: Path, workers: int) -> tuple[Tars, int]:
    """Read and decode every sample once.

    Args:
        tars: the shards.
        listing: JSON-lines file of bad samples: shard, key, offset of the picture in the tar (or of the first member),
            reason; files that are not complete tars have no key.
        workers: processes; 0 works in this process.

    Returns:
        The shards that are complete tars, and the number of bad samples in them.

    Raises:
        DataError: none of them is a tar.
    """
    work = partial(verify_shard, root=tars.root, caption_key=tars.caption_key, index_dir=tars.index_dir)
    bad: list[dict[str, Any]] = []
    total = 0
    bar = tqdm(total=len(tars.shards), unit="shard", desc="verify", disable=None)
    with bar, closing(run_tasks(work, tars.shards, workers)) as done:
        for samples, found in done:
            total += samples
            bad += found
            bar.update()
    bad.sort(key=lambda row: (row["shard"], row["offset"]))
    listing.parent.mkdir(parents=True, exist_ok=True)
    write(listing, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad))
    broken = {row["shard"]: row["reason"] for row in bad if row["key"] is None}
    unusable = [row for row in bad if row["key"] is not None]
    for reason in broken.values():
        logger.warning(reason)
    for row in unusable[:SHOWN]:
        logger.warning("%(shard)s, %(key)s, byte %(offset)s: %(reason)s", row)
    logger.info(
        "verified  %s samples, %s of them bad%s",
        f"{total:,}",
        f"{len(unusable):,}",
        f"; {listing} lists them" if unusable else "",
    )
    whole = [shard for shard in tars.shards if shard.relative_to(tars.root).as_posix() not in broken]
    if not whole:
        raise DataError(f"{tars.root} holds no readable shard; see {listing}")
    return tars._replace(shards=whole), len(unusable)


def verify_shard(shard: Path, root: Path, caption_key: str | None, index_dir: Path) -> tuple[int, list[dict[str, Any]]]:
    """Return the number of samples in a shard, and its bad samples or what is wrong with the tar."""
    from clipx.data.images import decode  # brings torch

    name = shard.relative_to(root).as_posix()
    try:
        source = Shards(open_catalogue([shard], index_dir), caption_key)
    except DataError as error:
        return 0, [{"shard": name, "key": None, "offset": 0, "reason": str(error)}]
    samples, bad = sum(source.sizes), []
    for sample in range(samples):
        try:
            decode(source.read(sample).picture)
        except BadSample as error:
            _, row = source.row(sample)
            key = row[KEY].decode("utf-8", "replace")
            ranges = byte_ranges(row)
            picture = next((ranges[kind] for kind in IMAGE_KINDS if kind in ranges), None)
            offset, _ = picture or min(ranges.values(), default=(0, 0))
            bad.append({"shard": name, "key": key, "offset": offset, "reason": str(error)})
    return samples, bad
