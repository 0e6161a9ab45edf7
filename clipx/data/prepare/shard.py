"""Write one shard of prepared samples: a tar, its index, and a report."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from clipx.data.files import WRITING
from clipx.data.prepare.caption_rules import CaptionRules
from clipx.data.prepare.download import Download
from clipx.data.prepare.encode import encode
from clipx.data.prepare.layouts import Item
from clipx.data.prepare.pictures import encode_all
from clipx.data.prepare.report import write
from clipx.data.sample import BadSample
from clipx.data.tar.index import make_index


@dataclass(frozen=True)
class Packing:
    """How to pack items into shards; see conf/prepare.yaml."""

    samples_per_shard: int
    shuffle: bool
    seed: int
    resize: int | None
    encode: str | None
    quality: int
    val: float
    min_size: int
    max_aspect: float | None
    min_words: int
    max_words: int | None
    languages: Sequence[str]
    drop_duplicates: bool
    verify: bool

    def caption_rules(self) -> CaptionRules:
        return CaptionRules(self.min_words, self.max_words, self.languages)


class Packed(NamedTuple):
    """Result of a task."""

    shard: Path
    items: int
    dropped: list[dict[str, str]] | None  # of a shard that is not written because it would be empty


class Task(NamedTuple):
    """One shard to pack."""

    shard: Path
    report: Path
    split: str
    numbers: list[int]  # of the items, in their source
    items: list[Item]


@dataclass
class Content:
    """What went into a shard, and what did not."""

    sides: Counter[int] = field(default_factory=Counter)  # pictures by short side, pixels
    words: Counter[int] = field(default_factory=Counter)  # captions by number of words
    bytes: int = 0  # of the pictures
    dropped: list[dict[str, str]] = field(default_factory=list)

    def report(self, size: int) -> dict[str, Any]:
        """The report of a shard of this size, bytes."""
        return {
            "samples": self.sides.total(),
            "captions": self.words.total(),
            "bytes": size,
            "short_side": self.sides,
            "caption_words": self.words,
            "dropped": self.dropped,
        }


def pack_shard(task: Task, root: Path, packing: Packing, download: Download) -> Packed:
    """Write one shard, its index and its report, unless it would be empty."""
    for directory in (task.shard.parent, task.report.parent):
        directory.mkdir(exist_ok=True)
    for left in task.shard.parent.glob(f"{task.shard.name}*"):
        left.unlink(missing_ok=True)  # of an interrupted run
    temporary = task.shard.with_name(f"{task.shard.name}{WRITING}{os.getpid()}")
    with temporary.open("wb") as file:
        content = write_samples(file, task, root, packing, download)
        file.flush()
        os.fsync(file.fileno())
    if not content.sides:
        temporary.unlink()
        return Packed(task.shard, len(task.items), content.dropped)
    os.replace(temporary, task.shard)
    make_index(task.shard, task.shard.parent)
    write(task.report, json.dumps(content.report(task.shard.stat().st_size)))
    return Packed(task.shard, len(task.items), None)


def survey_shard(task: Task, root: Path, packing: Packing, download: Download) -> tuple[str, dict[str, Any]]:
    """Return the split and the report of a shard, without writing anything."""
    with open(os.devnull, "wb") as file:
        content = write_samples(file, task, root, packing, download)
    return task.split, content.report(content.bytes)


def write_samples(file: BinaryIO, task: Task, root: Path, packing: Packing, download: Download) -> Content:
    """Write the usable samples of a task as a tar."""
    from webdataset import TarWriter  # brings torch

    content = Content()
    how = partial(
        encode,
        resize=packing.resize,
        wanted=packing.encode,
        quality=packing.quality,
        min_size=packing.min_size,
        max_aspect=packing.max_aspect,
        verify=packing.verify,
    )
    encoded = encode_all(task.items, root, packing.caption_rules(), how, download)
    with TarWriter(file, user="clipx", group="clipx", encoder=False, mtime=0) as tar:
        for number, item, ready in zip(task.numbers, task.items, encoded, strict=True):
            if isinstance(ready, BadSample):
                content.dropped.append({"split": task.split, "picture": str(item.picture), "reason": str(ready)})
                continue
            picture, captions = ready
            text = {
                "caption": captions,
                "height": picture.height,
                "name": str(item.picture),
                "width": picture.width,
            }
            json_file = json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")
            tar.write({"__key__": f"{number:09d}", picture.kind: picture.file, "json": json_file})
            content.bytes += len(picture.file)
            content.sides[min(picture.width, picture.height)] += 1
            content.words.update(len(caption.split()) for caption in captions)
    return content
