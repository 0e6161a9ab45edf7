"""A directory that shards are packed into.

In progress it holds prepare.json (its settings), the finished shards, and .prepare/ with a report of each; a shard
without its report is packed again.  At the end the reports become report.json.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from clipx.data.files import WRITING
from clipx.data.prepare.layouts import Item
from clipx.data.prepare.report import write
from clipx.errors import UserError

logger = logging.getLogger("clipx")

NOTE, REPORT, DROPPED, PARTS = "prepare.json", "report.json", "dropped.jsonl", ".prepare"


@contextmanager
def claimed(out: Path, meaning: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Claim a directory for shards in the block, which gets the report if they are finished.

    It is released if the block raises a UserError before anything is packed.

    Args:
        out: a new directory, or one in which the same command was interrupted or finished.
        meaning: what the shards depend on.

    Raises:
        UserError: it holds something else.
    """
    report = claim(out, meaning)
    try:
        yield report
    except UserError:
        release(out)
        raise


def claim(out: Path, meaning: dict[str, Any]) -> dict[str, Any] | None:
    """Claim a directory for these shards; return the report if they are finished.

    Args:
        out: a new directory, or one in which the same command was interrupted or finished.
        meaning: what the shards depend on.

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
        if (out / REPORT).exists():
            logger.info("%s is finished; nothing to do", out)
            return json.loads((out / REPORT).read_bytes())
        return None
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; shards need a new or empty directory")
    others = [path.name for path in out.iterdir() if WRITING not in path.name] if out.exists() else []
    if others:
        raise UserError(own % f"something else ({', '.join(sorted(others)[:3])})")
    out.mkdir(parents=True, exist_ok=True)
    write(note, json.dumps(meaning, indent=2) + "\n")
    return None


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
