"""Shards whose samples have a class, or several, as in CLIP_benchmark's sets."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from clipx.data.captions import dataset_type
from clipx.data.catalogue import Catalogue, open_all
from clipx.data.class_names import check_label, read_classnames_file
from clipx.data.remote.cache import Cache
from clipx.data.sample import BadSample, Sample, Source
from clipx.data.shard_paths import expand, list_shards
from clipx.data.shards import Shards

MULTILABEL = "multilabel"  # in dataset_type.txt: a picture has several classes
COPIES = "~/.cache/clipx/sets"  # of remote shards, kept
Opened: TypeAlias = tuple[Source, list[str]]  # and its class names


class ClassShards(Shards):
    """Tars whose samples have their class number in ``.cls``."""

    def __init__(self, catalogue: Catalogue, classes: list[str]):
        super().__init__(catalogue, caption_key=None)
        self.classes, self.kinds = classes, ("cls",)

    def __reduce__(self) -> tuple:
        return type(self), (self.catalogue, self.classes)

    def captions(self, members: Mapping[str, bytes]) -> list[str]:
        if "cls" not in members:
            raise BadSample("has no class (.cls)")
        try:
            return [str(int(members["cls"]))]
        except ValueError as error:
            raise BadSample("its class (.cls) is not a number") from error

    def read(self, sample: int) -> Sample:
        found = super().read(sample)
        check_label(int(found.captions[0]), self.classes, self.locate(sample))
        return found


class MultiLabelShards(ClassShards):
    """Tars whose samples have in ``.npy`` a one for each of their classes and a zero for each other class."""

    def __init__(self, catalogue: Catalogue, classes: list[str]):
        super().__init__(catalogue, classes)
        self.kinds, self.id = ("npy",), f"{self.id} multilabel"

    def captions(self, members: Mapping[str, bytes]) -> list[str]:
        if "npy" not in members:
            raise BadSample("has no classes (.npy)")
        try:
            marks = read_npy(members["npy"])
        except ValueError as error:
            raise BadSample("its classes (.npy) cannot be read") from error
        if marks.shape != (len(self.classes),) or not np.isin(marks, (0, 1)).all():
            raise BadSample(f"its classes (.npy) are not {len(self.classes)} zeros and ones, one for each class name")
        return [" ".join(map(str, marks.nonzero()[0]))]

    def read(self, sample: int) -> Sample:
        return Shards.read(self, sample)


def read_npy(content: bytes) -> "np.ndarray[Any, Any]":
    """Read an array of numbers; ``np.load`` would allocate whatever the header claims.

    Raises:
        ValueError: it is no array of numbers, or has another length than its header says.
    """
    file = BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("objects")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)


def read_labels(source: Source, captions: Sequence[str]) -> Tensor:
    """The classes of N samples: (N,) numbers, or, of a multi-label set, (N, C) zeros and ones, uint8."""
    if not isinstance(source, MultiLabelShards):
        return torch.tensor([int(caption) for caption in captions], dtype=torch.int64)
    labels = torch.zeros(len(captions), len(source.classes), dtype=torch.uint8)
    for row, caption in zip(labels, captions, strict=True):
        row[[int(number) for number in caption.split()]] = 1
    return labels


def open_class_shards(key: str, which: Mapping[str, Any], train: bool, names: list[str] | None) -> Opened:
    """Open tars, by name or by directory; remote ones are copied and kept."""
    kind: Literal["train", "shards"] = "train" if train else "shards"
    place = which[kind]
    root = Path(place).expanduser()
    split = root / ("train" if train else "test")  # CLIP_benchmark's layout
    found = (list_shards(root) or list_shards(split)) if root.is_dir() else expand(place, f"{key}.{kind}")
    if not found:
        raise ValueError(f"{key}.{kind}={place} holds no shards (*.tar)")
    copies = Cache.unlimited(which.get("cache", COPIES), f"{key}.cache")
    catalogue = open_all(found, copies)
    copies.keep(list(catalogue.remotes.values()))
    directory = next(iter(catalogue.sidecar_dirs()))
    kind_of_set = dataset_type(directory)
    if kind_of_set not in ("", "classification", MULTILABEL):
        raise ValueError(
            f"{key}.{kind}={place}: dataset_type.txt says {kind_of_set}; expected classification or {MULTILABEL}"
            + "; evaluate it with evals=[retrieval] data=shards" * (kind_of_set == "retrieval")
        )
    classes = names or read_classnames_file(directory, f"{key}.classes")
    make = MultiLabelShards if kind_of_set == MULTILABEL else ClassShards
    return make(catalogue, classes), classes
