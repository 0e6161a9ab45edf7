"""The parts that both towers are made of.  Names and shapes are OpenAI's, so weights need no conversion.

Shape letters, here and everywhere: B batch, L tokens, D width, H heads, E embedding, N images, M texts, S pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention; ``causal`` hides later tokens. (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)                            # (B, L, 3D), one product
        q, k, v = qkv.view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)      # (B, H, L, D/H) each
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)                   # (B, H, L, D/H)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    """Two layers, four times as wide between them. (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = QuickGELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention, then MLP, each behind a LayerNorm and beside a skip. (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. (B, L, D) -> (B, L, D).

    ``grad_checkpoint`` forgets what is inside each block on the way forward and computes it again on the way back.
    """

    def __init__(self, width: int, depth: int, heads: int, causal: bool):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, causal) for _ in range(depth))
        self.grad_checkpoint = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x
