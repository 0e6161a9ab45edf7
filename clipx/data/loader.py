"""From the plan to chunks: workers read, decode and tokenise; their number changes nothing in what they deliver."""

import gc
import itertools
import os
import random
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from multiprocessing import active_children, get_all_start_methods
from multiprocessing.connection import wait
from threading import Thread, current_thread, main_thread

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from clipx.data.images import TrainCrop, decode, eval_crop, to_tensor
from clipx.data.plan import MixPlan, Place, Plan, digest
from clipx.data.remote.cache import Ahead
from clipx.data.sample import BadSample, Sample, Source
from clipx.data.shards import remote_parts
from clipx.data.tar.headers import DataError
from clipx.errors import UserError
from clipx.tokenizer import SimpleTokenizer

MOST_IN_CHUNK = 256         # samples that pass from a worker at once
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


def read(
    reader: Reader, ranges: Iterable[range], workers: int, pin: bool, fill: bool = True
) -> Iterator[Chunk]:
    """The chunks of some ranges, in their order; of training, remote shards are copied ahead of them.

    Args:
        reader: makes a chunk of a range.
        ranges: may be endless.
        workers: processes that read ahead; 0 reads in this one.
        pin: put the chunks into page-locked memory, for copies that overlap.
        fill: whether this process copies remote shards; of those that share a cache, one does.

    Raises:
        UserError: the data cannot be read, or a worker was killed.
    """
    ranges = iter(ranges)
    first = next(ranges, range(0))
    loader = DataLoader(
        reader, batch_size=None, sampler=itertools.chain([first] if first else [], ranges), num_workers=workers,
        collate_fn=as_it_is, pin_memory=pin, worker_init_fn=settle,
        multiprocessing_context=get_all_start_methods()[0] if workers else None,    # the system's, not joblib's
        generator=torch.Generator(),        # the default one would advance torch's global random state
    )
    watched: list[int] = []
    try:
        with copied_ahead(reader, first, fill) as ahead:
            before = signal.getsignal(signal.SIGCHLD)
            others = active_children()
            chunks = iter(loader)
            watched = [child.sentinel for child in active_children() if child not in others]
            if current_thread() is main_thread():   # torch's handler would tell of a killed worker inside a step
                signal.signal(signal.SIGCHLD, before)
            ahead.start()
            for chunk in chunks:
                if isinstance(chunk, UserError):
                    raise chunk
                ahead.position = chunk.position
                yield chunk
    except (RuntimeError, OSError, EOFError) as error:      # a dead worker's pipes and sockets break as they like
        if not watched or not wait(watched, timeout=1):
            raise
        raise DataError(
            f"one of the workers={workers} processes that read data was killed, most likely for want of memory; fewer "
            "workers need less, and the same command goes on from the last checkpoint"
        ) from error
    finally:
        chunk = chunks = None       # an error holds this frame: without this the workers wait for the garbage collector


def settle(_worker: int) -> None:
    """Make at once what a worker keeps for ever, and hide it from the garbage collector: a twentieth of its time."""
    if hasattr(signal, "sigwaitinfo"):          # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
        Thread(target=end_with_run, daemon=True).start()
    get_worker_info().dataset.tokenizer("")
    gc.freeze()


def end_with_run() -> None:
    """End at the run's word alone: schedulers and terminals signal all processes, and the run has a last step to do."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def copied_ahead(reader: Reader, first: range, fill: bool) -> Ahead:
    """What copies the remote shards of training, from the first range on."""
    parts = list(remote_parts(reader.source)) if isinstance(reader, TrainReader) else []
    remotes = {
        start + number: part.remote(number) for start, part in parts for number in part.catalogue.urls
        if part.sizes[number]
    }
    plan = reader.plan if parts else None
    reach = max(plan.window, 2 * len(first)) if parts else 0
    return Ahead([part.cache for _, part in parts], remotes, plan, first.start, reach, fill)


def as_it_is(chunk: Chunk) -> Chunk:
    return chunk


def train_ranges(
    position: int, batch_size: int, micro_batch_size: int | None = None, rank: int = 0, world: int = 1,
    left_out: Sequence[Sequence[int]] = (),
) -> Iterator[range]:
    """The positions that one rank reads, chunk by chunk, without end.

    Args:
        position: of the first sample of the next global batch.
        batch_size: samples of a global batch; ``world`` divides it.
        micro_batch_size: samples that go forward at once; no chunk reaches across the end of so many.
        rank: of this process.
        world: how many processes share a batch.
        left_out: positions, from and to, that no batch begins at.
    """
    share = batch_size // world
    while True:
        start = usable(position, left_out) + rank * share
        for micro in cut(range(start, start + share), micro_batch_size or share):
            yield from cut(micro)
        position = usable(position, left_out) + batch_size


def usable(position: int, left_out: Sequence[Sequence[int]]) -> int:
    """Where a batch begins that would begin at a position, but for what is left out."""
    for start, end in sorted(left_out):
        if start <= position < end:
            position = end
    return position


def cut(positions: range, size: int = MOST_IN_CHUNK) -> Iterator[range]:
    """A range in pieces, of a chunk's size."""
    for start in range(positions.start, positions.stop, size):
        yield range(start, min(start + size, positions.stop))


def steps(chunks: Iterator[Chunk], share: int) -> Iterator[list[Chunk]]:
    """Chunks gathered into steps of ``share`` samples."""
    while True:
        step = [next(chunks)]
        while sum(map(len, step)) < share:
            step.append(next(chunks))
        yield step
