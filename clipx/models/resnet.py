"""A convolutional image tower: a small ResNet that reads its feature as a mean over the picture."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipx.models.tower import ImageTower
from clipx.preprocessing import MEAN, STD, Channels, Interpolation, Preprocessing

GROUPS = 8  # of channels that are normalised together
RESIDUAL_GAIN = 0.2  # initial gain of what a block adds


class ResNetEncoder(ImageTower):
    """Pictures to features. (B, 3, S, S) normalised floats -> (B, E).

    Learns from fewer pictures than a Vision Transformer, as it need not learn that neighbouring pixels belong together.
    GroupNorm in place of BatchNorm makes the feature of a picture independent of its batch, so micro-batches and ranks
    do not change the gradient.

    Args:
        size: side of the picture S, pixels.
        widths: channels of each stage; the last is D.  The first stage works on a map of S/2, each further one on half
            the size of the one before.
        depths: blocks of each stage.
        embed: E, size of the feature.
        mean: of the pixels in [0, 1] of the pictures, by channel; they are normalised with it.
        std: standard deviation of the pixels.
        interpolation: filter that resizes the pictures.

    Sources: He et al. 2016 (arXiv 1512.03385); the shortcut that averages: ResNet-D, He et al. 2018 (arXiv 1812.01187);
    Wu and He 2018, GroupNorm (arXiv 1803.08494).
    """

    def __init__(
        self,
        size: PositiveInt = 48,
        widths: Annotated[Sequence[PositiveInt], Field(min_length=1)] = (32, 64, 128, 256),
        depths: Annotated[Sequence[PositiveInt], Field(min_length=1)] = (1, 1, 1, 1),
        embed: PositiveInt = 192,
        mean: Channels = MEAN,
        std: Channels = STD,
        interpolation: Interpolation = "bicubic",
    ):
        super().__init__()
        if len(widths) != len(depths):
            stages = f"{len(widths)} values, one for each of widths={[*widths]}"
            raise ValueError(f"depths={[*depths]}: should have {stages}")
        if size % 2 ** len(widths):
            raise ValueError(f"size={size} is not divisible by {2 ** len(widths)}, as {len(widths)} stages need")
        if wrong := [width for width in widths if width % GROUPS]:
            raise ValueError(f"widths={[*widths]}: {wrong[0]} is not divisible by {GROUPS}")
        self.preprocessing = Preprocessing.of(size, mean, std, interpolation)
        self.width, self.embed, self.widths, self.depths = widths[-1], embed, [*widths], [*depths]
        self.stem = convolution(3, widths[0], kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        for (before, after), depth in zip(pairwise([widths[0], *widths]), depths, strict=True):
            first = ResNetBlock(before, after, halve=len(self.blocks) > 0)
            self.blocks.extend([first, *(ResNetBlock(after, after) for _ in range(depth - 1))])
        self.proj = nn.Parameter(self.width**-0.5 * torch.randn(self.width, embed))
        self.grad_checkpoint = False

    def arguments(self) -> dict[str, Any]:
        size, mean, std, interpolation = self.preprocessing
        return {
            "size": size, "widths": self.widths, "depths": self.depths, "embed": self.embed,
            "mean": [*mean], "std": [*std], "interpolation": interpolation,
        }  # fmt: skip

    def stages(self) -> list[list[nn.Parameter]]:
        """The parameters from input to output: stem, each block, projection."""
        return [[*self.stem.parameters()], *([*block.parameters()] for block in self.blocks), [self.proj]]

    def set_grad_checkpoint(self, on: bool) -> None:
        self.grad_checkpoint = on

    def features(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image.contiguous(memory_format=torch.channels_last)))  # (B, C, S/2, S/2)
        for block in self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x.mean(dim=(2, 3))  # (B, D)

    def project(self, features: Tensor) -> Tensor:
        return features @ self.proj


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. (B, C, H, W) -> (B, C', H, W), or half the size with ``halve``."""

    def __init__(self, before: int, after: int, halve: bool = False):
        super().__init__()
        self.conv1 = convolution(before, after, kernel=3, stride=2 if halve else 1)
        self.conv2 = convolution(after, after, kernel=3, gain=RESIDUAL_GAIN)
        self.shortcut: nn.Module = nn.Identity()
        if halve or before != after:
            pool = nn.AvgPool2d(2) if halve else nn.Identity()
            self.shortcut = nn.Sequential(pool, convolution(before, after, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32, as autocast has it on CUDA; on a CPU the kernel for bfloat16 is four times slower."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def convolution(before: int, after: int, kernel: int, stride: int = 1, gain: float = 1.0) -> nn.Sequential:
    """A convolution, and GroupNorm that starts with a gain."""
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    norm = GroupNorm(GROUPS, after)
    nn.init.constant_(norm.weight, gain)
    return nn.Sequential(conv, norm)
