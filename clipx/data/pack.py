"""From pictures with captions to indexed shards: in a fixed order, each shard written whole or not at all.

A directory that is being packed holds prepare.json (what it means), the shards that are done, and .prepare/ with a
report of each; a shard without its report is made again.  At the end the reports become report.json.
"""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from urllib3 import PoolManager

from clipx.data.captions import checked
from clipx.data.download import Download, is_url
from clipx.data.encode import Encoded, encode, read_file
from clipx.data.index import make_index
from clipx.data.layouts import Item, Layout
from clipx.data.plan import permutation
from clipx.data.processes import spread
from clipx.data.report import WRITING, by_reason, listed, merge, write
from clipx.data.sample import BadSample
from clipx.data.tar import DataError
from clipx.errors import UserError

logger = logging.getLogger("clipx")

NOTE, REPORT, DROPPED, PARTS = "prepare.json", "report.json", "dropped.jsonl", ".prepare"


@dataclass(frozen=True)
class Packing:
    """How items become shards; conf/prepare.yaml says what each means."""

    samples_per_shard: int
    shuffle: bool
    seed: int
    resize: int | None
    encode: str | None
    quality: int
    min_size: int
    drop_duplicates: bool
    verify: bool


class Task(NamedTuple):
    """One shard to be."""

    shard: Path
    report: Path
    split: str
    numbers: list[int]      # of the items, in their source
    items: list[Item]


def pack(name: str, layout: Layout, packing: Packing, out: Path, workers: int) -> dict[str, Any]:
    """Write the shards of a layout, or those of them that are not there yet, and report.json.

    Args:
        name: what the names of the shards begin with.
        layout: the pictures and their captions.
        packing: how.
        out: where to, a new directory or one where the same was begun.
        workers: processes; 0 works in this one.

    Returns:
        The report.

    Raises:
        UserError: ``out`` holds something else, or nothing would stand in the shards.
    """
    every = [item for items in layout.splits.values() for item in items]
    if not any(item.captions for item in every):
        raise DataError(f"the source in {layout.root.absolute()} has no picture with a caption")
    if packing.drop_duplicates and any(is_url(item.picture) for item in every):
        raise UserError("drop_duplicates=true compares files, and these pictures are URLs; leave it out")
    claim(out, {"source": name, **asdict(packing), "items": fingerprint(layout.splits)})
    if (out / REPORT).exists():
        logger.info("%s is finished; nothing is changed", out)
        return json.loads((out / REPORT).read_bytes())
    splits = {split: dict(enumerate(items)) for split, items in layout.splits.items()}
    dropped = drop_duplicates(layout.root, splits, workers) if packing.drop_duplicates else []
    tasks = [task for split, items in splits.items() for task in cut(name, split, items, packing, out)]
    todo = [task for task in tasks if not task.report.exists()]
    download = layout.download.shared_by(max(1, min(workers, len(todo))))
    work = partial(pack_shard, root=layout.root, packing=packing, download=download)
    total = sum(len(task.items) for task in tasks)
    before = total - sum(len(task.items) for task in todo)
    bar = tqdm(total=total, initial=before, unit="sample", desc="pack", disable=None)
    try:
        with bar, closing(spread(work, todo, workers)) as done:
            for count in done:
                bar.update(count)
    except UserError:
        release(out)
        raise
    return finish(out, tasks, [*layout.left_out, *dropped])


def claim(out: Path, meaning: dict[str, Any]) -> None:
    """Make a directory the one of these shards.

    Raises:
        UserError: it holds something else.
    """
    own = f"out={out} holds %s; shards go into a new or empty directory, or one where the same words stopped"
    note = out / NOTE
    if note.is_file():
        before = read_note(note)
        changes = [f"{key}={json.dumps(before.get(key))} there, {json.dumps(value)} now"
                   for key, value in meaning.items() if before.get(key) != value]
        if changes:
            raise UserError(own % f"shards that mean something else ({'; '.join(changes)})")
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; shards go into a new or empty directory")
    others = [path.name for path in out.iterdir() if WRITING not in path.name] if out.exists() else []
    if others:
        raise UserError(own % f"something else ({', '.join(sorted(others)[:3])})")
    out.mkdir(parents=True, exist_ok=True)
    write(note, json.dumps(meaning, indent=2) + "\n")


def release(out: Path) -> None:
    """Leave a directory in which nothing has been made to other words."""
    if [path for path in out.rglob("*") if path.is_file()] == [out / NOTE]:
        (out / NOTE).unlink()
        for directory in sorted(out.rglob("*"), reverse=True):
            directory.rmdir()


def read_note(path: Path) -> dict[str, Any]:
    """What a directory means; nothing where the file is somebody else's."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        return {}


def fingerprint(splits: dict[str, list[Item]]) -> str:
    """A hash of all pictures' names and captions."""
    digest = blake2b(digest_size=8)
    for split, items in splits.items():
        digest.update(split.encode())
        for item in items:
            digest.update(repr(item).encode())
    return digest.hexdigest()


