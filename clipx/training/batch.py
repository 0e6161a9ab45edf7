"""Assemble the chunks of a step into micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipx.data.readers import Chunk
from clipx.loss.distill import Teacher
from clipx.models.packed import EDGES, Packed, pack
from clipx.tokenizer import Tokens


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go forward at once: b images and K captions of each.

    The images stay as the loader delivered them, pinned if there is a GPU: joining them here would copy them to memory
    that is not.
    """

    images: list[Tensor]  # of each chunk, (n, 3, S, S) uint8, or a frozen tower's features (n, D) fp16
    captions: Packed | Tensor  # b K, or features (b, D)
    ids: Tensor | None  # (b, 1 + K) picture id and caption ids of each image; None if the loss does not need them
    targets: Sequence[Teacher] = ()  # a teacher's features, fp16, of each chunk

    def __len__(self) -> int:
        return sum(map(len, self.images))


def split_micro_batches(
    chunks: Sequence[Chunk], size: int | None, edges: Sequence[int] | None = EDGES
) -> list[MicroBatch]:
    """Group chunks into micro-batches.

    Args:
        chunks: of a step; no chunk crosses the end of a micro-batch.
        size: samples of a micro-batch, the last may be smaller; None for one micro-batch.
        edges: of the grids of captions, as ``pack`` takes them.
    """
    groups: list[list[Chunk]] = []
    room = 0
    for chunk in chunks:
        if room == 0:
            groups.append([])
            room = size or sum(map(len, chunks))
        groups[-1].append(chunk)
        room -= len(chunk)
    return [to_micro_batch(group, edges) for group in groups]


def to_micro_batch(chunks: Sequence[Chunk], edges: Sequence[int] | None) -> MicroBatch:
    ids = [chunk.ids for chunk in chunks if chunk.ids is not None]
    images = [chunk.features.get("image", chunk.images) for chunk in chunks]
    targets = [chunk.targets for chunk in chunks if chunk.targets is not None]
    return MicroBatch(images, join_captions(chunks, edges), concat(ids) if ids else None, targets)


def join_captions(chunks: Sequence[Chunk], edges: Sequence[int] | None) -> Packed | Tensor:
    """The captions of all chunks, packed; or their features, if a frozen tower has encoded them."""
    if features := [chunk.features["text"] for chunk in chunks if "text" in chunk.features]:
        return concat(features)
    return pack(Tokens(*map(concat, zip(*(chunk.tokens for chunk in chunks), strict=True))), edges)


def concat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """``torch.cat`` that does not copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
