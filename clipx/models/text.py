"""The text tower: a causal transformer that reads its feature at the end-of-text token."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from clipx.models.layers import Act, Block, Transformer, split_stages
from clipx.models.packed import Packed, pack, unpad
from clipx.models.tower import TextTower
from clipx.tokenizer import SimpleTokenizer

VOCABULARY = 49_408  # token ids of the tokenizer, 0 to END


class TextEncoder(TextTower):
    """Captions to features. (B, L) token ids, or packed -> (B, E), for any L up to ``context``.

    Attention is causal and the feature is read at the end token, so the padding after it is dropped.

    Args:
        vocab: number of token ids, at least the tokenizer's; its highest id is the end token.
        context: maximum tokens of a caption, including start and end.
        width: D, channels of a token.
        depth: blocks.
        heads: attention heads; divides ``width``.
        embed: E, size of the feature.
        act: activation of the MLPs: ``quick_gelu``, which CLIP was trained with, or the exact ``gelu``.
        layer_scale: as in ``ImageEncoder``.

    The defaults are ViT-B/32's.  Source: Radford et al. 2021, section 2.4 and table 20 (arXiv 2103.00020).
    """

    def __init__(
        self,
        vocab: PositiveInt = VOCABULARY,
        context: PositiveInt = 77,
        width: PositiveInt = 512,
        depth: PositiveInt = 12,
        heads: PositiveInt = 8,
        embed: PositiveInt = 512,
        act: Act = "quick_gelu",
        layer_scale: PositiveFloat | None = None,
    ):
        super().__init__()
        if vocab < VOCABULARY:
            raise ValueError(f"vocab={vocab} is too small: the tokenizer has {VOCABULARY:,} token ids")
        self.tokenizer = SimpleTokenizer(context)
        self.width, self.embed, self.heads, self.act, self.layer_scale = width, embed, heads, act, layer_scale
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.transformer = Transformer(width, depth, heads, causal=True, act=act, layer_scale=layer_scale)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed))
        self.initialise(width, depth)

    def initialise(self, width: int, depth: int) -> None:
        """OpenAI's initial weights: the residual branches shrink with depth."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def arguments(self) -> dict[str, Any]:
        return {
            "vocab": len(self.token_embedding.weight), "context": self.context, "width": self.width,
            "depth": len(self.transformer.resblocks), "heads": self.heads, "embed": self.embed, "act": self.act,
            "layer_scale": self.layer_scale,
        }  # fmt: skip

    def stages(self) -> list[list[nn.Parameter]]:
        """The parameters from input to output: embeddings, each block, projection."""
        return split_stages(self, head=("ln_final", "text_projection"))

    def set_grad_checkpoint(self, on: bool) -> None:
        self.transformer.grad_checkpoint = on

    def features(self, tokens: Tensor | Packed) -> Tensor:
        packed = tokens if isinstance(tokens, Packed) else pack(unpad(tokens))
        x = self.token_embedding(packed.ids) + F.embedding(packed.positions, self.positional_embedding)  # (T, D)
        x = self.ln_final(self.transformer(x, packed))  # (B, D), at the end tokens
        return x.index_select(0, packed.order)

    def project(self, features: Tensor) -> Tensor:
        return features @ self.text_projection
