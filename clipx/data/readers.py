"""Readers: from a range of positions to a chunk of decoded images and tokens."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipx.data.augment import Augmentation, apply
from clipx.data.draw_captions import CaptionDraw, Drawn
from clipx.data.features import FeatureFile, Stored
from clipx.data.images import TrainCrop, decode, eval_crop, to_tensor
from clipx.data.pixels import shared_pixels
from clipx.data.plan import MixPlan, Place, Plan, digest
from clipx.data.sample import BadSample, Source, captions_of
from clipx.data.tar.headers import DataError
from clipx.data.teacher import Lesson, TeacherChunk, TeacherReader
from clipx.errors import UserError
from clipx.loss.distill import Teacher
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import Tokenizer, Tokens

TRIES = 64  # bad samples in a row for one position before the run ends


@dataclass(frozen=True)
class Skipped:
    """A bad sample that was replaced or left out."""

    position: int  # in the plan
    sample: int  # its id
    place: str  # file and key
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples of the plan: N images, M captions; K of each image in training.

    Where a frozen tower's features are stored, ``images`` or ``tokens`` are those of the samples whose features are not
    known yet.
    """

    images: Tensor  # (N, 3, S, S) uint8, channels last in memory
    tokens: Tokens  # of the M captions
    captions: list[str]  # M
    owners: Tensor  # (M,) int64, row in ``images`` of each caption
    position: int  # of the first sample
    samples: Tensor  # (N,) int64, ids
    ids: Tensor | None  # (N, 1 + K) int64, hashes of picture and captions, if the loss needs them
    skipped: list[Skipped] = field(default_factory=list)
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) int64, rows in the files of features, by tower
    stored: Mapping[str, Stored] = field(default_factory=dict)  # what these files hold, by tower
    features: Mapping[str, Tensor] = field(default_factory=dict)  # (N, D) fp16 of frozen towers, added by training
    teacher: TeacherChunk | None = None  # what a teacher takes of them
    targets: Teacher | None = None  # a teacher's features, fp16, added by training

    def __len__(self) -> int:
        return len(self.samples)

    def pin_memory(self) -> "Chunk":
        return replace(self, images=self.images.pin_memory())


