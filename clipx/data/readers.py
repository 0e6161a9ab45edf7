"""Readers: from a range of positions to a chunk of decoded images and tokens."""

import random
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from clipx.data.images import TrainCrop, decode, eval_crop, to_tensor
from clipx.data.plan import MixPlan, Place, Plan, digest
from clipx.data.sample import BadSample, Sample, Source
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
    """Consecutive samples of the plan: N images, M captions (M = N in training)."""

    images: Tensor  # (N, 3, S, S) uint8, channels last in memory
    tokens: Tokens  # of the M captions
    captions: list[str]  # M
    owners: Tensor  # (M,) int64, row in ``images`` of each caption
    position: int  # of the first sample
    samples: Tensor  # (N,) int64, ids
    ids: Tensor | None  # (N, 2) int64, hashes of picture and caption, if the loss needs them
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

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
        pictures: list[int] | None = None,
    ) -> Chunk:
        flat = [caption for several in captions for caption in several]
        return Chunk(
            images=images.permute(0, 3, 1, 2),
            tokens=self.tokenizer.flat(flat),
            captions=flat,
            owners=torch.repeat_interleave(torch.tensor([len(several) for several in captions], dtype=torch.int64)),
            position=positions.start,
            samples=torch.tensor(samples, dtype=torch.int64),
            ids=None if pictures is None else torch.tensor([*zip(pictures, map(signed_hash, flat), strict=True)]),
            skipped=skipped,
        )


class TrainReader(Reader):
    """Reader for training: plan order, one caption and one random crop per picture.

    Both depend only on seed, source, epoch and sample id.

    Args:
        source: the samples.
        plan: their order.
        crop: decodes and crops the pictures.
        tokenizer: for the captions.
        caption: ``random`` draws one of a picture's captions; ``first`` takes the first.
        identify: add hashes that reveal equal pictures and captions.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan | MixPlan,
        crop: TrainCrop,
        tokenizer: Tokenizer,
        caption: str,
        identify: bool = False,
    ):
        super().__init__(source, tokenizer)
        self.plan, self.crop, self.caption, self.identify = plan, crop, caption, identify

    def chunk(self, positions: range) -> Chunk:
        captions, samples, pictures = [], [], []
        skipped: list[Skipped] = []
        images = shared_pixels(len(positions), self.crop.size)
        for row, position in enumerate(positions):
            place, sample = self.load(position, images[row], skipped)
            captions.append([self.select_caption(place, sample)])
            samples.append(place.sample)
            if self.identify:
                pictures.append(signed_hash(sample.picture))
        return self.collate(positions, images, captions, samples, skipped, pictures if self.identify else None)

    def select_caption(self, place: Place, sample: Sample) -> str:
        """Return the caption of a sample at a place in the plan."""
        drawn = digest(self.plan.seed, "caption", *place) if self.caption == "random" else 0
        return sample.captions[drawn % len(sample.captions)]

    def load(self, position: int, image: Tensor, skipped: list[Skipped]) -> tuple[Place, Sample]:
        """Fill ``image`` and return the sample at a position, or its first good substitute if it is bad."""
        for attempt in range(TRIES):
            place = self.plan.substitute(position, attempt) if attempt else self.plan[position]
            try:
                sample = self.source.read(place.sample)
                self.crop(sample.picture, random.Random(digest(self.plan.seed, "crop", *place)), image)
                return place, sample
            except BadSample as error:
                skipped.append(Skipped(position, place.sample, self.source.locate(place.sample), str(error)))
        worst = skipped[-1]
        raise DataError(f"{TRIES} samples in a row are bad, the last one is {worst.place}: {worst.reason}")


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
