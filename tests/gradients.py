"""Gradients of a batch in float64, computed from the same chunks as in training."""

import torch
from torch import Tensor

from clipx.data.dummy import open_dummy
from clipx.data.images import Normalise, TrainCrop
from clipx.data.loader import train_ranges
from clipx.data.readers import Chunk, TrainReader
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer
from clipx.training.batch import MicroBatch, concat
from clipx.training.step import Features, MicroBatchEncoder

CPU = torch.device("cpu")


def chunks_of(batch: int, micro: int | None, rank: int = 0, world: int = 1) -> list[Chunk]:
    data = open_dummy(samples=512, val_samples=8)
    crop = TrainCrop(Preprocessing(64), (0.9, 1.0), "exact")
    reader = TrainReader(data.train, data.plan(0), crop, SimpleTokenizer(), identify=True)
    ranges, chunks = train_ranges(0, batch, micro, rank, world), []
    while sum(map(len, chunks)) < batch // world:
        chunks.append(reader.chunk(next(ranges)))
    return chunks


class Double(MicroBatchEncoder):
    """Encodes in float64, including the pictures."""

    def __call__(self, part: MicroBatch) -> Features:
        return Features(*self.forward(Normalise(Preprocessing(64))(concat(part.images)).double(), part.captions))


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), (a.shape, (a - b).norm() / b.norm())
