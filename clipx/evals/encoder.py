"""Encode data sets with a model, with an optional feature cache on disk."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipx.data.class_shards import read_labels
from clipx.data.files import write_atomic
from clipx.data.images import Normalise
from clipx.data.loader import MAX_CHUNK, load_chunks, split_range
from clipx.data.readers import Chunk, EvalReader
from clipx.data.sample import Source, probe_samples
from clipx.data.tar.headers import DataError
from clipx.distributed import gather, gather_lists, gather_rows, local_slice, rank
from clipx.errors import UserError
from clipx.evals.features import Features, LabelledFeatures, Skip
from clipx.models.clip import CLIP, finish
from clipx.models.packed import pack, to_device
from clipx.tokenizer import Tokenizer
from clipx.weights.checkpoint import checksum

FORMAT = 2  # of the feature files
CPU_BATCH = 64  # pictures; larger batches take memory on a CPU and save little time
TEXT_BATCH = 256  # texts
NUM_SHOWN = 64  # pictures kept for figures

FeaturesT = TypeVar("FeaturesT", Features, LabelledFeatures)


@contextmanager
def evaluating(model: CLIP) -> Iterator[None]:
    """Run the block in evaluation mode and without gradient; the training mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class EvalEncoder:
    """Encode pictures and texts with one model.  Ranks share the work; each gets the whole result.

    Args:
        model: the model, on its device; its training mode is restored.
        tokenizer: the model's.
        workers: number of loader processes.
        amp: autocast dtype for data sets, or None for float32.
        cache: directory of cached features, keyed by weights and data, or None.
    """

    def __init__(
        self, model: CLIP, tokenizer: Tokenizer, workers: int = 0, amp: torch.dtype | None = None,
        cache: Path | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.workers, self.amp, self.cache = model, tokenizer, workers, amp, cache
        self.device = model.logit_scale.device
        self.labelled: dict[str, LabelledFeatures] = {}  # by id of the source

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Texts -> (M, E) unit vectors on the CPU, in float32."""
        features = []
        with evaluating(self.model):
            for start in local_slice(range(0, len(texts), TEXT_BATCH)):
                tokens = self.tokenizer.flat(texts[start : start + TEXT_BATCH])
                packed = pack(tokens, self.model.text.grid_edges(self.device, None)).to(self.device)
                features.append(self.model.encode_text(packed, True).cpu())
        return join(features, self.model.visual.embed)

    def encode_pairs(self, source: Source) -> Features:
        """Encode all pictures and captions of a validation set.

        Raises:
            DataError: no picture can be read.
        """
        return self.load_or_encode(Features, source, self.encode_uncached)

    def encode_labelled(self, source: Source) -> LabelledFeatures:
        """Encode all pictures of a labelled set, once for all evaluations that use it.  Raises as ``encode_pairs``."""
        if source.id not in self.labelled:
            self.labelled[source.id] = self.load_or_encode(LabelledFeatures, source, self.encode_labelled_uncached)
        return self.labelled[source.id]

    def encode_uncached(self, source: Source) -> Features:
        visual, count = self.model.visual, 0
        images, texts, owners, shown = [], [], [], []
        captions: list[str] = []
        skipped: list[Skip] = []
        for chunk, image in self.encode_images(source, skipped):
            images.append(image)
            texts.append(self.encode_captions(chunk))
            owners.append(chunk.owners + count)
            captions += chunk.captions
            shown.append(chunk.images[: max(0, NUM_SHOWN - count)])
            count += len(chunk)
        counts = gather(torch.tensor([count]))
        before = counts[: rank()].sum()  # pictures of lower ranks
        return Features(
            skipped=gather_skipped(skipped, int(counts.sum())),
            images=join(images, visual.embed),
            texts=join(texts, visual.embed),
            owners=join([rows + before for rows in owners], dtype=torch.int64),
            captions=gather_lists(captions),
            shown=join(shown, 3, visual.size, visual.size, dtype=torch.uint8)[:NUM_SHOWN],
        )

    def encode_labelled_uncached(self, source: Source) -> LabelledFeatures:
        """One pass yields both the unit features and what they are projected from."""
        visual = self.model.visual
        images, hidden, labels, samples = [], [], [], []
        skipped: list[Skip] = []
        for chunk, pixels in self.read_pixels(source, skipped):
            with self.autocast():
                features = visual.features(pixels)
                images.append(finish(visual.project(features), normalize=True).cpu())
            hidden.append(features.float().cpu())
            labels.append(read_labels(source, chunk.captions))
            samples.append(chunk.samples)
        everywhere, empty = join(images, visual.embed), read_labels(source, [])
        return LabelledFeatures(
            skipped=gather_skipped(skipped, len(everywhere)),
            images=everywhere,
            hidden=join(hidden, visual.width),
            labels=join(labels, *empty.shape[1:], dtype=empty.dtype),
            samples=join(samples, dtype=torch.int64),
        )

    def encode_images(self, source: Source, skipped: list[Skip]) -> Iterator[tuple[Chunk, Tensor]]:
        """Yield the chunks of this rank's share with their pictures' unit vectors, (N, E); ``skipped`` grows."""
        for chunk, pixels in self.read_pixels(source, skipped):
            yield chunk, self.encode_pictures(pixels)

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Normalised pictures -> (N, E) unit vectors on the CPU."""
        with self.autocast():
            return self.model.encode_image(pixels, True).cpu()

    def encode_captions(self, chunk: Chunk) -> Tensor:
        """The captions of a chunk -> (M, E) unit vectors on the CPU."""
        packed = pack(chunk.tokens, self.model.text.grid_edges(self.device, self.amp)).to(self.device)
        with self.autocast():
            return self.model.encode_text(packed, True).cpu()

    def read_pixels(self, source: Source, skipped: list[Skip]) -> Iterator[tuple[Chunk, Tensor]]:
        """Yield the chunks of this rank's share with their normalised pictures; ``skipped`` grows."""
        share = local_slice([*split_range(range(int(sum(source.sizes))), self.chunk_size)])
        for chunk in self.read_chunks(source, share):
            skipped += [(record.place, record.reason) for record in chunk.skipped]
            if len(chunk):
                yield chunk, self.pixels(chunk)

    def read_chunks(self, source: Source, ranges: Iterable[range], captions: int | None = None) -> Iterator[Chunk]:
        """Yield the chunk of each range of samples, which is empty if all of them are bad.

        Args:
            source: the samples.
            ranges: of at most ``chunk_size`` samples.
            captions: number of captions of each picture, its first; None for all.
        """
        reader = EvalReader(source, self.model.visual.preprocessing, self.tokenizer, captions)
        return load_chunks(reader, ranges, self.workers, pin=self.device.type == "cuda")

    def pixels(self, chunk: Chunk) -> Tensor:
        """The normalised pictures of a chunk, (N, 3, S, S), on the device."""
        return self.normalise(to_device(chunk.images, self.device))

    @cached_property
    def normalise(self) -> Normalise:
        return Normalise(self.model.visual.preprocessing, self.device)

    @property
    def chunk_size(self) -> int:
        """Most samples of a chunk."""
        return CPU_BATCH if self.device.type == "cpu" else MAX_CHUNK

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def load_or_encode(self, kind: type[FeaturesT], source: Source, encode: Callable[[Source], FeaturesT]) -> FeaturesT:
        """Read features from the cache, or encode them and fill it.

        Raises:
            UserError: the file is damaged, or cannot be written.
        """
        if self.cache is None:
            with evaluating(self.model):
                return encode(source)
        file = self.cache / f"{kind.__name__.lower()}-{self.cache_key(source)}.pt"
        if all(gather_lists([file.exists()])):
            try:
                return kind(**torch.load(file, weights_only=True))
            except (UnpicklingError, RuntimeError, EOFError, TypeError) as error:
                raise UserError(f"{file} is corrupt; delete it, and the features will be encoded again") from error
        with evaluating(self.model):
            features = encode(source)
        if rank() == 0:
            content = io.BytesIO()
            torch.save(vars(features), content)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, content.getbuffer())
            except OSError as error:
                raise UserError(
                    f"cache={file.parent} cannot be written: {error.strerror}; cache=null turns the cache off"
                ) from error
        return features

    def cache_key(self, source: Source) -> str:
        """Hash what the features depend on: weights, precision and data.

        Ids of data leave out directories, so the bytes of a few samples are hashed, too.
        """
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        parts = [FORMAT, self.weights_id, self.amp, tf32, source.id, probe_samples(source)]
        return gather_lists([blake2b(str(parts).encode(), digest_size=16).hexdigest()])[0]

    @cached_property
    def weights_id(self) -> list[Any]:
        """Identifies the model; the features of one fixed picture and text stand for the architecture."""
        preprocessing, tokens = self.model.visual.preprocessing, self.tokenizer(["a photo of a cat"])
        size = preprocessing.size
        ramp = torch.linspace(-1, 1, 3 * size * size, device=self.device).view(1, 3, size, size)
        with evaluating(self.model):
            probe = torch.cat(
                [self.model.encode_image(ramp, True), self.model.encode_text(tokens.to(self.device), True)]
            )
        return [
            checksum(self.model.state_dict()),
            tokens.tolist(),
            probe.cpu().numpy().round(3).tolist(),
            *preprocessing,
        ]


def join(parts: list[Tensor], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows of all ranks, in rank order, each of ``shape``; a rank may have no parts."""
    return gather_rows(torch.cat([torch.empty(0, *shape, dtype=dtype), *parts]))


def gather_skipped(skipped: list[Skip], encoded: int) -> list[Skip]:
    """The skipped pictures of all ranks.

    Raises:
        DataError: nothing was encoded; the message names the first picture.
    """
    everywhere = gather_lists(skipped)
    if everywhere and not encoded:
        place, reason = everywhere[0]
        raise DataError(f"none of the {len(everywhere):,} pictures to score can be used, for example {place}: {reason}")
    return everywhere
