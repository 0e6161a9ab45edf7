"""Encode data sets with a model, with an optional feature cache on disk."""

import os
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import torch
from torch import Tensor

from clipx.data.loader import MAX_CHUNK, load_chunks, split_range
from clipx.data.readers import Chunk, EvalReader
from clipx.data.sample import BadSample, Source
from clipx.distributed import gather_lists, local_slice, rank
from clipx.errors import UserError
from clipx.evals.features import Features, LabelledFeatures, encode, encode_labelled, encode_texts
from clipx.models.clip import CLIP
from clipx.tokenizer import SimpleTokenizer
from clipx.weights import checkpoint

FORMAT = 2              # of the feature files
CPU_BATCH = 64          # pictures; larger batches take memory on a CPU and save little time

FeaturesT = TypeVar("FeaturesT", Features, LabelledFeatures)


class EvalEncoder:
    """Encode pictures and texts with one model.  Ranks share the work; each gets the whole result.

    Args:
        model: the model, on its device.
        tokenizer: the model's.
        workers: number of loader processes.
        amp: autocast dtype, or None for float32.
        cache: directory of cached features, keyed by weights and data, or None.
    """

    def __init__(
        self, model: CLIP, tokenizer: SimpleTokenizer, workers: int, amp: torch.dtype | None, cache: Path | None = None
    ):
        self.model, self.tokenizer, self.workers, self.amp, self.cache = model, tokenizer, workers, amp, cache
        self.device = model.logit_scale.device
        self.labelled: dict[str, LabelledFeatures] = {}      # by id of the source

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Texts -> (M, E) unit vectors."""
        return encode_texts(self.model, self.tokenizer, self.device, texts)

    def encode_pairs(self, source: Source) -> Features:
        """Encode all pictures and captions of a validation set."""
        return self.load_or_encode(Features, source, encode)

    def encode_labelled(self, source: Source) -> LabelledFeatures:
        """Encode all pictures of a labelled set, once for all evaluations that use it."""
        if source.id not in self.labelled:
            self.labelled[source.id] = self.load_or_encode(LabelledFeatures, source, encode_labelled)
        return self.labelled[source.id]

    def load_or_encode(self, kind: type[FeaturesT], source: Source, encode: Callable[..., FeaturesT]) -> FeaturesT:
        """Read features from the cache, or encode them and fill it."""
        if self.cache is None:
            return encode(self.model, self.chunks(source), self.device, self.amp)
        file = self.cache / f"{kind.__name__.lower()}-{self.cache_key(source)}.pt"
        if all(gather_lists([file.exists()])):
            return read_features(kind, file)
        features = encode(self.model, self.chunks(source), self.device, self.amp)
        if rank() == 0:
            write_features(features, file)
        return features

    def chunks(self, source: Source) -> Iterator[Chunk]:
        """Yield the chunks of this rank's share."""
        reader = EvalReader(source, self.model.visual.size, self.tokenizer)
        size = CPU_BATCH if self.device.type == "cpu" else MAX_CHUNK
        share = local_slice([*split_range(range(int(sum(source.sizes))), size)])
        return load_chunks(reader, share, self.workers, pin=self.device.type == "cuda")

    def cache_key(self, source: Source) -> str:
        """Hash everything that the features depend on: weights, precision, and the bytes of pictures and captions.

        The features of one fixed picture and text stand for the architecture.
        """
        model, size = self.model, self.model.visual.size
        tokens = self.tokenizer(["a photo of a cat"])
        ramp = torch.linspace(-1, 1, 3 * size * size, device=self.device).view(1, 3, size, size)
        with torch.no_grad():
            probe = torch.cat([model.encode_image(ramp, True), model.encode_text(tokens.to(self.device), True)])
        parts = [FORMAT, checkpoint.checksum(model.state_dict()), tokens.tolist(),
                 probe.cpu().numpy().round(3).tolist(), size, self.amp,
                 *gather_lists([sample_digest(source, one) for one in local_slice(range(int(sum(source.sizes))))])]
        return gather_lists([blake2b(str(parts).encode(), digest_size=16).hexdigest()])[0]


def sample_digest(source: Source, sample: int) -> str:
    """Hash the bytes of a sample."""
    try:
        found = source.read(sample)
    except BadSample as error:
        return f"{sample} {error}"
    captions = "\n".join(found.captions).encode()
    return blake2b(found.picture + b"\n" + captions, digest_size=16).hexdigest()


def read_features(kind: type[FeaturesT], file: Path) -> FeaturesT:
    try:
        return kind(**torch.load(file, weights_only=True))
    except (UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        raise UserError(f"{file} is damaged; delete it, and it will be encoded again") from error


def write_features(features: FeaturesT, file: Path) -> None:
    """Write a feature file atomically."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(features), temporary)
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"cache={file.parent} cannot be written: {error.strerror}; cache=null turns the cache "
                        "off") from error
