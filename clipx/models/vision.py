"""The image tower: a Vision Transformer that reads its feature at the class token."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from clipx.models.kernels import embed_patches
from clipx.models.layers import Act, Transformer, split_stages
from clipx.models.tower import ImageTower
from clipx.preprocessing import MEAN, STD, Channels, Interpolation, Preprocessing


class ImageEncoder(ImageTower):
    """Pictures to features. (B, 3, S, S) normalised floats -> (B, E).

    Args:
        size: side of the picture S, pixels.
        patch: side of a patch, pixels; divides ``size``.
        width: D, channels of a token.
        depth: blocks.
        heads: attention heads; divides ``width``.
        embed: E, size of the feature.
        act: activation of the MLPs: ``quick_gelu``, which CLIP was trained with, or the exact ``gelu``.
        mean: of the pixels in [0, 1] of the pictures, by channel; they are normalised with it.
        std: standard deviation of the pixels.
        interpolation: filter that resizes the pictures.
        registers: R, learnt tokens without a position, which attention may use to store what belongs to no patch.
        layer_scale: initial gain of each block's attention and MLP, then learnt by channel; None for no gain.

    The defaults are ViT-B/32.  Source: Radford et al. 2021, section 2.4 and table 20 (arXiv 2103.00020);
    registers: Darcet et al. 2023 (arXiv 2309.16588); gains: Touvron et al. 2021 (arXiv 2103.17239).
    """

    def __init__(
        self,
        size: PositiveInt = 224,
        patch: PositiveInt = 32,
        width: PositiveInt = 768,
        depth: PositiveInt = 12,
        heads: PositiveInt = 12,
        embed: PositiveInt = 512,
        act: Act = "quick_gelu",
        mean: Channels = MEAN,
        std: Channels = STD,
        interpolation: Interpolation = "bicubic",
        registers: NonNegativeInt = 0,
        layer_scale: PositiveFloat | None = None,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"patch={patch} does not divide size={size}")
        self.preprocessing = Preprocessing.of(size, mean, std, interpolation)
        self.width, self.embed, self.heads, self.act, self.layer_scale = width, embed, heads, act, layer_scale
        self.patch_dropout = 0.0
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((size // patch) ** 2 + 1, width))
        self.register_tokens = nn.Parameter(scale * torch.randn(registers, width)) if registers else None
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, depth, heads, causal=False, act=act, layer_scale=layer_scale)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed))

    def arguments(self) -> dict[str, Any]:
        size, mean, std, interpolation = self.preprocessing
        return {
            "size": size, "patch": self.conv1.kernel_size[0], "width": self.width,
            "depth": len(self.transformer.resblocks), "heads": self.heads, "embed": self.embed, "act": self.act,
            "mean": [*mean], "std": [*std], "interpolation": interpolation,
            "registers": 0 if self.register_tokens is None else len(self.register_tokens),
            "layer_scale": self.layer_scale,
        }  # fmt: skip

    def stages(self) -> list[list[nn.Parameter]]:
        """The parameters from input to output: embeddings, each block, projection."""
        return split_stages(self, head=("ln_post", "proj"))

    def set_grad_checkpoint(self, on: bool) -> None:
        self.transformer.grad_checkpoint = on

    def set_patch_dropout(self, share: float) -> None:
        """Leave out a share of the patches in training, others for each picture and step; one always stays.

        Source: Li et al. 2022, FLIP (arXiv 2212.00794).
        """
        self.patch_dropout = share

    def features(self, image: Tensor) -> Tensor:
        x = embed_patches(image, self.conv1.weight)  # (B, L-1, D), row by row
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # (B, 1, D)
        x = torch.cat([first, x], dim=1) + self.positional_embedding  # (B, L, D)
        if self.training and self.patch_dropout:
            x = drop_patches(x, self.patch_dropout)
        if self.register_tokens is not None:
            x = torch.cat([x, self.register_tokens.to(x.dtype).expand(len(x), -1, -1)], dim=1)  # (B, L+R, D)
        return self.ln_post(self.transformer(self.ln_pre(x)))  # (B, D), at the class token

    def project(self, features: Tensor) -> Tensor:
        return features @ self.proj


def drop_patches(x: Tensor, share: float) -> Tensor:
    """Keep the class token and a random choice of the patches of each row. (B, L, D) -> (B, L', D)."""
    B, L, D = x.shape
    kept = max(1, round((1 - share) * (L - 1)))
    drawn = torch.rand(B, L - 1, device=x.device).topk(kept, dim=1).indices + 1  # (B, L'-1)
    places = F.pad(drawn, (1, 0)) + L * torch.arange(B, device=x.device)[:, None]  # (B, L'), of all B L tokens
    return x.reshape(-1, D).index_select(0, places.flatten()).view(B, -1, D)
