"""Captions without padding: all tokens of a batch in one row.

Attention takes them as they lie where torch has a kernel for that (CUDA, half precision), else in grids of similar
length.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from clipx.models.kernels import has_varlen
from clipx.tokenizer import Tokens

EDGES = (16, 32, 48, 64)  # tokens; captions with lengths between two edges share a grid
WIDTH_MULTIPLE = 16  # tokens; the width of a single grid, for compiled models
LONGEST_MULTIPLE = 128  # tokens; a tile of the kernel, so that the bound hardly ever changes


class Grid(NamedTuple):
    """G captions of similar length as a (G, L) grid for attention.  T of its cells contain a token."""

    places: Tensor  # (T,) flat indices of the tokens, row by row
    seen: Tensor  # (G, 1, 1, L) bool: tokens up to the end token

    def spread(self, x: Tensor) -> Tensor:
        """(T, D) -> (G, L, D); zeros where there is no token."""
        return Spread.apply(x, self.places, self.seen)

    def gather(self, x: Tensor) -> Tensor:
        """(G, L, D) -> (T, D)."""
        return Gather.apply(x, self.places)


class Spread(torch.autograd.Function):
    """Scatter rows into the cells of a grid.  The backward pass is a gather: no sums, so it is deterministic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, seen: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        rows, _, _, width = seen.shape
        grid = x.new_zeros(rows * width, x.shape[-1])
        return grid.index_copy_(0, places, x).view(rows, width, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.flatten(0, 1).index_select(0, *ctx.saved_tensors), None, None


class Gather(torch.autograd.Function):
    """Gather the rows of distinct cells of a grid; the inverse of ``Spread``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grid = grad.new_zeros(ctx.shape).flatten(0, 1)
        (places,) = ctx.saved_tensors
        return grid.index_copy_(0, places, grad).view(ctx.shape), None


class Packed(NamedTuple):
    """B captions as T tokens, grid by grid."""

    ids: Tensor  # (T,)
    positions: Tensor  # (T,) of each token in its caption
    order: Tensor  # (B,) index of each caption in grid order
    offsets: Tensor  # (B+1,) int32, row of each start token, captions in grid order; and T
    longest: int  # a bound for the tokens of a caption
    grids: list[Grid]  # empty for a kernel that needs none

    @property
    def ends(self) -> Tensor:
        """(B,) row of each end token."""
        return self.offsets[1:] - 1

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """(T, D) -> (T', D) for each grid."""
        return x.split([len(grid.places) for grid in self.grids])

    def to(self, device: torch.device) -> "Packed":
        """The same captions on a device, copied as ``to_device`` does."""
        return tree_map_only(Tensor, lambda x: to_device(x, device), self)


def pack(tokens: Tokens, edges: Sequence[int] | None = EDGES) -> Packed:
    """Arrange captions in grids, those of similar length together.

    Several grids keep one long caption from widening all rows.  Without edges there is one grid, its width a multiple
    of 16, so that shapes differ between batches in little more than the number of tokens, which suits a compiler.

    Args:
        tokens: of the captions.
        edges: lengths at which a new grid begins; None for captions as they lie, without grids.

    Returns:
        Packed captions, on the device of ``tokens``.
    """
    ids, lengths = tokens
    kind = torch.bucketize(lengths, torch.tensor(edges or (), device=lengths.device))  # which grid
    order = kind.argsort(stable=True)
    starts = lengths.cumsum(0) - lengths  # (B,) row of each start token
    offsets = F.pad(lengths[order].cumsum(0), (1, 0))  # (B+1,)
    positions = torch.arange(len(ids), device=ids.device) - offsets[:-1].repeat_interleave(lengths[order])
    rows = starts[order].repeat_interleave(lengths[order]) + positions
    grids = []
    if edges is not None:
        groups = order.split(kind.bincount().tolist())
        grids = [make_grid(lengths[group], 1 if edges else WIDTH_MULTIPLE) for group in groups if len(group)]
    return Packed(
        ids=ids[rows],
        positions=positions,
        order=order.argsort(),
        offsets=offsets.int(),
        longest=round_up(int(lengths.max()), LONGEST_MULTIPLE),
        grids=grids,
    )


def grid_edges(device: torch.device, amp: torch.dtype | None, compiled: bool = False) -> Sequence[int] | None:
    """Edges of the grids of captions: none where attention needs no grids, one grid for a compiled model."""
    return None if has_varlen(device, amp) else () if compiled else EDGES


def make_grid(lengths: Tensor, multiple: int) -> Grid:
    """A grid of captions, its width a multiple of ``multiple`` tokens."""
    width = round_up(int(lengths.max()), multiple)
    seen = torch.arange(width, device=lengths.device) < lengths[:, None]  # (G, L)
    return Grid(seen.flatten().nonzero()[:, 0], seen[:, None, None])


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the host to a device; to a GPU from pinned memory, so that the program does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def unpad(tokens: Tensor) -> Tokens:
    """(B, L) token ids, padded after the end token, which is the highest id of a row."""
    lengths = tokens.argmax(dim=-1) + 1
    return Tokens(tokens[torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]], lengths)
