"""Captions without their padding: all tokens of a batch in one row; attention sees those of like length in a grid."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EDGES = (16, 32, 48, 64)        # tokens; captions between two edges share a grid


class Grid(NamedTuple):
    """Captions of like length side by side, (G, L): where attention sees them.  T of its places hold a token."""

    shape: tuple[int, int]
    places: Tensor              # (T,) of the tokens, row by row
    seen: Tensor                # (G, 1, 1, L) bool: what the end token sees, itself and all before it

    def spread(self, x: Tensor) -> Tensor:
        """(T, D) -> (G, L, D); zeros where there is no token."""
        return Spread.apply(x, self.places, self.shape)

    def gather(self, x: Tensor) -> Tensor:
        """(G, L, D) -> (T, D)."""
        return Gather.apply(x, self.places)


class Spread(torch.autograd.Function):
    """Rows to places of their own in a grid.  The way back is a gather: no sums, so no order of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(places)
        grid = x.new_zeros(shape[0] * shape[1], x.shape[-1])
        return grid.index_copy_(0, places, x).view(*shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.flatten(0, 1).index_select(0, *ctx.saved_tensors), None, None


class Gather(torch.autograd.Function):
    """The rows at some places of a grid, each place once; the opposite of ``Spread``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grid = grad.new_zeros(ctx.shape).flatten(0, 1)
        return grid.index_copy_(0, *ctx.saved_tensors, grad).view(ctx.shape), None


class Packed(NamedTuple):
    """B captions as T tokens, grid by grid."""

    ids: Tensor                 # (T,)
    positions: Tensor           # (T,) of each token in its caption
    ends: Tensor                # (B,) the row of each end token, captions in the order of the grids
    order: Tensor               # (B,) where each caption of the batch stands in that order
    grids: list[Grid]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """(T, D) -> (T', D) for each grid."""
        return x.split([len(grid.places) for grid in self.grids])


def pack(tokens: Tensor, lengths: Tensor | None = None, edges: Sequence[int] = EDGES) -> Packed:
    """Drop what stands behind the end tokens.

    A few grids waste no memory on one long caption.  Without edges there is one grid, as wide as ``tokens``: what a
    compiler sees then differs from batch to batch by nothing but the number of tokens.

    Args:
        tokens: (B, L) token ids; the highest id of a row is its end token.
        lengths: (B,) tokens of each caption, end token included, where they are known.
        edges: lengths at which another grid begins.

    Returns:
        What the text tower takes, on the device of ``tokens``.
    """
    if lengths is None:
        lengths = tokens.argmax(dim=-1) + 1
    kind = torch.bucketize(lengths, torch.tensor(edges, device=lengths.device))     # which grid
    order = kind.argsort(stable=True)
    columns, grids, positions, rows = torch.arange(tokens.shape[1], device=tokens.device), [], [], []
    for members in order.split(kind.bincount().tolist()):
        if not len(members):
            continue
        width = int(lengths[members].max()) if edges else tokens.shape[1]
        within = columns[:width] < lengths[members, None]                           # (G, L')
        row, column = within.nonzero(as_tuple=True)
        seen = within[:, None, None]
        grids.append(Grid((len(members), width), row * width + column, seen))
        positions.append(column)
        rows.append(members[row])
    positions, rows = torch.cat(positions), torch.cat(rows)
    return Packed(
        ids=tokens[rows, positions],
        positions=positions,
        ends=lengths[order].cumsum(0) - 1,
        order=order.argsort(),
        grids=grids,
    )
