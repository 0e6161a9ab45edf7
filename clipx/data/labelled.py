"""Labelled pictures as sources: a data set of torchvision's, a folder of class folders, or shards with .cls members.

The caption of a sample is the number of its class; so workers, ranks, bounds and bad samples are those of any source.
"""

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ConfigDict
from typing_extensions import TypedDict

from clipx.data.captions import dataset_type
from clipx.data.catalogue import Catalogue, open_all
from clipx.data.class_names import first_line, plain, read_classnames_file, read_names
from clipx.data.files import below, is_clutter, retry_read
from clipx.data.images import DECODE_ERRORS, check_size, to_rgb
from clipx.data.remote.cache import Cache
from clipx.data.sample import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, BadSample, Sample, Source, check_bytes
from clipx.data.shard_paths import SCHEME, expand, list_shards
from clipx.data.shards import Shards
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import expand_home

logger = logging.getLogger("clipx")

INDEX_DIR = "~/.cache/clipx"


class LabelledConfig(TypedDict, total=False):
    """A labelled data set in a config: one of dataset, folder and shards, and what belongs to it."""

    __pydantic_config__ = ConfigDict(extra="allow")      # open_set tells what is wrong with them

    dataset: str    # torchvision's name of it: CIFAR10, Food101, ImageNet
    root: str       # where that stands; nothing is downloaded
    split: str      # of that; "test"
    folder: str     # a directory that has one directory of pictures a class
    shards: str     # a directory of tars, or names of tars, with .jpg and .cls; beside them classnames.txt
    train: str      # what a probe learns from: another split ("train"), folder or shards
    classes: str    # a file of class names, one a line, or imagenet; else what the data say of themselves


@dataclass(frozen=True)
class LabelledSet:
    """Labelled pictures, and the names of their classes."""

    test: Source
    train: Source | None    # where it was asked for
    classes: list[str]


def open_sets(sets: Mapping[str, LabelledConfig] | None, train: bool = False) -> dict[str, LabelledSet]:
    """The labelled data sets of an evaluation, by name.

    Args:
        sets: by name.
        train: whether they are to have something to learn from.

    Raises:
        ValueError: there are none, or one has a key that does not fit.
    """
    if not sets:
        raise ValueError("sets has no value; name labelled data: labelled={NAME:{dataset:CIFAR10,root:DIR}}, or "
                         "{folder:DIR}, or {shards:DIR}")
    return {name: open_set(f"sets.{name}", which, train) for name, which in sets.items()}


def open_set(key: str, which: LabelledConfig, train: bool) -> LabelledSet:
    """One labelled data set; ``key`` is the config's."""
    known = LabelledConfig.__annotations__
    for odd in which.keys() - known.keys():
        near = difflib.get_close_matches(odd, known, n=1) or [", ".join(known)]
        raise ValueError(f"{key}.{odd}: there is no such key; did you mean {near[0]}?")
    kinds: dict[str, Callable[..., tuple[Source, list[str]]]] = {
        "dataset": open_torchvision, "folder": open_folders, "shards": open_class_shards
    }  # fmt: skip
    chosen = [kind for kind in kinds if kind in which]
    if len(chosen) != 1:
        raise ValueError(f"{key}={dict(which)}: give one of dataset=CIFAR10 (with root=DIR), folder=DIR and shards=DIR")
    kind = chosen[0]
    if kind != "dataset" and (odd := which.keys() & {"root", "split"}):
        raise ValueError(f"{key}.{min(odd)} belongs to a dataset of torchvision's; {kind}={which[kind]} has none")
    names = read_names(which["classes"], f"{key}.classes") if "classes" in which else None
    test, classes = kinds[kind](key, which, kind, names)
    if not train:
        return LabelledSet(test, None, classes)
    if kind != "dataset" and "train" not in which:
        raise ValueError(f"{key}.train has no value; a probe learns from pictures that it is not tested on: train=DIR")
    learnt = {**which, "split": which.get("train", "train"), kind: which[kind] if kind == "dataset" else which["train"]}
    source, others = kinds[kind](key, learnt, "train", names)
    if source.id == test.id or others != classes:
        raise ValueError(f"{key}.train={learnt['split']}: expected the same classes, and other pictures than those of "
                         "the test")
    return LabelledSet(test, source, classes)


