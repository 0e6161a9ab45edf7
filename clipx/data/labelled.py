"""Labelled pictures as sources: torchvision, a folder of class folders, or shards with .cls members.

The caption of a sample is its class number, or its numbers, so workers, ranks and bad samples work as for any source.
"""

import difflib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from clipx.data.class_names import check_label, plain, read_names, read_templates
from clipx.data.class_shards import MultiLabelShards, Opened, open_class_shards
from clipx.data.files import below, is_clutter, read_picture
from clipx.data.images import DECODE_ERRORS, check_size, to_rgb
from clipx.data.sample import IMAGE_SUFFIXES, BadSample, Sample, Source
from clipx.data.tar.headers import DataError
from clipx.errors import first_line

logger = logging.getLogger("clipx")


@with_config(ConfigDict(extra="allow"))  # open_set reports unknown keys
class LabelledConfig(TypedDict, total=False):
    """Config of a labelled data set: one of dataset, folder and shards, with its options."""

    dataset: str  # name in torchvision: CIFAR10, Food101, ImageNet
    root: str  # its directory; nothing is downloaded
    split: str  # its split; "test"
    folder: str  # a directory with one directory of pictures per class
    shards: str  # tars with .jpg and .cls (or .npy: several classes), or their directory; next to them classnames.txt
    cache: str  # directory for copies of remote tars
    train: str  # training data of a probe: another split ("train"), folder or shards
    classes: str  # a file of class names, one per line, or imagenet; else those of the data
    templates: str  # prompts, as in read_templates; else those of the evaluation


@dataclass(frozen=True)
class LabelledSet:
    """Labelled pictures and their class names."""

    test: Source
    train: Source | None  # if requested
    classes: list[str]
    templates: list[str] | None = None  # of its own


def open_sets(sets: Mapping[str, LabelledConfig] | None, train: bool = False) -> dict[str, LabelledSet]:
    """Open the labelled data sets of an evaluation, by name.

    Args:
        sets: configs by name.
        train: also open training data.

    Raises:
        ValueError: there are none, or a key is wrong.
    """
    if not sets:
        raise ValueError(
            "sets has no value; set labelled data: labelled={NAME:{dataset:CIFAR10,root:DIR}}, or "
            "{folder:DIR}, or {shards:DIR}"
        )
    return {name: open_set(f"sets.{name}", which, train) for name, which in sets.items()}


def open_set(key: str, which: LabelledConfig, train: bool) -> LabelledSet:
    """Open one labelled data set; ``key`` is its config key."""
    known = LabelledConfig.__annotations__
    for odd in which.keys() - known.keys():
        near = difflib.get_close_matches(odd, known, n=1) or [", ".join(known)]
        raise ValueError(f"{key}.{odd}: there is no such key; did you mean {near[0]}?")
    openers = {"dataset": open_torchvision, "folder": open_folders, "shards": open_class_shards}
    chosen = [kind for kind in openers if kind in which]
    if len(chosen) != 1:
        raise ValueError(f"{key}={dict(which)}: give one of dataset=CIFAR10 (with root=DIR), folder=DIR and shards=DIR")
    kind = chosen[0]
    for owner, what, own in (
        ("dataset", "torchvision's data sets (dataset=...)", {"root", "split"}),
        ("shards", "shards", {"cache"}),
    ):
        if kind != owner and (misplaced := which.keys() & own):
            raise ValueError(f"{key}.{min(misplaced)} is only for {what}, not for {kind}={dict(which)[kind]}")
    names = read_names(which["classes"], f"{key}.classes") if "classes" in which else None
    templates = read_templates(which["templates"], f"{key}.templates") if "templates" in which else None
    test, classes = openers[kind](key, which, False, names)
    if not train:
        return LabelledSet(test, None, classes, templates)
    if isinstance(test, MultiLabelShards):
        raise ValueError(f"{key}: its pictures have several classes, and a probe needs one; use evals=[zero_shot]")
    if kind != "dataset" and "train" not in which:
        raise ValueError(f"{key}.train has no value; a probe needs training pictures other than the test's: train=DIR")
    source, others = openers[kind](key, which, True, names)
    if source.id == test.id or others != classes:
        raise ValueError(
            f"{key}.train={which.get('train', 'train')}: expected other pictures of the same classes as the test set"
        )
    return LabelledSet(test, source, classes, templates)