def drop_duplicates(root: Path, splits: dict[str, dict[int, Item]], workers: int) -> list[dict[str, str]]:
    """Take out of each split the pictures whose bytes stood in it before; gives back what is told of them."""
    dropped = []
    for split, items in splits.items():
        first: dict[bytes, int] = {}
        with ThreadPoolExecutor(max(1, workers)) as pool:       # hashing and reading let other threads run
            digests = pool.map(lambda item: content_hash(root / item.picture), items.values())
            bar = tqdm(digests, f"hash {split}", len(items), unit="sample", disable=None)
            twice = [
                (number, first[digest])
                for number, digest in zip(items, bar, strict=True)
                if digest and first.setdefault(digest, number) != number
            ]
        for number, other in twice:
            reason = f"is a duplicate: of {items[other].picture}"
            dropped.append({"split": split, "picture": items.pop(number).picture, "reason": reason})
    return dropped


def content_hash(path: Path) -> bytes | None:
    try:
        return blake2b(read_file(path), digest_size=16).digest()
    except BadSample:       # told when its shard is packed
        return None


def cut(name: str, split: str, items: dict[int, Item], packing: Packing, out: Path) -> Iterator[Task]:
    """The items in their order, in shards whose sizes differ by at most one."""
    numbers = np.array(list(items), dtype=np.int64)
    if packing.shuffle:
        numbers = numbers[permutation(len(numbers), packing.seed, "prepare", split)]
    for index, part in enumerate(np.array_split(numbers, -(-len(numbers) // packing.samples_per_shard))):
        shard, chosen = f"{name}-{split}-{index:06d}", part.tolist()
        yield Task(out / split / f"{shard}.tar", out / PARTS / f"{shard}.json", split, chosen,
                   [items[number] for number in chosen])


def pack_shard(task: Task, root: Path, packing: Packing, download: Download) -> int:
    """Write one shard, its index and its report; gives back how many items it was made of.

    Raises:
        DataError: not one of its pictures can be used, as when a network or a disk is gone.
    """
    from webdataset import TarWriter  # brings torch

    for directory in (task.shard.parent, task.report.parent):
        directory.mkdir(exist_ok=True)
    for left in task.shard.parent.glob(f"{task.shard.name}*"):
        left.unlink(missing_ok=True)        # by an interrupted run
    captions, sides, words, dropped = 0, Counter(), Counter(), []
    temporary = task.shard.with_name(f"{task.shard.name}{WRITING}{os.getpid()}")
    with temporary.open("wb") as file:
        with TarWriter(file, user="clipx", group="clipx", encoder=False, mtime=0) as tar:
            encoded = encode_all(task.items, root, packing, download)
            for number, item, picture in zip(task.numbers, task.items, encoded, strict=True):
                if isinstance(picture, BadSample):
                    dropped.append({"split": task.split, "picture": item.picture, "reason": str(picture)})
                    continue
                text = {"caption": spoken(item), "height": picture.height, "name": item.picture, "width": picture.width}
                tar.write({"__key__": f"{number:09d}", picture.kind: picture.file,
                           "json": json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")})
                captions += len(text["caption"])
                sides[min(picture.width, picture.height)] += 1
                words.update(len(caption.split()) for caption in text["caption"])
        file.flush()
        os.fsync(file.fileno())
    if not captions:
        temporary.unlink()
        reasons = listed(by_reason(dropped))
        raise DataError(f"not one of the {len(dropped):,} pictures for {task.shard} can be used ({reasons}; such as "
                        f"{dropped[0]['picture']}); when that is mended, the same words go on")
    os.replace(temporary, task.shard)
    make_index(task.shard, task.shard.parent)
    report = {"samples": len(task.items) - len(dropped), "captions": captions, "bytes": task.shard.stat().st_size,
              "short_side": sides, "caption_words": words, "dropped": dropped}
    write(task.report, json.dumps(report))
    return len(task.items)


def encode_all(
    items: list[Item], root: Path, packing: Packing, download: Download
) -> Iterator[Encoded | BadSample]:
    """The picture of each item or why there is none, in order; URLs by as many threads as connections."""
    if not any(is_url(item.picture) for item in items):
        yield from (encode_one(item, root, packing, download, None) for item in items)
        return
    with download.pool() as pool, ThreadPoolExecutor(download.connections) as threads:
        yield from threads.map(lambda item: encode_one(item, root, packing, download, pool), items)


def encode_one(
    item: Item, root: Path, packing: Packing, download: Download, pool: PoolManager | None
) -> Encoded | BadSample:
    try:
        if not spoken(item):
            raise BadSample("has no caption")
        checked(spoken(item))
        file = download.fetch(pool, item.picture) if is_url(item.picture) else read_file(root / item.picture)
        return encode(file, packing.resize, packing.encode, packing.quality, packing.min_size, packing.verify)
    except BadSample as error:
        return error


def spoken(item: Item) -> list[str]:
    """The captions that say something."""
    return [caption.strip() for caption in item.captions if caption.strip()]


def finish(out: Path, tasks: list[Task], before: list[Mapping[str, str]]) -> dict[str, Any]:
    """Put the reports of the shards together and write them."""
    parts = [(task.split, json.loads(task.report.read_bytes())) for task in tasks]
    dropped = [*before, *(row for _, part in parts for row in part["dropped"])]
    report = {"splits": merge(parts), "dropped": by_reason(dropped)}
    write(out / DROPPED, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped))
    write(out / REPORT, json.dumps(report, indent=2) + "\n")
    shutil.rmtree(out / PARTS)
    return report
