"""Existing shards as a layout, to choose from and to pack again."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from clipx.data.catalogue import open_catalogue
from clipx.data.faults import faults
from clipx.data.prepare.layouts import Item, Layout, Tars
from clipx.data.prepare.members import Member
from clipx.data.sample import BadSample
from clipx.data.shard_paths import split_by_name
from clipx.data.shards import Shards, checked_ranges, picture_range
from clipx.data.tar.index import KEY

logger = logging.getLogger("clipx")

Row = Mapping[str, str]  # of dropped.jsonl: split, picture, reason, and perhaps the picture that it is like


class Reason(NamedTuple):
    """Why a sample is left out."""

    text: str
    like: int | None = None  # the sample that it is like


class Pool(NamedTuple):
    """The samples of some shards."""

    root: Path
    items: dict[str, dict[int, Item]]  # by split and number in its source
    bad: list[Row]

    def layout(self, dropped: Mapping[int, Reason]) -> Layout:
        """What is left without some training samples, given by number."""
        train, rows = self.items.get("train", {}), []
        for sample, (text, like) in dropped.items():
            row = {"split": "train", "picture": str(train[sample].picture), "reason": text}
            rows.append(row if like is None else row | {"like": str(train[like].picture)})
        kept = {
            split: [item for sample, item in items.items() if split != "train" or sample not in dropped]
            for split, items in self.items.items()
        }
        return Layout(self.root, kept, left_out=[*self.bad, *rows])


def open_splits(tars: Tars) -> dict[str, Shards]:
    """Open the shards of each directory of a source as a split; those of its own directory are split by name.

    Raises:
        DataError: one is not a tar.
    """
    paths: dict[str, list[Path]] = {}
    train, val = split_by_name([shard for shard in tars.shards if shard.parent == tars.root])
    own = dict.fromkeys(train, "train") | dict.fromkeys(val, "val")
    for shard in tars.shards:
        paths.setdefault(own.get(shard, shard.parent.name), []).append(shard)
    sources = {split: Shards(open_catalogue(found, tars.index_dir), tars.caption_key) for split, found in paths.items()}
    for source in sources.values():
        for _, fault in faults(source.catalogue):
            logger.warning(fault)
    return sources


def read_pool(root: Path, sources: Mapping[str, Shards]) -> Pool:
    """Read the captions of all samples, and where their pictures are."""
    pool = Pool(root, {}, [])
    for split, source in sources.items():
        items = pool.items.setdefault(split, {})
        for sample in tqdm(range(sum(source.sizes)), f"read {split}", unit="sample", disable=None):
            tar, row = source.row(sample)
            file, key = tar.path.relative_to(root).as_posix(), row[KEY].decode("utf-8", "replace")
            try:
                member = Member(file, key, *picture_range(checked_ranges(tar, row)))
                items[sample] = Item(member, source.read_captions(sample))
            except BadSample as error:
                pool.bad.append({"split": split, "picture": f"{file}/{key}", "reason": str(error)})
    return pool
