"""The contrastive loss."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None = None, same: Literal["keep", "mask"] = "keep"
) -> Tensor:
    """Symmetric cross-entropy of each image against all texts, and back (InfoNCE).

    Row i of ``image`` and row i of ``text`` are a pair; every other row is a negative.

    Args:
        image: (B, E) unit vectors, float32 or wider.
        text: (B, E) unit vectors, float32 or wider.
        scale: () inverse temperature, exp of the learnt parameter.
        ids: (B, 2) int64, which picture and which caption a row has; ``mask`` needs them.
        same: what rows with the same picture or the same caption are to each other: ``keep``, negatives as in the
            paper, or ``mask``, neither negatives nor pairs.

    Returns:
        () mean loss in nats.  log(B) is chance; 0 is perfect.

    Raises:
        ValueError: the two sides differ in shape.

    Source: Radford et al. 2021, figure 3 (arXiv 2103.00020).
    """
    if image.shape != text.shape:
        raise ValueError(f"image features {tuple(image.shape)} and text features {tuple(text.shape)} differ in shape")
    logits = scale * image @ text.T                                  # (B, B)
    if same == "mask":
        alike = (ids[:, None] == ids).any(dim=-1).fill_diagonal_(False)     # (B, B)
        logits = logits.masked_fill(alike, -torch.inf)
    pairs = torch.arange(len(logits), device=logits.device)          # (B,), the diagonal
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
