"""The contrastive loss, in tiles: the matrix of logits never exists as a whole."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipx import distributed

TILE = 1 << 21      # logits at once; 8 MB in float32


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None = None, same: Literal["keep", "mask"] = "keep"
) -> Tensor:
    """Symmetric cross-entropy of each image against all texts, and back (InfoNCE).

    Row i of ``image`` and row i of ``text`` are a pair; every other row is a negative, on every rank.  All ranks get
    the loss of the whole batch, and each the gradient of its own rows times the number of ranks, so that the mean over
    the ranks, as DistributedDataParallel takes it, is the gradient of the whole batch.

    Memory beside the features is that of a tile, forward and backward; the logits are computed twice.

    Args:
        image: (B, E) unit vectors, float32 or wider.
        text: (B, E) unit vectors, float32 or wider.
        scale: () inverse temperature, exp of the learnt parameter.
        ids: (B, 2) int64, which picture and which caption a row has; ``mask`` needs them.
        same: what rows with the same picture or the same caption are to each other: ``keep``, negatives as in the
            paper, or ``mask``, neither negatives nor pairs.

    Returns:
        () mean loss in nats.  log(B world) is chance; 0 is perfect.

    Raises:
        ValueError: the two sides differ in shape.

    Sources: Radford et al. 2021, figure 3 (arXiv 2103.00020); for the tiles Cheng et al. 2024 (arXiv 2410.17243).
    """
    if image.shape != text.shape:
        raise ValueError(f"image features {tuple(image.shape)} and text features {tuple(text.shape)} differ in shape")
    return TiledLoss.apply(image, text, scale, ids if same == "mask" else None)


class TiledLoss(torch.autograd.Function):
    """The loss and its gradient from the logits of some images with all texts at a time.

    B is the batch of all ranks here, b the share of one.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None) -> Tensor:
        texts = distributed.gather(text)                                            # (B, E)
        all_ids = None if ids is None else distributed.gather(ids)                  # (B, 2)
        rows = image.new_empty(len(image))                                          # (b,) logsumexp over texts
        peak = image.new_full((len(texts),), torch.finfo(image.dtype).min)          # (B,) largest over images
        total = torch.zeros_like(peak)                                              # (B,) sum of exp(logit - peak)
        for part, logits in tiles(image, texts, scale, ids, all_ids):               # (t, B)
            rows[part] = logits.logsumexp(dim=1)
            before, peak = peak, torch.maximum(peak, logits.amax(dim=0))
            total = total * (before - peak).exp_() + logits.sub_(peak).exp_().sum(dim=0)
        highest = distributed.all_max(peak.clone())
        columns = distributed.all_sum(total * (peak - highest).exp_()).log_() + highest     # (B,) logsumexp over images
        own = distributed.all_sum(rows.sum() - 2 * scale * (image * text).sum())    # of each rank's rows and pairs
        ctx.save_for_backward(image, texts, scale, ids, all_ids, rows, columns)
        return (own + columns.sum()) / (2 * len(texts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, texts, scale, ids, all_ids, rows, columns = ctx.saved_tensors
        d_image, d_texts = torch.empty_like(image), torch.zeros_like(texts)
        first = distributed.rank() * len(image)
        for part, logits in tiles(image, texts, scale, ids, all_ids):               # (t, B)
            surplus = (logits - rows[part, None]).exp_()                            # softmax over texts
            surplus += logits.sub_(columns).exp_()                                  # and over images
            surplus.diagonal(first + part.start).sub_(2)                            # less what a pair should have
            torch.mm(surplus, texts, out=d_image[part])
            d_texts.addmm_(surplus.T, image[part])
        grad = grad * (distributed.world() / (2 * len(texts)))
        d_scale = grad * (d_image * image).sum()
        d_text = distributed.all_sum(d_texts)[first : first + len(image)]
        return d_image.mul_(grad * scale), d_text.mul_(grad * scale), d_scale, None


def tiles(
    image: Tensor, texts: Tensor, scale: Tensor, ids: Tensor | None, all_ids: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Which images, and their logits with all texts (t, B); those of alike rows that are no pair are -inf."""
    step, first = max(1, TILE // len(texts)), distributed.rank() * len(image)
    for start in range(0, len(image), step):
        part = slice(start, min(start + step, len(image)))
        logits = (scale * image[part]) @ texts.T
        if ids is not None:
            alike = (ids[part, None, 0] == all_ids[:, 0]) | (ids[part, None, 1] == all_ids[:, 1])
            alike.diagonal(first + start).fill_(False)
            logits.masked_fill_(alike, -torch.inf)
        yield part, logits
