"""Find shards: from directories, globs, brace lists and URLs to lists of tars."""

import os
import re
from collections.abc import Sequence
from glob import glob
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Event
from typing import TypeAlias

from clipx.data.remote.stores import PIPE, list_matches, run_with_retries
from clipx.data.sample import VALIDATION

SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://")
Shard: TypeAlias = Path | str  # a local tar, or the URL of a remote one


def find_shards(name: str, made_by: str | None) -> tuple[list[Path], list[Path]]:
    """Return the training and the validation shards of a directory, told apart by subdirectory or by name.

    Raises:
        ValueError: it has none.
    """
    root = Path(name).expanduser()
    if SCHEME.match(name):
        raise ValueError(f"root={name} is a URL; list the shards: data.shards='{name}/{{00000..00099}}.tar'")
    train = list_shards(root / "train") or list_shards(root)
    val_paths = next(filter(None, (list_shards(root / name) for name in VALIDATION)), [])
    if not train:
        if val_paths:
            validating = val_paths[0].parent
            raise ValueError(
                f"root={root} holds no shards to train on, but some in {validating.name}/; "
                f"to evaluate on them, set data.root={validating} data.val=0 split=train"
            )
        reason = "holds no shards (*.tar, train/*.tar)" if root.is_dir() else "is not a directory"
        remedy = "for pictures with captions.txt use data=folder"
        if made_by == "img2dataset":
            remedy = "set data.root=DIR to the output directory of img2dataset"
        elif made_by and root.is_dir() and os.listdir(root):
            new = f"{root}-shards"
            remedy = (
                f"make them with: python -m clipx.prepare source={made_by} src={root} out={new}, then data.root={new}"
            )
        elif made_by:
            remedy = f"make its shards with: python -m clipx.prepare source={made_by} src=DIR out={root}"
        raise ValueError(f"root={root} {reason}; {remedy}")
    if not val_paths and train[0].parent == root:
        return split_by_name(train)
    return train, val_paths


def split_by_name(shards: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Tell the training from the validation shards of one directory: cc3m-train-0000.tar, cc3m-validation-0000.tar.

    All are for training unless each name has one of the words.
    """
    words: dict[str, list[Path]] = {}
    for shard in shards:
        found = [word for word in re.split(r"[^a-z]+", shard.stem.lower()) if word in ("train", *VALIDATION)]
        words.setdefault(found[0] if found else "", []).append(shard)
    validation = next((words[word] for word in VALIDATION if word in words), [])
    if "" in words or "train" not in words or not validation:
        return [*shards], []
    return words["train"], validation


def exclude_validation(train: Sequence[Shard], val_paths: Sequence[Shard]) -> list[Shard]:
    """Return the training shards that are not validation shards.

    Raises:
        ValueError: nothing is left to train on.
    """
    validating = set(map(resolve, val_paths))
    kept = [shard for shard in train if resolve(shard) not in validating]
    if not kept:
        raise ValueError(f"all {len(train):,} training shards, such as {train[0]}, are validation shards; set others")
    return kept


def resolve(shard: Shard) -> Shard:
    return shard if isinstance(shard, str) else shard.resolve()


def list_shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.tar"))


def expand(patterns: str | list[str], key: str, allow_pipe: bool = False) -> list[Shard]:
    """Expand names, globs and brace lists to files and URLs, in order.

    Raises:
        ValueError: a file is missing, or a pipe is not allowed.
    """
    from webdataset.shardlists import expand_urls

    found: list[Shard] = []
    for pattern in map(os.path.expanduser, [patterns] if isinstance(patterns, str) else patterns):
        for name in [pattern] if Path(pattern).is_file() else expand_urls(pattern):
            matches = expand_name(name, key, allow_pipe)
            if not matches:
                raise ValueError(f"{key}={pattern}: there is no file {name}")
            found += matches
    if not found:
        raise ValueError(f"{key}={patterns} names no shards")
    return found


def expand_name(name: str, key: str, allow_pipe: bool) -> Sequence[Shard]:
    """Expand one name or glob to files, or to URLs if it is remote."""
    if name.startswith(PIPE):
        if not allow_pipe:
            raise ValueError(f"{key}={name} would run a command; data.allow_pipe=true allows it")
        return [name]
    if SCHEME.match(name) and not name.startswith("file:"):
        if "*" not in name:
            return [name]
        with ThreadPool(1) as pool:
            return run_with_retries(pool, list_matches, [name], Event())[name]
    path = re.sub(r"^file:(//(localhost)?(?=/))?", "", name)
    return [Path(path)] if Path(path).is_file() else [Path(match) for match in sorted(glob(path))]
