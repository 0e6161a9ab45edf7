"""The contrastive loss: cross-entropy of each image over all texts, and back."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipx import distributed
from clipx.loss.relations import Relations, Same, SoftTargets
from clipx.loss.tiles import check_sides, tiled_gradient, tiles
from clipx.models.layers import linear

Smoothing = Annotated[float, Field(ge=0, lt=1)]


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None = None,
    same: Same = "keep",
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """Symmetric cross-entropy of each image against all texts, and back (InfoNCE).

    Each image has K texts, its positives: row i of ``image`` belongs to the rows K i to K i + K - 1 of ``text``.  All
    other rows are negatives, on every rank.  An image's target is uniform over its positives.  All ranks return the
    loss of the whole batch.  Each rank's gradient is that of its own rows times the number of ranks, so that
    DistributedDataParallel's mean over ranks is the gradient of the whole batch.

    Besides the features, only one tile is in memory, forward and backward; the logits are computed twice.

    Args:
        image: (B, E) unit vectors, float32 or wider.
        text: (B K, E) unit vectors, float32 or wider.
        scale: () inverse temperature, exp of the learnt parameter.
        ids: (B, 1 + K) int64, picture id and caption ids of each image; required for ``mask`` and ``positive``.
        same: how rows with the same picture or caption are treated: ``keep`` as negatives, as in the paper; ``mask`` as
            neither negatives nor positives; ``positive`` as positives of each other.
        label_smoothing: share of each target that is spread evenly over all rows that are not masked.

    Returns:
        () mean loss in nats.  log(B * world_size) is chance for K = 1; 0 is perfect, if each row has one positive.

    Raises:
        ValueError: the two sides do not fit.

    Sources: Radford et al. 2021, figure 3 (arXiv 2103.00020); for the tiles Cheng et al. 2024 (arXiv 2410.17243); for
    several positives Khosla et al. 2020, equation 2 (arXiv 2004.11362), and Yang et al. 2022 (arXiv 2204.03610).
    """
    check_sides(image, text)
    return TiledSoftmax.apply(image, text, scale, ids if same != "keep" else None, same, label_smoothing)


class TiledSoftmax(torch.autograd.Function):
    """Loss and gradient of ``clip_loss`` from one tile of logits at a time: all texts, some images.

    Here B is the global batch, b the share of one rank, t the images of a tile.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None, same: Same, smoothing: float
    ) -> Tensor:
        texts = distributed.gather(text)  # (B K, E)
        relations = Relations.of(image, text, ids, same)
        is_soft = smoothing > 0 or (same == "positive" and ids is not None)
        targets = SoftTargets.count(relations, smoothing, image, texts) if is_soft else None
        over_texts = image.new_empty(len(image))  # (b,) logsumexp
        peak = image.new_full((len(texts),), torch.finfo(image.dtype).min)  # (B K,) largest over images
        total = torch.zeros_like(peak)  # (B K,) sum of exp(logit - peak)
        matched = image.new_zeros(())  # sum of the logits times their targets
        for part, scaled in tiles(image, scale, len(texts)):
            logits = linear(texts, scaled)  # (B K, t)
            if targets:
                matched += (targets(logits, part) * logits).sum()
            logits = relations.masked(logits, part)
            over_texts[part] = logits.logsumexp(dim=0)
            before, peak = peak, torch.maximum(peak, logits.amax(dim=1))
            total = total * (before - peak).exp_() + logits.sub_(peak[:, None]).exp_().sum(dim=1)
        if not targets:
            own = image.repeat_interleave(relations.captions, dim=0) if relations.captions > 1 else image
            matched = 2 * scale * (own * text).sum()
        highest = distributed.all_max(peak.clone())
        over_images = distributed.all_sum(total * (peak - highest).exp_()).log_() + highest  # (B K,) logsumexp
        rest = distributed.all_sum(relations.captions * over_texts.sum() - matched)  # rows and positives of a rank
        ctx.save_for_backward(image, texts, scale, over_texts, over_images)
        ctx.relations, ctx.targets = relations, targets
        return (rest + over_images.sum()) / (2 * len(texts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, over_texts, over_images = ctx.saved_tensors

        def surplus(products: Tensor, part: slice) -> Tensor:
            target = ctx.targets(products, part) if ctx.targets else None
            logits = ctx.relations.masked(products, part)
            surplus = (logits - over_texts[part]).exp_()  # softmax over texts
            if ctx.relations.captions > 1:
                surplus *= ctx.relations.captions
            surplus += logits.sub_(over_images[:, None]).exp_()  # and over images
            if target is not None:
                return surplus.sub_(target)
            ctx.relations.own(surplus, part).sub_(2)  # minus the targets
            return surplus

        d_image, d_text, d_scale = tiled_gradient(surplus, image, texts, scale, grad / (2 * len(texts)))
        return d_image, d_text, d_scale, None, None, None
