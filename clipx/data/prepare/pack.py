"""Pack pictures and captions into indexed shards, in a fixed order, each shard written atomically.

A directory in progress holds prepare.json (its settings), the finished shards, and .prepare/ with a report of each; a
shard without its report is packed again.  At the end the reports become report.json.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clipx.data.files import WRITING
from clipx.data.plan import permutation
from clipx.data.prepare.download import is_url
from clipx.data.prepare.layouts import Item, Layout
from clipx.data.prepare.pictures import content_hashes, group_of
from clipx.data.prepare.processes import run_tasks
from clipx.data.prepare.report import count_reasons, listed, merge, write
from clipx.data.prepare.shard import Packing, Task, pack_shard
from clipx.data.tar.headers import DataError
from clipx.errors import UserError

logger = logging.getLogger("clipx")

NOTE, REPORT, DROPPED, PARTS = "prepare.json", "report.json", "dropped.jsonl", ".prepare"


def pack(
    name: str, layout: Layout, packing: Packing, out: Path, workers: int, max_empty: float = 0.01
) -> dict[str, Any]:
    """Write the missing shards of a layout, and report.json.

    Args:
        name: prefix of the shard names.
        layout: the pictures and their captions.
        packing: settings.
        out: a new directory, or one in which the same command was interrupted.
        workers: processes; 0 works in this process.
        max_empty: share of the shards that may be empty and left out; one always may.

    Returns:
        The report.

    Raises:
        UserError: ``out`` holds something else, or too many shards would be empty.
    """
    every = list(chain(*layout.splits.values()))
    if not any(item.captions for item in every):
        raise DataError(f"the source in {layout.root.absolute()} has no picture with a caption")
    if packing.drop_duplicates and any(is_url(item.picture) for item in every):
        raise UserError("drop_duplicates=true compares files, but these pictures are URLs; leave it out")
    claim(out, {"source": name, **asdict(packing), "items": fingerprint(layout.splits)})
    if (out / REPORT).exists():
        logger.info("%s is finished; nothing to do", out)
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
    empty: dict[Path, list[dict[str, str]]] = {}
    try:
        with bar, closing(run_tasks(work, todo, workers)) as done:
            for packed in done:
                bar.update(packed.items)
                if packed.dropped is not None:
                    empty[packed.shard] = packed.dropped
                    check_empty(empty, len(tasks), max_empty)
    except UserError:
        release(out)
        raise
    return finish(out, tasks, empty, [*layout.left_out, *dropped])


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


def claim(out: Path, meaning: dict[str, Any]) -> None:
    """Claim a directory for these shards.

    Raises:
        UserError: it holds something else.
    """
    own = f"out={out} holds %s; shards need a new or empty directory, or one where the same command was interrupted"
    note = out / NOTE
    if note.is_file():
        try:
            before = dict(json.loads(note.read_bytes()))
        except (ValueError, TypeError):  # not ours
            before = {}
        changes = [
            f"{key}={json.dumps(before.get(key))} there, {json.dumps(value)} now"
            for key, value in meaning.items()
            if before.get(key) != value
        ]
        if changes:
            raise UserError(own % f"shards with other settings ({'; '.join(changes)})")
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; shards need a new or empty directory")
    others = [path.name for path in out.iterdir() if WRITING not in path.name] if out.exists() else []
    if others:
        raise UserError(own % f"something else ({', '.join(sorted(others)[:3])})")
    out.mkdir(parents=True, exist_ok=True)
    write(note, json.dumps(meaning, indent=2) + "\n")


def release(out: Path) -> None:
    """Release a directory in which nothing has been packed."""
    if [path for path in out.rglob("*") if path.is_file()] == [out / NOTE]:
        (out / NOTE).unlink()
        for directory in sorted(out.rglob("*"), reverse=True):
            directory.rmdir()


def fingerprint(splits: dict[str, list[Item]]) -> str:
    """Hash all picture names and captions."""
    digest = blake2b(digest_size=8)
    for split, items in splits.items():
        digest.update(split.encode())
        for item in items:
            digest.update(repr(item).encode())
    return digest.hexdigest()


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
    out: Path, tasks: list[Task], empty: Mapping[Path, list[dict[str, str]]], before: list[Mapping[str, str]]
) -> dict[str, Any]:
    """Merge the reports of all shards and write report.json and dropped.jsonl."""
    parts = [(task.split, json.loads(task.report.read_bytes())) for task in tasks if task.shard not in empty]
    dropped = [*before, *(row for _, part in parts for row in part["dropped"]), *chain(*empty.values())]
    report = {
        "splits": merge(parts),
        "dropped": count_reasons(dropped),
        "empty": sorted(shard.relative_to(out).as_posix() for shard in empty),
    }
    write(out / DROPPED, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped))
    write(out / REPORT, json.dumps(report, indent=2) + "\n")
    shutil.rmtree(out / PARTS)
    return report