def check_label(label: int, classes: list[str], place: str) -> list[str]:
    """The label as a caption.

    Raises:
        DataError: no class has that number.
    """
    if not 0 <= label < len(classes):
        raise DataError(f"{place} has the label {label}, but there are {len(classes)} class names, for 0 to "
                        f"{len(classes) - 1}; give the list that belongs to the data, classes=FILE, one name a line")
    return [str(label)]


# ---------------------------------------------------------------- torchvision


class TorchvisionSource:
    """A data set of torchvision's that gives pictures and numbers of classes."""

    def __init__(self, dataset: Any, name: str, root: str | None, classes: list[str]):
        self.dataset, self.name, self.classes = dataset, name, classes
        self.sizes = [len(dataset)]
        self.id = f"torchvision {name} {self.sizes[0]} {root}"

    def locate(self, sample: int) -> str:
        return f"{self.name}/{sample}"

    def read(self, sample: int) -> Sample:
        try:
            image, label = self.dataset[sample]
        except DECODE_ERRORS as error:
            if isinstance(error, OSError) and error.errno:
                raise DataError(f"{self.locate(sample)} cannot be read: {error}") from error
            raise BadSample(f"does not decode: {error}") from error
        if not (isinstance(image, Image.Image) and isinstance(label, Integral)):
            raise DataError(f"{self.name} does not give a picture and the number of its class; it is not for this")
        check_size(image.width, image.height)
        file = BytesIO()
        to_rgb(image).save(file, "ppm")         # as it is, so nothing is lost, and little time
        return Sample(str(sample), file.getvalue(), check_label(int(label), self.classes, self.locate(sample)))


def open_torchvision(key: str, which: LabelledConfig, kind: str, names: list[str] | None) -> tuple[Source, list[str]]:
    """A split of one of torchvision's data sets; never downloaded."""
    from torchvision import datasets

    name, split = which["dataset"], which.get("split", "test")
    if name not in datasets.__all__:
        near = difflib.get_close_matches(name, datasets.__all__, n=1, cutoff=0.3)
        raise ValueError(f"{key}.dataset={name}: torchvision has no such data set; did you mean {near[0]}?" if near else
                         f"{key}.dataset={name}: torchvision has no such data set; for your own give folder=DIR")
    make, root = getattr(datasets, name), which.get("root")
    known = inspect.signature(make).parameters
    if "root" in known and root is None:
        raise ValueError(f"{key}.root has no value; it is where {name} stands")
    given = {"root": root, "split": split, "train": split == "train", "download": False}
    if "split" not in known and "train" in known and split not in ("train", "test"):
        raise ValueError(f"{key}.split={split}: {name} has train and test")
    try:
        dataset = make(**{key: value for key, value in given.items() if key in known})
    except ValueError as error:
        raise ValueError(f"{key}.split={split}: {first_line(error)}") from error
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{key}.root={root}: {name} is not there, or not whole ({first_line(error)}); nothing is "
                         f"downloaded here, torchvision.datasets.{name}({root!r}, download=True) does it") from error
    own = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not (names or own):
        raise ValueError(f"{key}.classes has no value; {name} does not name its classes: classes=FILE, one name a line")
    classes = names or [plain(one if isinstance(one, str) else one[0]) for one in own]
    where = split if known.keys() & {"split", "train"} else "all"
    return TorchvisionSource(dataset, f"{name}-{where}", root, classes), classes


# ---------------------------------------------------------------- a folder of class folders


