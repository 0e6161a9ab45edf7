"""Directories in CLIP_benchmark's layout, each a data set to evaluate on.  Does not import torch."""

import re
from collections.abc import Mapping
from glob import glob
from os.path import expanduser
from pathlib import Path
from typing import Any, TypeAlias

from clipx.config.validate import ConfigError
from clipx.data.captions import dataset_type
from clipx.data.shard_paths import list_shards

TEMPLATES = "zeroshot_classification_templates.txt"  # of CLIP_benchmark

Node: TypeAlias = dict[str, Any]


def find_sets(sets: str | list[str]) -> dict[str, Path]:
    """The directories that ``sets`` names, by their own names.

    Raises:
        ConfigError: one does not exist, holds no shards, or two have the same name.
    """
    found: dict[str, Path] = {}
    for pattern in [sets] if isinstance(sets, str) else sets:
        paths = [Path(path) for path in sorted(glob(expanduser(pattern))) if Path(path).is_dir()]
        if not paths:
            raise ConfigError(f"sets={pattern}: there is no such directory; a data set is one with test/*.tar")
        for path in paths:
            name = re.sub(r"[^\w.,=+-]", "-", path.absolute().name)
            if not own_shards(path):
                raise ConfigError(f"sets={pattern}: {path} holds no shards (test/*.tar); name others: sets=[A,B]")
            if name in found:
                raise ConfigError(f"sets={pattern}: two data sets are called {name}, {found[name]} and {path}")
            found[name] = path
    return found


def own_shards(directory: Path) -> list[Path]:
    return list_shards(directory / "test") or list_shards(directory)


def has_captions(directory: Path) -> bool:
    """Whether a data set is for retrieval; any other kind has class names."""
    return dataset_type(directory / "test") == "retrieval"


def labelled_config(directory: Path) -> dict[str, str]:
    """The config of a labelled data set, with its own prompts if it has some."""
    train, templates = directory / "train", directory / TEMPLATES
    found = {"shards": str(directory)}
    if list_shards(train):
        found["train"] = str(train)
    return {**found, "templates": str(templates)} if templates.is_file() else found


def give_sets(evals: Mapping[str, Node], sets: Mapping[str, Path], has_data: bool) -> dict[str, Node]:
    """Add data sets to the evaluations of labelled data, whose nodes have a key ``sets``.

    Args:
        evals: nodes by name.
        sets: directories by name.
        has_data: whether there are also pictures with captions that are none of these sets.

    Raises:
        ConfigError: no evaluation takes some sets, or an evaluation gets none.
    """
    pairs = [name for name, path in sets.items() if has_captions(path)]
    classes = {name: labelled_config(path) for name, path in sets.items() if name not in pairs}
    on_classes = [name for name, node in evals.items() if "sets" in node]
    on_pairs = [name for name in evals if name not in on_classes]
    for names, takers, what, example in (
        ([*classes], on_classes, "classes", "zero_shot"),
        (pairs, on_pairs, "captions", "retrieval"),
    ):
        if names and not takers:
            every = ",".join([*evals, example])
            raise ConfigError(f"sets: nothing in evals scores {', '.join(names)} by {what}; set evals=[{every}]")
    if on_pairs and not pairs and not has_data:
        rest = ",".join(on_classes) or "zero_shot"
        raise ConfigError(f"evals=[{','.join(on_pairs)}] needs captions, and no set has some; set evals=[{rest}]")
    given = {}
    for name, node in evals.items():
        own = node.get("sets") or {}
        if both := own.keys() & classes.keys():
            raise ConfigError(f"labelled.{min(both)}: sets has a data set of this name, too; give another name")
        given[name] = {**node, "sets": {**own, **classes}} if name in on_classes else dict(node)
    return given
