"""Write one shard of prepared samples: a tar, its index, and a report."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from clipx.data.files import WRITING
from clipx.data.prepare.download import Download
from clipx.data.prepare.encode import encode
from clipx.data.prepare.layouts import Item
from clipx.data.prepare.pictures import encode_all, non_empty_captions
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
    min_size: int
    drop_duplicates: bool
    verify: bool


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
    dropped: list[dict[str, str]] = field(default_factory=list)


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
    report = {
        "samples": len(task.items) - len(content.dropped),
        "captions": content.words.total(),
        "bytes": task.shard.stat().st_size,
        "short_side": content.sides,
        "caption_words": content.words,
        "dropped": content.dropped,
    }
    write(task.report, json.dumps(report))
    return Packed(task.shard, len(task.items), None)


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
        verify=packing.verify,
    )
    encoded = encode_all(task.items, root, how, download)
    with TarWriter(file, user="clipx", group="clipx", encoder=False, mtime=0) as tar:
        for number, item, picture in zip(task.numbers, task.items, encoded, strict=True):
            if isinstance(picture, BadSample):
                content.dropped.append({"split": task.split, "picture": str(item.picture), "reason": str(picture)})
                continue
            captions = non_empty_captions(item)
            text = {
                "caption": captions,
                "height": picture.height,
                "name": str(item.picture),
                "width": picture.width,
            }
            json_file = json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")
            tar.write({"__key__": f"{number:09d}", picture.kind: picture.file, "json": json_file})
            content.sides[min(picture.width, picture.height)] += 1
            content.words.update(len(caption.split()) for caption in captions)
    return content
