"""The image tower: a Vision Transformer that reads its feature at the class token."""

from typing import Any

import torch
from pydantic import PositiveInt
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

    The defaults are ViT-B/32.  Source: Radford et al. 2021, section 2.4 and table 20 (arXiv 2103.00020).
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
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"patch={patch} does not divide size={size}")
        self.preprocessing = Preprocessing.of(size, mean, std, interpolation)
        self.width, self.embed, self.heads, self.act = width, embed, heads, act
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, depth, heads, causal=False, act=act)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed))

    def arguments(self) -> dict[str, Any]:
        size, mean, std, interpolation = self.preprocessing
        return {
            "size": size, "patch": self.conv1.kernel_size[0], "width": self.width,
            "depth": len(self.transformer.resblocks), "heads": self.heads, "embed": self.embed, "act": self.act,
            "mean": [*mean], "std": [*std], "interpolation": interpolation,
        }  # fmt: skip

    def stages(self) -> list[list[nn.Parameter]]:
        """The parameters from input to output: embeddings, each block, projection."""
        return split_stages(self, head=("ln_post", "proj"))

    def set_grad_checkpoint(self, on: bool) -> None:
        self.transformer.grad_checkpoint = on

    def features(self, image: Tensor) -> Tensor:
        x = embed_patches(image, self.conv1.weight)  # (B, L-1, D), row by row
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # (B, 1, D)
        x = torch.cat([first, x], dim=1) + self.positional_embedding  # (B, L, D)
        return self.ln_post(self.transformer(self.ln_pre(x)))  # (B, D), at the class token

    def project(self, features: Tensor) -> Tensor:
        return features @ self.proj
