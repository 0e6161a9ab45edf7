"""The contrastive loss, computed in tiles: the matrix of logits of a large batch is never in memory as a whole."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipx import distributed
from clipx.models.layers import linear

TILE = 1 << 21  # logits at once; 8 MB in float32, which suits a CPU
GPU_SHARE = 1 / 64  # of a GPU's memory for a tile; backward and a mask take up to three times as much


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None = None, same: Literal["keep", "mask"] = "keep"
) -> Tensor:
    """Symmetric cross-entropy of each image against all texts, and back (InfoNCE).

    Row i of ``image`` and row i of ``text`` are a pair; every other row is a negative, on every rank.  All ranks return
    the loss of the whole batch.  Each rank's gradient is that of its own rows times the number of ranks, so that
    DistributedDataParallel's mean over ranks is the gradient of the whole batch.

    Besides the features, only one tile is in memory, forward and backward; the logits are computed twice.

    Args:
        image: (B, E) unit vectors, float32 or wider.
        text: (B, E) unit vectors, float32 or wider.
        scale: () inverse temperature, exp of the learnt parameter.
        ids: (B, 2) int64, picture id and caption id of each row; required for ``mask``.
        same: how rows with the same picture or caption are treated: ``keep`` as negatives, as in the paper; ``mask`` as
            neither negatives nor pairs.

    Returns:
        () mean loss in nats.  log(B * world_size) is chance; 0 is perfect.

    Raises:
        ValueError: the two sides differ in shape.

    Sources: Radford et al. 2021, figure 3 (arXiv 2103.00020); for the tiles Cheng et al. 2024 (arXiv 2410.17243).
    """
    if image.shape != text.shape:
        raise ValueError(f"image features {tuple(image.shape)} and text features {tuple(text.shape)} differ in shape")
    return TiledLoss.apply(image, text, scale, ids if same == "mask" else None)


class TiledLoss(torch.autograd.Function):
    """Loss and gradient from one tile of logits at a time: all texts, some images.

    Here B is the global batch, b the share of one rank, t the images of a tile.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None) -> Tensor:
        texts = distributed.gather(text)  # (B, E)
        all_ids = None if ids is None else distributed.gather(ids)  # (B, 2)
        over_texts = image.new_empty(len(image))  # (b,) logsumexp
        peak = image.new_full((len(texts),), torch.finfo(image.dtype).min)  # (B,) largest over images
        total = torch.zeros_like(peak)  # (B,) sum of exp(logit - peak)
        for part, scaled in tiles(image, scale, len(texts)):
            logits = masked(linear(texts, scaled), part, ids, all_ids)  # (B, t)
            over_texts[part] = logits.logsumexp(dim=0)
            before, peak = peak, torch.maximum(peak, logits.amax(dim=1))
            total = total * (before - peak).exp_() + logits.sub_(peak[:, None]).exp_().sum(dim=1)
        highest = distributed.all_max(peak.clone())
        over_images = distributed.all_sum(total * (peak - highest).exp_()).log_() + highest  # (B,) logsumexp
        own = distributed.all_sum(over_texts.sum() - 2 * scale * (image * text).sum())  # rows and pairs of a rank
        ctx.save_for_backward(image, texts, scale, ids, all_ids, over_texts, over_images)
        return (own + over_images.sum()) / (2 * len(texts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, texts, scale, ids, all_ids, over_texts, over_images = ctx.saved_tensors
        d_image, d_texts = torch.empty_like(image), torch.zeros_like(texts)
        texts = texts.detach().requires_grad_()
        first = distributed.rank() * len(image)
        for part, scaled in tiles(image, scale, len(texts)):
            with torch.enable_grad():
                products = linear(texts, scaled.requires_grad_())  # (B, t)
            logits = masked(products.detach(), part, ids, all_ids)
            surplus = (logits - over_texts[part]).exp_()  # softmax over texts
            surplus += logits.sub_(over_images[:, None]).exp_()  # and over images
            surplus.diagonal(-first - part.start).sub_(2)  # minus the targets
            more, d_image[part] = torch.autograd.grad(products, (texts, scaled), surplus)
            d_texts += more
        grad = grad * (distributed.world_size() / (2 * len(texts)))
        d_scale = grad * (d_image * image).sum()
        d_text = distributed.all_sum(d_texts)[first : first + len(image)]
        return d_image.mul_(grad * scale), d_text.mul_(grad), d_scale, None


def tiles(image: Tensor, scale: Tensor, batch: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the images and their scaled features (t, E)."""
    size = max(1, logits_at_once(image.device, image.element_size()) // batch)
    for start in range(0, len(image), size):
        part = slice(start, min(start + size, len(image)))
        yield part, scale * image[part]


def logits_at_once(device: torch.device, itemsize: int) -> int:
    """Logits of a tile.  On a GPU, one tile holds all of most batches: fewer and larger kernels.

    The share is of all memory, not of what is free: the tiles decide how sums are rounded, and what is free changes
    from step to step, so that a resumed run would not repeat the bits.
    """
    if device.type != "cuda":
        return TILE
    return max(TILE, int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE) // itemsize)


def masked(logits: Tensor, part: slice, ids: Tensor | None, all_ids: Tensor | None) -> Tensor:
    """Set the logits (B, t) of rows with the same picture or caption, except pairs, to -inf."""
    if ids is None or all_ids is None:
        return logits
    alike = (all_ids[:, None, 0] == ids[part, 0]) | (all_ids[:, None, 1] == ids[part, 1])
    alike.diagonal(-distributed.rank() * len(ids) - part.start).fill_(False)
    return logits.masked_fill_(alike, -torch.inf)