class Reader(Dataset):
    """Dataset of chunks, indexed by ranges of positions."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self.source, self.tokenizer = source, tokenizer

    def __getitem__(self, positions: range) -> Chunk | UserError:
        try:
            return self.chunk(positions)
        except UserError as error:  # returned, as raising in a worker would add tracebacks to the message
            return error

    def chunk(self, positions: range) -> Chunk:
        raise NotImplementedError

    def collate(
        self,
        positions: range,
        images: Tensor,
        captions: list[list[str]],
        samples: list[int],
        skipped: list[Skipped],
        ids: list[list[int]] | None = None,
    ) -> Chunk:
        flat = [caption for several in captions for caption in several]
        return Chunk(
            images=images.permute(0, 3, 1, 2),
            tokens=self.tokenizer.flat(flat),
            captions=flat,
            owners=torch.repeat_interleave(torch.tensor([len(several) for several in captions], dtype=torch.int64)),
            position=positions.start,
            samples=torch.tensor(samples, dtype=torch.int64),
            ids=None if ids is None else torch.tensor(ids),
            skipped=skipped,
        )


class Loaded(NamedTuple):
    """A sample as a chunk needs it."""

    place: Place
    picture: bytes  # empty if it is not needed
    captions: list[Drawn]  # none if they are not needed
    features: dict[str, np.ndarray]  # (D,) fp16, those that are known, by tower
    lesson: Lesson | None  # for a teacher

    def ids(self) -> list[int]:
        """Hashes of the picture and of each caption."""
        return [signed_hash(self.picture), *(signed_hash(one.whole) for one in self.captions)]


class TrainReader(Reader):
    """Reader for training: plan order, one random crop and K captions per picture.

    Both depend only on seed, source, view and sample id; the view is the epoch, or the epoch modulo a number of views.

    Args:
        source: the samples.
        plan: their order.
        crop: decodes and crops the pictures.
        tokenizer: for the captions.
        captions: draws the captions of a picture; None for one, evenly.
        identify: add hashes that reveal equal pictures and captions.
        views: number of different crops of a picture; None for a new one each epoch.
        caption_views: number of times that captions are drawn; None for once an epoch.
        features: features of frozen towers, by tower; what they hold is neither read nor decoded.
        teacher: prepares the same samples for a teacher.
        augments: of each source, changes its crops, None for the crop alone; empty for that of all.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan | MixPlan,
        crop: TrainCrop,
        tokenizer: Tokenizer,
        captions: CaptionDraw | None = None,
        identify: bool = False,
        views: int | None = None,
        caption_views: int | None = None,
        features: Mapping[str, FeatureFile] | None = None,
        teacher: TeacherReader | None = None,
        augments: Sequence[Augmentation | None] = (),
    ):
        super().__init__(source, tokenizer)
        self.plan, self.crop, self.captions, self.identify = plan, crop, captions or CaptionDraw(), identify
        self.views, self.caption_views, self.features = views, caption_views, features or {}
        self.teacher, self.augments = teacher, augments

    def chunk(self, positions: range) -> Chunk:
        skipped: list[Skipped] = []
        found = [self.find(self.place(position)) for position in positions]
        images, decoded = shared_pixels(sum("image" not in known for known in found), self.crop.size), 0
        rows: list[Loaded] = []
        for position, known in zip(positions, found, strict=True):
            rows.append(self.load(position, known, images[decoded : decoded + 1], skipped))
            decoded += "image" not in rows[-1].features
        captions = [[one.text for one in row.captions] if "text" not in row.features else [] for row in rows]
        samples = [row.place.sample for row in rows]
        ids = [row.ids() for row in rows] if self.identify else None
        chunk = self.collate(positions, images[:decoded], captions, samples, skipped, ids)
        lessons = [row.lesson for row in rows if row.lesson is not None]
        taught = self.teacher.collate(lessons) if self.teacher else None
        return replace(chunk, **self.stored(rows), teacher=taught)

    def place(self, position: int, attempt: int = 0) -> Place:
        """Return the place of the sample at a position, or of its substitute."""
        return self.plan.substitute(position, attempt) if attempt else self.plan[position]

    def row(self, place: Place) -> int:
        """Return the row of a place in the files of features."""
        return view_of(place, self.views).epoch * self.plan.samples + place.sample

    def find(self, place: Place) -> dict[str, np.ndarray]:
        """Return the features of a place that are known, by tower."""
        found = {tower: file.read(self.row(place)) for tower, file in self.features.items()}
        return {tower: feature for tower, feature in found.items() if feature is not None}

    def draw_captions(self, place: Place, captions: Sequence[str]) -> list[Drawn]:
        """Return what is drawn of the captions of a sample at a place in the plan."""
        return self.captions(captions, self.plan.seed, "caption", *view_of(place, self.caption_views))

    def load(self, position: int, known: dict[str, np.ndarray], image: Tensor, skipped: list[Skipped]) -> Loaded:
        """Load the sample at a position, or its first good substitute if it is bad.

        Args:
            position: in the plan.
            known: features of its sample.
            image: (1, S, S, 3) uint8, is filled; not used where the features of the image tower are known.
            skipped: bad samples are appended.
        """
        for attempt in range(TRIES):
            place = self.place(position, attempt)
            known = self.find(place) if attempt else known
            try:
                return self.read(place, known, image)
            except BadSample as error:
                skipped.append(Skipped(position, place.sample, self.source.locate(place.sample), str(error)))
            if "image" in known:  # no room for the picture of a substitute
                raise DataError(
                    f"{skipped[-1].place} has changed since its features were stored in {self.features['image'].path}: "
                    f"{skipped[-1].reason}; delete that file"
                )
        worst = skipped[-1]
        raise DataError(f"{TRIES} samples in a row are bad, the last one is {worst.place}: {worst.reason}")

    def read(self, place: Place, known: dict[str, np.ndarray], image: Tensor) -> Loaded:
        """Read what is needed of a sample.  Arguments as in ``load``; raises BadSample."""
        taught = self.teacher.find("image", self.row(place)) if self.teacher else None
        if self.identify or "image" not in known or (self.teacher and taught is None):
            sample = self.source.read(place.sample)
            picture, captions = sample.picture, sample.captions
        else:
            needed = self.teacher or "text" not in known
            picture, captions = b"", captions_of(self.source, place.sample) if needed else []
        if "image" not in known:
            self.cut(place, self.crop, picture, image[0])
        drawn, lesson = self.draw_captions(place, captions) if captions else [], None
        if self.teacher:
            pixels = None
            if taught is None:
                pixels = self.teacher.empty()
                self.cut(place, self.teacher.crop, picture, pixels)
            lesson = self.teacher.prepare(self.row(place), taught, pixels, place.sample, drawn)
        return Loaded(place, picture, drawn, known, lesson)

    def cut(self, place: Place, crop: TrainCrop, picture: bytes, out: Tensor) -> None:
        """Fill ``out``, (S, S, 3) uint8, with the crop of a view, augmented.  Raises BadSample."""
        view = view_of(place, self.views)
        crop(picture, random.Random(digest(self.plan.seed, "crop", *view)), out)
        if augment := self.augmentation(place):
            apply(augment, out, digest(self.plan.seed, "augment", *view))

    def augmentation(self, place: Place) -> Augmentation | None:
        """Return what changes the crop of a place, if anything does."""
        return self.augments[place.source] if self.augments else None

    def stored(self, rows: Sequence[Loaded]) -> dict[str, Any]:
        """Return ``rows`` and ``stored`` of a chunk; nothing without views."""
        if self.views is None:
            return {}
        numbers = torch.tensor([self.row(row.place) for row in rows], dtype=torch.int64)
        known = {
            tower: Stored.of([row.features.get(tower) for row in rows], file.width)
            for tower, file in self.features.items()
        }
        return {"rows": {"image": numbers, "text": numbers}, "stored": known}


