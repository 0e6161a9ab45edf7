"""A model with what feeds it: encodes sources, once each, and keeps on disk what it is asked to keep."""

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

FORMAT = 2          # of the files with features
ON_CPU = 64         # pictures that go forward at once there: more take memory and save little time

Kind = TypeVar("Kind", Features, LabelledFeatures)


class Encoder:
    """Encodes for one model; all ranks do some of the work, and get all of it.

    Args:
        model: the model, on its device.
        tokenizer: the model's.
        workers: processes that read.
        amp: autocast's type, or None for float32.
        cache: directory where features are kept by what the weights and the data hold, or None.
    """

    def __init__(
        self, model: CLIP, tokenizer: SimpleTokenizer, workers: int, amp: torch.dtype | None, cache: Path | None = None
    ):
        self.model, self.tokenizer, self.workers, self.amp, self.cache = model, tokenizer, workers, amp, cache
        self.device = model.logit_scale.device
        self.seen: dict[str, LabelledFeatures] = {}

    def texts(self, texts: list[str]) -> Tensor:
        """Any texts -> (M, E) unit vectors."""
        return encode_texts(self.model, self.tokenizer, self.device, texts)

    def pairs(self, source: Source) -> Features:
        """All pictures and captions of a validation set."""
        return self.kept(Features, source, encode)

    def labelled(self, source: Source) -> LabelledFeatures:
        """All pictures of a labelled set; several evaluations of one set share them."""
        if source.id not in self.seen:
            self.seen[source.id] = self.kept(LabelledFeatures, source, encode_labelled)
        return self.seen[source.id]

    def kept(self, kind: type[Kind], source: Source, encode: Callable[..., Kind]) -> Kind:
        """From the cache where it is there, else encoded."""
        if self.cache is None:
            return encode(self.model, self.chunks(source), self.device, self.amp)
        file = self.cache / f"{kind.__name__.lower()}-{self.key(source)}.pt"
        if all(gather_lists([file.exists()])):
            return read_features(kind, file)
        features = encode(self.model, self.chunks(source), self.device, self.amp)
        if rank() == 0:
            write_features(features, file)
        return features

    def chunks(self, source: Source) -> Iterator[Chunk]:
        """This rank's share."""
        reader = EvalReader(source, self.model.visual.size, self.tokenizer)
        size = ON_CPU if self.device.type == "cpu" else MAX_CHUNK
        own = local_slice([*split_range(range(int(sum(source.sizes))), size)])
        return load_chunks(reader, own, self.workers, pin=self.device.type == "cuda")

    def key(self, source: Source) -> str:
        """A hash of all that features depend on: weights, and what the model makes of one picture and one text (which
        tells its architecture), precision, and the bytes of the pictures and captions."""
        model, size = self.model, self.model.visual.size
        tokens = self.tokenizer(["a photo of a cat"])
        ramp = torch.linspace(-1, 1, 3 * size * size, device=self.device).view(1, 3, size, size)
        with torch.no_grad():
            probe = torch.cat([model.encode_image(ramp, True), model.encode_text(tokens.to(self.device), True)])
        told = [FORMAT, checkpoint.checksum(model.state_dict()), tokens.tolist(),
                probe.cpu().numpy().round(3).tolist(), size, self.amp,
                *gather_lists([digest(source, sample) for sample in local_slice(range(int(sum(source.sizes))))])]
        return gather_lists([blake2b(str(told).encode(), digest_size=16).hexdigest()])[0]


def digest(source: Source, sample: int) -> str:
    """Of the bytes of a sample."""
    try:
        found = source.read(sample)
    except BadSample as error:
        return f"{sample} {error}"
    words = "\n".join(found.captions).encode()
    return blake2b(found.picture + b"\n" + words, digest_size=16).hexdigest()


def read_features(kind: type[Kind], file: Path) -> Kind:
    try:
        return kind(**torch.load(file, weights_only=True))
    except (UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        raise UserError(f"{file} is damaged; delete it, and it is made again") from error


def write_features(features: Kind, file: Path) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(features), temporary)
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"cache={file.parent} cannot be written: {error.strerror}; cache=null keeps nothing") from error
