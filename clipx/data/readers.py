"""Readers: a range of positions to a chunk of decoded images and tokens."""

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
from clipx.tokenizer import SimpleTokenizer

CHUNKS = 3                  # of each worker at once: two wait, as DataLoader prefetches them, and one is used
TRIES = 64                  # bad samples in a row for one position before the run ends


@dataclass(frozen=True)
class Skipped:
    """A bad sample that was met."""

    position: int           # in the plan
    sample: int             # its id
    place: str              # file and key
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Some samples that stand side by side in the plan.  N pictures, M captions (M = N in training)."""

    images: Tensor          # (N, 3, S, S) uint8, channels last in memory
    tokens: Tensor          # (M, L) int64, cut to the longest caption
    lengths: Tensor         # (M,) int64, tokens of each caption
    captions: list[str]     # M
    owners: Tensor          # (M,) int64, the row in ``images`` that each caption belongs to
    position: int           # of the first sample
    samples: Tensor         # (N,) int64, ids
    ids: Tensor | None      # (N, 2) int64, hashes of picture and caption, where the loss asks for them
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> "Chunk":
        return replace(self, images=self.images.pin_memory())


class Reader(Dataset):
    """Ranges of positions to chunks."""

    def __init__(self, source: Source, tokenizer: SimpleTokenizer):
        self.source, self.tokenizer = source, tokenizer

    def __getitem__(self, positions: range) -> Chunk | UserError:
        try:
            return self.chunk(positions)
        except UserError as error:      # as a value: on its way out of a worker, an exception gathers tracebacks
            return error

    def chunk(self, positions: range) -> Chunk:
        raise NotImplementedError

    def pack(
        self, positions: range, images: Tensor, captions: list[list[str]], samples: list[int],
        skipped: list[Skipped], pictures: list[int] | None = None,
    ) -> Chunk:
        flat = [caption for several in captions for caption in several]
        tokens = self.tokenizer(flat)
        lengths = tokens.argmax(dim=-1) + 1
        return Chunk(
            images=images.permute(0, 3, 1, 2),
            tokens=tokens[:, : int(lengths.max()) if flat else 0].contiguous(),
            lengths=lengths,
            captions=flat,
            owners=torch.repeat_interleave(torch.tensor([len(several) for several in captions], dtype=torch.int64)),
            position=positions.start,
            samples=torch.tensor(samples, dtype=torch.int64),
            ids=None if pictures is None else torch.tensor([*zip(pictures, map(signed_hash, flat), strict=True)]),
            skipped=skipped,
        )


class TrainReader(Reader):
    """Chunks for training: in the plan's order, one caption and one random crop a picture.

    Both depend on the seed and on source, epoch and id of the sample, on nothing else.

    Args:
        source: the samples.
        plan: their order.
        crop: cuts the pictures.
        tokenizer: for the captions.
        caption: ``random``, one of a picture's captions is drawn, or ``first``.
        identify: whether chunks tell which pictures and captions are the same.
    """

    def __init__(
        self, source: Source, plan: Plan | MixPlan, crop: TrainCrop, tokenizer: SimpleTokenizer, caption: str,
        identify: bool = False,
    ):
        super().__init__(source, tokenizer)
        self.plan, self.crop, self.caption, self.identify = plan, crop, caption, identify

    def chunk(self, positions: range) -> Chunk:
        captions, samples, skipped, pictures = [], [], [], []
        images = shared_pixels(len(positions), self.crop.size)
        for row, position in enumerate(positions):
            place, sample = self.take(position, images[row], skipped)
            captions.append([self.draw(place, sample)])
            samples.append(place.sample)
            if self.identify:
                pictures.append(signed_hash(sample.picture))
        return self.pack(positions, images, captions, samples, skipped, pictures if self.identify else None)

    def draw(self, place: Place, sample: Sample) -> str:
        """The caption that a sample has there."""
        drawn = digest(self.plan.seed, "caption", *place) if self.caption == "random" else 0
        return sample.captions[drawn % len(sample.captions)]

    def take(self, position: int, image: Tensor, skipped: list[Skipped]) -> tuple[Place, Sample]:
        """The sample at a position, or, where it is bad, the first good one of its substitutes; ``image`` is filled."""
        for attempt in range(TRIES):
            place = self.plan.substitute(position, attempt) if attempt else self.plan[position]
            try:
                sample = self.source.read(place.sample)
                self.crop(sample.picture, random.Random(digest(self.plan.seed, "crop", *place)), image)
                return place, sample
            except BadSample as error:
                skipped.append(Skipped(position, place.sample, self.source.locate(place.sample), str(error)))
        worst = skipped[-1]
        raise DataError(f"{TRIES} samples in a row are bad, the last of them {worst.place}: {worst.reason}")


def signed_hash(what: bytes | str) -> int:
    """A hash that fits into an int64."""
    data = what.encode() if isinstance(what, str) else what
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)


class EvalReader(Reader):
    """Chunks for evaluation: in the source's order, the middle of each picture, all of its captions.

    What is bad is left out, so a chunk may be empty.

    Args:
        source: the samples.
        size: side of a picture, pixels.
        tokenizer: for the captions.
    """

    def __init__(self, source: Source, size: int, tokenizer: SimpleTokenizer):
        super().__init__(source, tokenizer)
        self.size = size

    def chunk(self, positions: range) -> Chunk:
        captions, samples, skipped = [], [], []
        images = shared_pixels(len(positions), self.size)
        for position in positions:
            try:
                sample = self.source.read(position)
                images[len(samples)] = to_tensor(eval_crop(decode(sample.picture), self.size))
            except BadSample as error:
                skipped.append(Skipped(position, position, self.source.locate(position), str(error)))
                continue
            captions.append(sample.captions)
            samples.append(position)
        return self.pack(positions, images[: len(samples)], captions, samples, skipped)


def shared_pixels(count: int, size: int) -> Tensor:
    """(count, S, S, 3) uint8 to be filled; in a worker, in memory that the main process sees without a copy."""
    if get_worker_info() is None:
        return torch.empty(count, size, size, 3, dtype=torch.uint8)
    amount = count * size * size * 3
    try:
        storage = torch.UntypedStorage._new_shared(amount)      # as torch's own collate does
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        workers = get_worker_info().num_workers
        raise DataError(
            f"shared memory (/dev/shm) is full: workers={workers} needs about {amount * CHUNKS * workers / 1e6:,.0f} "
            "MB of it here; enlarge it (docker run --shm-size=..., or --ipc=host), or set fewer workers; workers=0 "
            "needs none"
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, size, size, 3)
