"""Layers of both towers.  Names and shapes are OpenAI's, so weights need no conversion.

Shape letters, used throughout: B batch, L tokens, T tokens of a whole batch, D width, H heads, E embedding,
N images, M texts, S pixels.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipx.models.kernels import attention, varlen_attention
from clipx.models.packed import Packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The matrix product that takes nearly all of the time. (..., D), (O, D), (O,) -> (..., O).

    On a CPU, float32 runs as a 1x1 convolution, which torch dispatches to oneDNN instead of MKL: the same products
    without a copy, and twice as fast on an AMD CPU.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not on_cpu or torch.compiler.is_compiling():  # a convolution is compiled anew for each number of rows
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, D, T, 1), channels last in memory
    y = F.conv2d(pixels, weight[:, :, None, None], bias)  # (1, O, T, 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """``nn.Linear`` computed by ``linear``. (..., D) -> (..., O)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU that CLIP was trained with, in torch's fused kernel for y * sigmoid(y)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


Act = Literal["quick_gelu", "gelu"]
ACTS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's, and the exact one


class Attention(nn.Module):
    """Multi-head self-attention; ``causal`` hides later tokens. (B, L, D) -> (B, L, D), packed (T, D) -> (T, D)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3D), one product
        if packed is None:
            return self.out_proj(self.attend(qkv))
        if not packed.grids:
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)  # (T, H, D/H) each
            rows = varlen_attention(q, k, v, packed.offsets, packed.offsets, packed.longest, self.causal)
            return self.out_proj(rows.flatten(1))
        parts = zip(packed.split(qkv), packed.grids, strict=True)  # (T', 3D) each
        return self.out_proj(torch.cat([grid.gather(self.attend(grid.spread(part))) for part, grid in parts]))

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, L, 3D) -> (B, L, D)."""
        q, k, v = self.by_head(qkv, 3)  # (B, H, L, D/H) each
        x = attention(q, k, v, causal=self.causal)  # (B, H, L, D/H)
        return x.transpose(1, 2).flatten(2)

    def read_out(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        """``forward`` at the read-out tokens only: (B, L, D) or (T, D) -> (B, D)."""
        D, weight = x.shape[-1], self.in_proj_weight
        q = linear(read_out(x, packed), weight[:D], self.in_proj_bias[:D])  # (B, D)
        kv = linear(x, weight[D:], self.in_proj_bias[D:])  # (B, L, 2D)
        if packed is None:
            return self.out_proj(self.attend_once(q, kv))
        if not packed.grids:
            k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(1)  # (T, H, D/H) each
            one_each = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
            rows = varlen_attention(q.unflatten(-1, (self.heads, -1)), k, v, one_each, packed.offsets, packed.longest)
            return self.out_proj(rows.flatten(1))
        queries = q.split([len(grid.seen) for grid in packed.grids])
        parts = zip(queries, packed.split(kv), packed.grids, strict=True)
        return self.out_proj(torch.cat([self.attend_once(q, grid.spread(kv), grid.seen) for q, kv, grid in parts]))

    def attend_once(self, q: Tensor, kv: Tensor, seen: Tensor | None = None) -> Tensor:
        """One query per row: (B, D), (B, L, 2D) -> (B, D)."""
        (q,), (k, v) = self.by_head(q[:, None], 1), self.by_head(kv, 2)  # (B, H, 1, D/H), (B, H, L, D/H)
        return attention(q, k, v, seen=seen).flatten(1)

    def by_head(self, x: Tensor, parts: int) -> Tensor:
        """(B, L, parts D) -> (parts, B, H, L, D/H)."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


class MLP(nn.Module):
    """Two layers with a hidden width of 4 D. (..., D) -> (..., D)."""

    def __init__(self, width: int, act: Act):
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.gelu = ACTS[act]()
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class LayerScale(nn.Module):
    """A learnt gain for each channel, all equal at first. (..., D) -> (..., D).

    Source: Touvron et al. 2021, section 2 (arXiv 2103.17239); the name of the gain is open_clip's.
    """

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention, then MLP, each with pre-norm and residual. (B, L, D) -> (B, L, D), packed (T, D) -> (T, D).

    With ``read``, compute the read-out tokens only: -> (B, D).
    """

    def __init__(self, width: int, heads: int, causal: bool, act: Act, layer_scale: float | None = None):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ls_1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, act)
        self.ls_2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor, packed: Packed | None = None, read: bool = False) -> Tensor:
        if read:
            x = read_out(x, packed) + self.ls_1(self.attn.read_out(self.ln_1(x), packed))
        else:
            x = x + self.ls_1(self.attn(self.ln_1(x), packed))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def read_out(x: Tensor, packed: Packed | None) -> Tensor:
    """The read-out tokens: the first of each row, or the end tokens of packed captions. -> (B, D)."""
    return x[:, 0] if packed is None else x.index_select(0, packed.ends)


class Transformer(nn.Module):
    """A stack of blocks, read out at one token per row. (B, L, D) or packed (T, D) -> (B, D).

    ``grad_checkpoint`` drops the activations inside each block and recomputes them in the backward pass.
    """

    def __init__(self, width: int, depth: int, heads: int, causal: bool, act: Act, layer_scale: float | None = None):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, causal, act, layer_scale) for _ in range(depth))
        self.grad_checkpoint = False

    def forward(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        for block in self.resblocks:
            last = block is self.resblocks[-1]
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, packed, last, use_reentrant=False)
            else:
                x = block(x, packed, last)
        return x


def split_stages(tower: nn.Module, head: Sequence[str]) -> list[list[nn.Parameter]]:
    """Split the parameters of a tower with a ``transformer``: what comes before it, each block, and the head.

    Args:
        head: names of the modules and parameters after the blocks.
    """
    by_part: dict[str, list[nn.Parameter]] = {}
    for name, parameter in tower.named_parameters():
        first, *rest = name.split(".")
        part = "head" if first in head else f"block {rest[1]}" if first == "transformer" else "embeddings"
        by_part.setdefault(part, []).append(parameter)
    blocks = [by_part[part] for part in by_part if part.startswith("block")]
    return [by_part["embeddings"], *blocks, by_part["head"]]
