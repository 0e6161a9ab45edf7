"""Assemble the chunks of a step into micro-batches."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipx.data.readers import Chunk
from clipx.models.packed import EDGES, Packed, pack

WIDTH_MULTIPLE = 16     # tokens; compiled models pad captions to a multiple of it


class MicroBatch(NamedTuple):
    """Samples that go forward at once."""

    image: Tensor           # (b, 3, S, S) uint8
    captions: Packed
    ids: Tensor | None      # (b, 2) picture id and caption id of each row; None if the loss does not need them

    def __len__(self) -> int:
        return len(self.image)


def split_micro_batches(chunks: Sequence[Chunk], size: int | None, few_shapes: bool = False) -> list[MicroBatch]:
    """Group chunks into micro-batches.

    Args:
        chunks: of a step; no chunk crosses the end of a micro-batch.
        size: samples of a micro-batch, the last may be smaller; None for one micro-batch.
        few_shapes: limit the number of caption shapes, for a compiled model.
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
        width = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    tokens = padded_tokens(chunks, width)
    ids = None if chunks[0].ids is None else concat([chunk.ids for chunk in chunks])
    captions = pack(tokens, concat([chunk.lengths for chunk in chunks]), () if few_shapes else EDGES)
    return MicroBatch(concat([chunk.images for chunk in chunks]), captions, ids)


def padded_tokens(chunks: Sequence[Chunk], width: int) -> Tensor:
    """Captions padded to ``width`` tokens. -> (B, width)."""
    return concat([F.pad(chunk.tokens, (0, width - chunk.tokens.shape[1])) for chunk in chunks])


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` that does not copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
