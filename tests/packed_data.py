"""Helpers for the tests of prepare: writing its inputs and reading its output."""

import json
from pathlib import Path

import webdataset

from clipx.data.sample import Sample
from clipx.data.shards import open_shards

SOURCES = {"csv": ["source.image=a", "source.caption=b"]}  # required arguments besides src


def save(path: Path, data: bytes | str | dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data) if isinstance(data, dict) else data
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def samples(out: Path, split: str = "train") -> list[Sample]:
    """All samples of a split, as training reads them."""
    source = open_shards(shards=f"{out}/{split}/*.tar", val=0).train
    return [source.read(number) for number in range(sum(source.sizes))]


def metadata_of(out: Path, split: str = "train") -> list[dict]:
    """The .json member of each sample, as read by webdataset."""
    return [
        json.loads(sample["json"])
        for shard in sorted((out / split).glob("*.tar"))
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
    ]


def read_tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def sizes(out: Path, split: str = "train") -> list[int]:
    return list(map(int, open_shards(shards=f"{out}/{split}/*.tar", val=0).train.sizes))


def dropped(out: Path) -> dict[str, str]:
    rows = map(json.loads, (out / "dropped.jsonl").read_text().splitlines())
    return {Path(row["picture"]).name: row["reason"] for row in rows}
