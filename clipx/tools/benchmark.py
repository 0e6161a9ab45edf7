"""Data sets in CLIP_benchmark's layout, local and remote.  Does not import torch."""

import re
from collections.abc import Iterator, Mapping
from glob import glob
from hashlib import blake2b
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from clipx.config.validate import ConfigError
from clipx.data.captions import dataset_type
from clipx.data.files import CLASS_NAMES, TEMPLATES
from clipx.data.remote.sets import RemoteSet, copy_texts
from clipx.data.shard_paths import SCHEME, list_shards
from clipx.data.tar.index import INDEX_DIR, expand_home

Node: TypeAlias = dict[str, Any]


class BenchmarkSet(NamedTuple):
    """A data set."""

    place: str  # its directory or URL, as the user gave it
    texts: Path  # directory of its text files, or of their copies
    shards: dict[str, str]  # what an evaluation of labelled data calls ``shards``, ``train`` and ``cache``

    @property
    def has_captions(self) -> bool:
        """Whether it is for retrieval; any other kind has class names."""
        return dataset_type(self.texts / "test") == "retrieval"

    def labelled_config(self) -> dict[str, str]:
        """The config of a labelled data set, with its own prompts if it has some."""
        templates = self.texts / TEMPLATES
        return {**self.shards, "templates": str(templates)} if templates.is_file() else self.shards


def find_sets(sets: str | list[str], cache: str) -> dict[str, BenchmarkSet]:
    """The data sets that ``sets`` names, by their own names.

    Args:
        sets: directories, patterns of directories, and URLs.
        cache: directory for copies of remote shards.

    Raises:
        ConfigError: one does not exist, holds no shards, or two have the same name.
        DataError: a server fails.
    """
    found: dict[str, BenchmarkSet] = {}
    for pattern in [sets] if isinstance(sets, str) else sets:
        for name, one in [remote_set(pattern, cache)] if SCHEME.match(pattern) else local_sets(pattern):
            if name in found:
                raise ConfigError(
                    f"sets={pattern}: two data sets are called {name}, {found[name].place} and {one.place}"
                )
            found[name] = one
    return found


def local_sets(pattern: str) -> Iterator[tuple[str, BenchmarkSet]]:
    paths = [Path(path) for path in sorted(glob(expanduser(pattern))) if Path(path).is_dir()]
    if not paths:
        raise ConfigError(f"sets={pattern}: there is no such directory; a data set is one with test/*.tar")
    for path in paths:
        if not own_shards(path):
            raise ConfigError(f"sets={pattern}: {path} holds no shards (test/*.tar); name others: sets=[A,B]")
        shards = {"shards": str(path)}
        if list_shards(path / "train"):
            shards["train"] = str(path / "train")
        yield sanitise(path.absolute().name), BenchmarkSet(str(path), path, shards)


def remote_set(url: str, cache: str) -> tuple[str, BenchmarkSet]:
    if "*" in url:
        raise ConfigError(f"sets={url}: servers do not list data sets; name each: sets=[URL,URL]")
    try:
        expand_home(cache).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"sets_cache={cache} cannot be written: {error.strerror}") from error
    remote = RemoteSet.at(url)
    texts = expand_home(INDEX_DIR) / "sets" / blake2b(remote.url.encode(), digest_size=8).hexdigest()
    copy_texts(remote, texts)
    splits = {"shards": remote.shards("test", texts), "train": remote.shards("train", texts)}
    shards = {"cache": cache, **{key: names for key, names in splits.items() if names}}
    if (texts / CLASS_NAMES).exists():
        shards["classes"] = str(texts / CLASS_NAMES)
    return sanitise(remote.name), BenchmarkSet(url, texts, shards)


def sanitise(name: str) -> str:
    """Replace the characters that a tag cannot have."""
    return re.sub(r"[^\w.,=+-]", "-", name)


def own_shards(directory: Path) -> list[Path]:
    return list_shards(directory / "test") or list_shards(directory)


def give_sets(evals: Mapping[str, Node], sets: Mapping[str, BenchmarkSet], has_data: bool) -> dict[str, Node]:
    """Add data sets to the evaluations of labelled data, whose nodes have a key ``sets``.

    Args:
        evals: nodes by name.
        sets: by name.
        has_data: whether there are also pictures with captions that are none of these sets.

    Raises:
        ConfigError: no evaluation takes some sets, or an evaluation gets none.
    """
    pairs = [name for name, one in sets.items() if one.has_captions]
    classes = {name: one.labelled_config() for name, one in sets.items() if name not in pairs}
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
