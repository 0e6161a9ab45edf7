"""Readers: from a range of positions to a chunk of decoded images and tokens."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from clipx.data.features import FeatureFile, Stored
from clipx.data.images import TrainCrop, decode, eval_crop, to_tensor
from clipx.data.plan import MixPlan, Place, Plan, digest
from clipx.data.sample import BadSample, Source, captions_of
from clipx.data.tar.headers import DataError
from clipx.errors import UserError
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import Tokenizer, Tokens

CHUNKS = 3  # in memory per worker: two prefetched by DataLoader, one in use
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
    """Consecutive samples of the plan: N images, M captions (M = N in training).

    Where a frozen tower's features are stored, ``images`` or ``tokens`` are those of the samples whose features are not
    known yet.
    """

    images: Tensor  # (N, 3, S, S) uint8, channels last in memory
    tokens: Tokens  # of the M captions
    captions: list[str]  # M
    owners: Tensor  # (M,) int64, row in ``images`` of each caption
    position: int  # of the first sample
    samples: Tensor  # (N,) int64, ids
    ids: Tensor | None  # (N, 2) int64, hashes of picture and caption, if the loss needs them
    skipped: list[Skipped] = field(default_factory=list)
    rows: Tensor | None = None  # (N,) int64, row of each sample's view in the files of features
    stored: Mapping[str, Stored] = field(default_factory=dict)  # what these files hold, by tower
    features: Mapping[str, Tensor] = field(default_factory=dict)  # (N, D) fp16 of frozen towers, added by training

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
        ids: list[tuple[int, int]] | None = None,
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
    caption: str  # empty if it is not needed
    features: dict[str, np.ndarray]  # (D,) fp16, those that are known, by tower


class TrainReader(Reader):
    """Reader for training: plan order, one caption and one random crop per picture.

    Both depend only on seed, source, view and sample id; the view is the epoch, or the epoch modulo a number of views.

    Args:
        source: the samples.
        plan: their order.
        crop: decodes and crops the pictures.
        tokenizer: for the captions.
        caption: ``random`` draws one of a picture's captions; ``first`` takes the first.
        identify: add hashes that reveal equal pictures and captions.
        views: number of different crops of a picture; None for a new one each epoch.
        caption_views: number of times that a caption is drawn; None for once an epoch.
        features: features of frozen towers, by tower; what they hold is neither read nor decoded.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan | MixPlan,
        crop: TrainCrop,
        tokenizer: Tokenizer,
        caption: str,
        identify: bool = False,
        views: int | None = None,
        caption_views: int | None = None,
        features: Mapping[str, FeatureFile] | None = None,
    ):
        super().__init__(source, tokenizer)
        self.plan, self.crop, self.caption, self.identify = plan, crop, caption, identify
        self.views, self.caption_views, self.features = views, caption_views, features or {}

    def chunk(self, positions: range) -> Chunk:
        skipped: list[Skipped] = []
        found = [self.find(self.place(position)) for position in positions]
        images, decoded = shared_pixels(sum("image" not in known for known in found), self.crop.size), 0
        rows: list[Loaded] = []
        for position, known in zip(positions, found, strict=True):
            rows.append(self.load(position, known, images[decoded : decoded + 1], skipped))
            decoded += "image" not in rows[-1].features
        captions = [[row.caption] if "text" not in row.features else [] for row in rows]
        samples = [row.place.sample for row in rows]
        ids = [(signed_hash(row.picture), signed_hash(row.caption)) for row in rows] if self.identify else None
        chunk = self.collate(positions, images[:decoded], captions, samples, skipped, ids)
        if self.views is None:
            return chunk
        numbers = torch.tensor([self.row(row.place) for row in rows], dtype=torch.int64)
        return replace(chunk, rows=numbers, stored={tower: self.stored(tower, rows) for tower in self.features})

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

    def select_caption(self, place: Place, captions: Sequence[str]) -> str:
        """Return the caption of a sample at a place in the plan."""
        view = view_of(place, self.caption_views)
        drawn = digest(self.plan.seed, "caption", *view) if self.caption == "random" else 0
        return captions[drawn % len(captions)]

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
        if self.identify or "image" not in known:
            sample = self.source.read(place.sample)
            picture, captions = sample.picture, sample.captions
        else:
            picture, captions = b"", captions_of(self.source, place.sample) if "text" not in known else []
        if "image" not in known:
            view = view_of(place, self.views)
            self.crop(picture, random.Random(digest(self.plan.seed, "crop", *view)), image[0])
        return Loaded(place, picture, self.select_caption(place, captions) if captions else "", known)

    def stored(self, tower: str, rows: Sequence[Loaded]) -> Stored:
        """Gather the known features of a tower."""
        known = [row.features[tower] for row in rows if tower in row.features]
        width = self.features[tower].width
        return Stored(
            torch.tensor([tower in row.features for row in rows]),
            torch.from_numpy(np.stack(known)) if known else torch.empty(0, width, dtype=torch.float16),
        )


def view_of(place: Place, views: int | None) -> Place:
    """Return the place in the epoch of a sample's view."""
    return place if views is None else place._replace(epoch=place.epoch % views)


def signed_hash(what: bytes | str) -> int:
    """Return a hash that fits into an int64."""
    data = what.encode() if isinstance(what, str) else what
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)


class EvalReader(Reader):
    """Reader for evaluation: source order, center crop, all captions of each picture.

    Bad samples are left out, so a chunk may be empty.

    Args:
        source: the samples.
        preprocessing: of the image tower.
        tokenizer: for the captions.
    """

    def __init__(self, source: Source, preprocessing: Preprocessing, tokenizer: Tokenizer):
        super().__init__(source, tokenizer)
        self.preprocessing = preprocessing

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
            captions.append(sample.captions)
            samples.append(position)
        return self.collate(positions, images[: len(samples)], captions, samples, skipped)


def shared_pixels(count: int, size: int) -> Tensor:
    """Allocate (count, S, S, 3) uint8; in a worker, in shared memory."""
    worker = get_worker_info()
    if worker is None:
        return torch.empty(count, size, size, 3, dtype=torch.uint8)
    amount = count * size * size * 3
    try:
        storage = torch.UntypedStorage._new_shared(amount)  # as torch's own collate does
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        need = amount * CHUNKS * worker.num_workers / 1e6
        raise DataError(
            f"shared memory (/dev/shm) is full: workers={worker.num_workers} needs about {need:,.0f} "
            "MB of it here; enlarge it (docker run --shm-size=..., or --ipc=host), or set fewer workers; workers=0 "
            "needs none"
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, size, size, 3)
