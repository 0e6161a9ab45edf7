"""The matrix product that takes nearly all of the time."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., D), (O, D), (O,) -> (..., O).

    On a CPU, float32 runs as a 1x1 convolution, which torch dispatches to oneDNN instead of MKL: the same products
    without a copy, and twice as fast on an AMD CPU.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)           # (1, D, T, 1), channels last in memory
    y = F.conv2d(pixels, weight[:, :, None, None], bias)                    # (1, O, T, 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))
