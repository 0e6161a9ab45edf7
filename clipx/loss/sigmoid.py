"""The sigmoid loss: of every image and text, do they belong together?"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipx import distributed
from clipx.loss.relations import Relations, Same
from clipx.loss.tiles import check_sides, tiled_gradient, tiles
from clipx.models.layers import linear


def sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None = None, *, bias: Tensor, same: Same = "keep"
) -> Tensor:
    """Binary cross-entropy of every image with every text: do they belong together (SigLIP)?

    Images, texts, ranks and tiles are as for ``clip_loss``.

    Args:
        image: (B, E) unit vectors, float32 or wider.
        text: (B K, E) unit vectors, float32 or wider.
        scale: () inverse temperature, exp of the learnt parameter.
        ids: as ``clip_loss`` takes them.
        bias: () learnt bias of the logits.
        same: as ``clip_loss`` takes it.

    Returns:
        () sum over all images and texts, divided by the number of texts, in nats.

    Raises:
        ValueError: the two sides do not fit.

    Source: Zhai et al. 2023, algorithm 1 (arXiv 2303.15343).
    """
    check_sides(image, text)
    return TiledSigmoid.apply(image, text, scale, bias, ids if same != "keep" else None, same)


class TiledSigmoid(torch.autograd.Function):
    """Loss and gradient of ``sigmoid_loss`` from one tile of logits at a time, as in ``TiledSoftmax``."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None, same: Same
    ) -> Tensor:
        texts = distributed.gather(text)  # (B K, E)
        relations = Relations.of(image, text, ids, same)
        total = image.new_zeros(())
        for part, scaled in tiles(image, scale, len(texts)):
            logits = linear(texts, scaled).add_(bias)  # (B K, t)
            total -= logits.masked_fill(~relations.positives(logits, part), 0).sum()
            total += F.softplus(relations.masked(logits, part)).sum()  # -log sigmoid(-logit); of a positive, minus it
        ctx.save_for_backward(image, texts, scale, bias)
        ctx.relations = relations
        return distributed.all_sum(total) / len(texts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, bias = ctx.saved_tensors
        d_bias = torch.zeros_like(bias)

        def surplus(products: Tensor, part: slice) -> Tensor:
            positives = ctx.relations.positives(products, part)
            surplus = ctx.relations.masked(products.add_(bias), part).sigmoid_().sub_(positives.to(products.dtype))
            d_bias.add_(surplus.sum())
            return surplus

        d_image, d_text, d_scale = tiled_gradient(surplus, image, texts, scale, grad / len(texts))
        return d_image, d_text, d_scale, d_bias * grad * (distributed.world_size() / len(texts)), None, None
