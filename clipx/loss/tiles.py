"""Logits in tiles: the matrix of a large batch is never in memory as a whole."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from clipx import distributed
from clipx.models.layers import linear

TILE = 1 << 21  # logits at once; 8 MB in float32, which suits a CPU
GPU_SHARE = 1 / 64  # of a GPU's memory for a tile; backward and a mask take up to three times as much


def check_sides(image: Tensor, text: Tensor) -> None:
    if len(text) % len(image) or image.shape[1:] != text.shape[1:]:
        raise ValueError(f"image features {tuple(image.shape)} and text features {tuple(text.shape)} do not fit")


def tiled_gradient(
    surplus: Callable[[Tensor, slice], Tensor], image: Tensor, texts: Tensor, scale: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's images, its texts and the scale.

    Args:
        surplus: products (B K, t) of a tile, which it may overwrite -> gradient of its logits.
        image: (b, E) of this rank.
        texts: (B K, E) of all ranks.
        scale: () inverse temperature.
        grad: () what multiplies the gradient; times the number of ranks, as DistributedDataParallel takes a mean.
    """
    d_image, d_texts = torch.empty_like(image), torch.zeros_like(texts)
    texts = texts.detach().requires_grad_()
    for part, scaled in tiles(image, scale, len(texts)):
        with torch.enable_grad():
            products = linear(texts, scaled.requires_grad_())  # (B K, t)
        more, d_image[part] = torch.autograd.grad(products, (texts, scaled), surplus(products.detach(), part))
        d_texts += more
    grad = grad * distributed.world_size()
    d_scale = grad * (d_image * image).sum()
    own = len(texts) // distributed.world_size()
    d_text = distributed.all_sum(d_texts)[distributed.rank() * own :][:own]
    return d_image.mul_(grad * scale), d_text.mul_(grad), d_scale


def tiles(image: Tensor, scale: Tensor, texts: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the images and their scaled features (t, E)."""
    for part in tile_slices(image, texts):
        yield part, scale * image[part]


def tile_slices(image: Tensor, texts: int) -> Iterator[slice]:
    """Yield the images of each tile, for so many texts."""
    size = max(1, logits_at_once(image.device, image.element_size()) // texts)
    for start in range(0, len(image), size):
        yield slice(start, min(start + size, len(image)))


def logits_at_once(device: torch.device, itemsize: int) -> int:
    """Logits of a tile.  On a GPU, one tile holds all of most batches: fewer and larger kernels.

    The share is of all memory, not of what is free: the tiles decide how sums are rounded, and what is free changes
    from step to step, so that a resumed run would not repeat the bits.
    """
    if device.type != "cuda":
        return TILE
    return max(TILE, int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE) // itemsize)