class ClassFolders:
    """Pictures in one directory a class; the classes count in the order of their directories' names."""

    def __init__(self, root: Path, files: list[tuple[Path, int]], classes: list[str]):
        self.root, self.files, self.classes = root, files, classes
        self.sizes = [len(files)]
        told = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path, _ in files)
        self.id = f"folders {blake2b(told.encode(), digest_size=16).hexdigest()}"

    def locate(self, sample: int) -> str:
        return str(self.files[sample][0].relative_to(self.root))

    def read(self, sample: int) -> Sample:
        path, label = self.files[sample]
        check_bytes("its picture", retry_read(path.stat, path).st_size, MAX_IMAGE_BYTES)
        picture = retry_read(path.read_bytes, path)
        return Sample(self.locate(sample), picture, check_label(label, self.classes, self.locate(sample)))


def open_folders(key: str, which: LabelledConfig, kind: str, names: list[str] | None) -> tuple[Source, list[str]]:
    """A directory of class directories."""
    root = Path(which["folder"]).expanduser()
    there = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    folders = sorted(path for path in there if not is_clutter(path.name))
    files = [(path, number) for number, folder in enumerate(folders) for path in sorted(below(folder))
             if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not files:
        raise ValueError(f"{key}.{kind}={root} has no directories of pictures, one a class, such as {root}/cat/1.jpg")
    if names and len(names) != len(folders):
        raise ValueError(f"{key}.classes={which['classes']} has {len(names)} names, and {root} {len(folders)} classes; "
                         "give one name a line, in the order of the directories' names")
    classes = names or [plain(folder.name) for folder in folders]
    if empty := [folder.name for number, folder in enumerate(folders) if number not in {label for _, label in files}]:
        logger.warning("%s.%s=%s: %d of %d classes have no pictures, but are among those to choose from: %s", key, kind,
                       root, len(empty), len(folders), ", ".join(empty))
    return ClassFolders(root, files, classes), classes


# ---------------------------------------------------------------- shards


class ClassShards(Shards):
    """Tars whose samples have the number of their class in ``.cls``; other members than it and the picture are left."""

    kinds = ("cls",)

    def __init__(self, catalogue: Catalogue, caption_key: None, index_dir: Path, cache: Cache, classes: list[str]):
        super().__init__(catalogue, caption_key, index_dir, cache)
        self.classes = classes

    def __reduce__(self) -> tuple:
        return ClassShards, (*super().__reduce__()[1], self.classes)

    def captions(self, members: Mapping[str, bytes]) -> list[str]:
        if "cls" not in members:
            raise BadSample("has no class (.cls)")
        try:
            return [str(int(members["cls"]))]
        except ValueError as error:
            raise BadSample("its class (.cls) is no number") from error

    def read(self, sample: int) -> Sample:
        found = super().read(sample)
        check_label(int(found.captions[0]), self.classes, self.locate(sample))
        return found


def open_class_shards(key: str, which: LabelledConfig, kind: str, names: list[str] | None) -> tuple[Source, list[str]]:
    """A directory of tars, or tars by name, on this machine."""
    place = which["shards"]
    root = Path(place).expanduser()
    split = root / ("train" if kind == "train" else "test")         # of CLIP_benchmark's
    tars = (list_shards(root) or list_shards(split)) if root.is_dir() else expand(place, f"{key}.{kind}")
    if not tars or any(SCHEME.match(str(tar)) for tar in tars):
        raise ValueError(f"{key}.{kind}={place}: expected tars of this machine; copy remote ones first")
    kind_of_set = dataset_type(tars[0].parent)
    if kind_of_set not in ("", "classification"):
        raise ValueError(f"{key}.{kind}={place}: dataset_type.txt says {kind_of_set}; expected one class a picture"
                         + "; evals=[retrieval] data=shards scores these" * (kind_of_set == "retrieval"))
    classes = names or read_classnames_file(tars[0].parent, f"{key}.classes")
    index_dir = expand_home(INDEX_DIR)
    cache = Cache(index_dir / "shards", 0, index_dir)           # stays empty
    return ClassShards(open_all(tars, cache), None, index_dir, cache, classes), classes