# ---------------------------------------------------------------- torchvision


class TorchvisionSource:
    """A torchvision data set of (picture, class number)."""

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
            raise DataError(f"{self.name} does not yield (picture, class number) and cannot be used here")
        check_size(image.width, image.height)
        file = BytesIO()
        to_rgb(image).save(file, "ppm")  # uncompressed: lossless and fast
        return Sample(str(sample), file.getvalue(), check_label(int(label), self.classes, self.locate(sample)))


def open_torchvision(key: str, which: LabelledConfig, train: bool, names: list[str] | None) -> Opened:
    """Open a split of a torchvision data set, without downloading."""
    from torchvision import datasets

    name, split = which["dataset"], which.get("train", "train") if train else which.get("split", "test")
    if name not in datasets.__all__:
        near = difflib.get_close_matches(name, datasets.__all__, n=1, cutoff=0.3)
        raise ValueError(
            f"{key}.dataset={name}: torchvision has no such data set; did you mean {near[0]}?"
            if near
            else f"{key}.dataset={name}: torchvision has no such data set; for your own use folder=DIR"
        )
    make, root = getattr(datasets, name), which.get("root")
    known = inspect.signature(make).parameters
    if "root" in known and root is None:
        raise ValueError(f"{key}.root has no value; set it to the directory of {name}")
    given = {"root": root, "split": split, "train": split == "train", "download": False}
    if "split" not in known and "train" in known and split not in ("train", "test"):
        raise ValueError(f"{key}.split={split}: expected train or test for {name}")
    try:
        dataset = make(**{key: value for key, value in given.items() if key in known})
    except ValueError as error:
        raise ValueError(f"{key}.split={split}: {first_line(error)}") from error
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{key}.root={root}: {name} is missing or incomplete ({first_line(error)}); download "
            f"it with torchvision.datasets.{name}({root!r}, download=True)"
        ) from error
    own = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or []
    if not (names or own):
        raise ValueError(
            f"{key}.classes has no value, and {name} has no class names; set classes=FILE, one name per line"
        )
    classes = names or [plain(one if isinstance(one, str) else one[0]) for one in own]
    where = split if known.keys() & {"split", "train"} else "all"
    return TorchvisionSource(dataset, f"{name}-{where}", root, classes), classes


# ---------------------------------------------------------------- a folder of class folders


class ClassFolders:
    """Pictures in one directory per class; classes are numbered in the order of the directory names."""

    def __init__(self, root: Path, files: list[tuple[Path, int]], classes: list[str]):
        self.root, self.files, self.classes = root, files, classes
        self.sizes = [len(files)]
        listing = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path, _ in files)
        self.id = f"folders {blake2b(listing.encode(), digest_size=16).hexdigest()}"

    def locate(self, sample: int) -> str:
        return str(self.files[sample][0].relative_to(self.root))

    def read(self, sample: int) -> Sample:
        path, label = self.files[sample]
        name = self.locate(sample)
        return Sample(name, read_picture(path), check_label(label, self.classes, name))


def open_folders(key: str, which: LabelledConfig, train: bool, names: list[str] | None) -> Opened:
    """Open a directory of class directories."""
    kind: Literal["train", "folder"] = "train" if train else "folder"
    root = Path(which[kind]).expanduser()
    there = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    folders = sorted(path for path in there if not is_clutter(path.name))
    files = [
        (path, number)
        for number, folder in enumerate(folders)
        for path in sorted(below(folder))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not files:
        raise ValueError(f"{key}.{kind}={root} has no class directories with pictures, such as {root}/cat/1.jpg")
    if names and len(names) != len(folders):
        raise ValueError(
            f"{key}.classes={which['classes']} has {len(names)} names, but {root} has {len(folders)} "
            "classes; give one name per line, in the order of the directory names"
        )
    classes = names or [plain(folder.name) for folder in folders]
    if empty := [folder.name for number, folder in enumerate(folders) if number not in {label for _, label in files}]:
        logger.warning(
            "%s.%s=%s: %d of %d classes have no pictures but can be predicted: %s",
            key,
            kind,
            root,
            len(empty),
            len(folders),
            ", ".join(empty),
        )
    return ClassFolders(root, files, classes), classes