def view_of(place: Place, views: int | None) -> Place:
    """Return the place in the epoch of a sample's view."""
    return place if views is None else place._replace(epoch=place.epoch % views)


def signed_hash(what: bytes | str) -> int:
    """Return a hash that fits into an int64."""
    data = what.encode() if isinstance(what, str) else what
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)


class EvalReader(Reader):
    """Reader for evaluation: source order, center crop; bad samples are left out, so a chunk may be empty.

    Args:
        source: the samples.
        preprocessing: of the image tower.
        tokenizer: for the captions.
        captions: number of captions of each picture, its first; None for all.
    """

    def __init__(self, source: Source, preprocessing: Preprocessing, tokenizer: Tokenizer, captions: int | None = None):
        super().__init__(source, tokenizer)
        self.preprocessing, self.captions = preprocessing, captions

    def chunk(self, positions: range) -> Chunk:
        captions: list[list[str]] = []
        samples: list[int] = []
        skipped: list[Skipped] = []
        size, *_, interpolation = self.preprocessing
        images = shared_pixels(len(positions), size)
        for position in positions:
            try:
                sample = self.source.read(position)
                images[len(samples)] = to_tensor(eval_crop(decode(sample.picture), size, interpolation))
            except BadSample as error:
                skipped.append(Skipped(position, position, self.source.locate(position), str(error)))
                continue
            captions.append(sample.captions[: self.captions])
            samples.append(position)
        return self.collate(positions, images[: len(samples)], captions, samples, skipped)
