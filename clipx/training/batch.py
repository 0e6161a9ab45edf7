"""From the chunks of a step to micro-batches."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipx.data.readers import Chunk
from clipx.models.packed import EDGES, Packed, pack

WIDTH = 16              # tokens: for a compiler, grids are as wide as a multiple of it


class MicroBatch(NamedTuple):
    """A micro-batch: what goes forward at once."""

    image: Tensor           # (b, 3, S, S) uint8
    captions: Packed
    ids: Tensor | None      # (b, 2), which picture and which caption a row has; None where nobody asked

    def __len__(self) -> int:
        return len(self.image)


def split_micro_batches(chunks: Sequence[Chunk], size: int | None, few_shapes: bool = False) -> list[MicroBatch]:
    """Micro-batches.

    Args:
        chunks: of a step; none reaches across the end of a micro-batch.
        size: samples of each but the last; None for all at once.
        few_shapes: whether their captions come in few shapes, for a compiler.
    """
    groups: list[list[Chunk]] = []
    room = 0
    for chunk in chunks:
        if room == 0:
            groups.append([])
            room = size or sum(map(len, chunks))
        groups[-1].append(chunk)
        room -= len(chunk)
    return [to_micro_batch(group, few_shapes) for group in groups]


def to_micro_batch(chunks: Sequence[Chunk], few_shapes: bool) -> MicroBatch:
    width = max(chunk.tokens.shape[1] for chunk in chunks)
    if few_shapes:
        width = -(-width // WIDTH) * WIDTH
    tokens = padded_tokens(chunks, width)
    ids = None if chunks[0].ids is None else concat([chunk.ids for chunk in chunks])
    captions = pack(tokens, concat([chunk.lengths for chunk in chunks]), () if few_shapes else EDGES)
    return MicroBatch(concat([chunk.images for chunk in chunks]), captions, ids)


def padded_tokens(chunks: Sequence[Chunk], width: int) -> Tensor:
    """The captions of some chunks, each ``width`` tokens wide: (B, width)."""
    return concat([F.pad(chunk.tokens, (0, width - chunk.tokens.shape[1])) for chunk in chunks])


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """One behind the other; a single one as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
