"""Pack pictures and captions into indexed shards, in a fixed order, each shard written atomically."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clipx.data.plan import permutation
from clipx.data.prepare.claim import DROPPED, PARTS, REPORT
from clipx.data.prepare.download import is_url
from clipx.data.prepare.layouts import Item, Layout
from clipx.data.prepare.pictures import content_hashes, group_of
from clipx.data.prepare.processes import run_tasks
from clipx.data.prepare.report import count_reasons, listed, merge, write
from clipx.data.prepare.shard import Packing, Task, pack_shard, survey_shard
from clipx.data.tar.headers import DataError
from clipx.errors import UserError

logger = logging.getLogger("clipx")


def pack(
    name: str, layout: Layout, packing: Packing, out: Path, workers: int, max_empty: float = 0.01
) -> dict[str, Any]:
    """Write the missing shards of a layout, and report.json.

    Args:
        name: prefix of the shard names.
        layout: the pictures and their captions.
        packing: settings.
        out: a directory that is claimed, perhaps with shards of the same command, which was interrupted.
        workers: processes; 0 works in this process.
        max_empty: share of the shards that may be empty and left out; one always may.

    Returns:
        The report.

    Raises:
        UserError: too many shards would be empty.
    """
    tasks, dropped = plan(name, layout, packing, out, workers)
    todo = [task for task in tasks if not task.report.exists()]
    download = layout.download.shared_by(max(1, min(workers, len(todo))))
    work = partial(pack_shard, root=layout.root, packing=packing, download=download)
    total = sum(len(task.items) for task in tasks)
    before = total - sum(len(task.items) for task in todo)
    bar = tqdm(total=total, initial=before, unit="sample", desc="pack", disable=None)
    empty: dict[Path, list[dict[str, str]]] = {}
    with bar, closing(run_tasks(work, todo, workers)) as done:
        for packed in done:
            bar.update(packed.items)
            if packed.dropped is not None:
                empty[packed.shard] = packed.dropped
                check_empty(empty, len(tasks), max_empty)
    return finish(out, tasks, empty, dropped, layout.scores)


def survey(name: str, layout: Layout, packing: Packing, workers: int) -> dict[str, Any]:
    """Return the report that ``pack`` would write; nothing is written."""
    tasks, dropped = plan(name, layout, packing, Path(), workers)
    download = layout.download.shared_by(max(1, min(workers, len(tasks))))
    work = partial(survey_shard, root=layout.root, packing=packing, download=download)
    parts = []
    bar = tqdm(total=sum(len(task.items) for task in tasks), unit="sample", desc="survey", disable=None)
    with bar, closing(run_tasks(work, tasks, workers)) as done:
        for split, part in done:
            bar.update(part["samples"] + len(part["dropped"]))
            parts.append((split, part))
    dropped += chain(*(part["dropped"] for _, part in parts))
    return {"splits": merge(parts), "dropped": count_reasons(dropped), "scores": dict(layout.scores)}


def plan(
    name: str, layout: Layout, packing: Packing, out: Path, workers: int
) -> tuple[list[Task], list[Mapping[str, str]]]:
    """Return the shards of a layout, and a row for each picture that is already left out.

    Raises:
        UserError: there is no caption, or a setting does not fit the pictures.
    """
    every = list(chain(*layout.splits.values()))
    if not any(item.captions for item in every):
        raise DataError(f"the source in {layout.root.absolute()} has no picture with a caption")
    if packing.drop_duplicates and any(is_url(item.picture) for item in every):
        raise UserError("drop_duplicates=true compares files, but these pictures are URLs; leave it out")
    splits = {split: dict(enumerate(items)) for split, items in layout.splits.items()}
    dropped = [*layout.left_out, *(drop_duplicates(layout.root, splits, workers) if packing.drop_duplicates else [])]
    if packing.val:
        hold_out(splits, packing)
    return [task for split, items in splits.items() for task in cut(name, split, items, packing, out)], dropped


def hold_out(splits: dict[str, dict[int, Item]], packing: Packing) -> None:
    """Move a share of the training pictures to a validation split.

    Raises:
        UserError: there is a validation split, or one of the two would be empty.
    """
    if others := splits.keys() - {"train"}:
        raise UserError(
            f"val={packing.val} would split the training pictures, but src has {min(others)}/; leave it out"
        )
    train = splits["train"]
    numbers = np.array(list(train), dtype=np.int64)[permutation(len(train), packing.seed, "val")]
    count = round(packing.val * len(train))
    if not 0 < count < len(train):
        raise UserError(f"val={packing.val} of {len(train):,} pictures leaves a split empty; set another share")
    splits["val"] = {number: train.pop(number) for number in sorted(numbers[:count].tolist())}


def check_empty(empty: Mapping[Path, list[dict[str, str]]], shards: int, max_empty: float) -> None:
    """Warn about the last empty shard, and stop if there are too many, as when a network or disk is gone.

    Args:
        empty: dropped pictures, by shard.
        shards: total number of shards.
        max_empty: as in ``pack``.

    Raises:
        DataError: there are too many.
    """
    shard, dropped = list(empty.items())[-1]
    reasons = f"{listed(count_reasons(dropped))}; such as {dropped[0]['picture']}"
    if len(empty) == shards or len(empty) > max(1, max_empty * shards):
        allow = "" if len(empty) == shards else f", or set max_empty=1 to leave out the {len(empty)} empty shards"
        raise DataError(
            f"none of the {len(dropped):,} pictures for {shard} can be used ({reasons}); fix that and "
            f"rerun the same command to resume{allow}"
        )
    logger.warning("%s is not written: none of its %d pictures can be used (%s)", shard, len(dropped), reasons)


def drop_duplicates(root: Path, splits: dict[str, dict[int, Item]], workers: int) -> list[dict[str, str]]:
    """Remove exact duplicates from each split; return a row for each."""
    dropped = []
    for split, items in splits.items():
        first: dict[bytes, int] = {}
        digests = content_hashes(root, items.values(), workers)
        bar = tqdm(digests, f"hash {split}", len(items), unit="sample", disable=None)
        twice = [
            (number, first[digest])
            for number, digest in zip(items, bar, strict=True)
            if digest and first.setdefault(digest, number) != number
        ]
        for number, other in twice:
            reason = f"is a duplicate: of {items[other].picture}"
            dropped.append({"split": split, "picture": str(items.pop(number).picture), "reason": reason})
    return dropped


def cut(name: str, split: str, items: dict[int, Item], packing: Packing, out: Path) -> Iterator[Task]:
    """Yield tasks: the items in order, in shards whose sizes differ by at most one."""
    numbers = np.array(list(items), dtype=np.int64)
    if packing.shuffle:
        numbers = numbers[permutation(len(numbers), packing.seed, "prepare", split)]
        numbers = by_group(numbers, items)
    for index, part in enumerate(np.array_split(numbers, -(-len(numbers) // packing.samples_per_shard))):
        shard, chosen = f"{name}-{split}-{index:06d}", part.tolist()
        yield Task(
            out / split / f"{shard}.tar",
            out / PARTS / f"{shard}.json",
            split,
            chosen,
            [items[number] for number in chosen],
        )


def by_group(numbers: np.ndarray, items: Mapping[int, Item]) -> np.ndarray:
    """Reorder so that pictures of one row group, which are read together, are adjacent."""
    ranks: dict[Any, int] = {}
    of = [ranks.setdefault(group_of(items[number].picture), len(ranks)) for number in numbers.tolist()]
    return numbers[np.argsort(of, kind="stable")]


def finish(
    out: Path, tasks: list[Task], empty: Mapping[Path, list[dict[str, str]]], before: list[Mapping[str, str]],
    scores: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Merge the reports of all shards and write report.json and dropped.jsonl."""
    parts = [(task.split, json.loads(task.report.read_bytes())) for task in tasks if task.shard not in empty]
    dropped = [*before, *(row for _, part in parts for row in part["dropped"]), *chain(*empty.values())]
    report = {
        "splits": merge(parts),
        "dropped": count_reasons(dropped),
        "empty": sorted(shard.relative_to(out).as_posix() for shard in empty),
    } | ({"scores": dict(scores)} if scores else {})
    write(out / DROPPED, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped))
    write(out / REPORT, json.dumps(report, indent=2) + "\n")
    shutil.rmtree(out / PARTS)
    return report
