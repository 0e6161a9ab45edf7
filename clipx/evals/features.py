"""Features of pictures, captions and labelled sets: encoded once, shared by all evaluations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipx.data.sample import Source

TILE = 1024  # queries of the loss at once

EncodeTexts = Callable[[list[str]], Tensor]
Skip = tuple[str, str]  # place (file and key) and reason; a plain tuple, which torch.load(weights_only=True) allows
Scores = dict[str, Any]  # metrics by name, and matplotlib figures


@dataclass(frozen=True)
class Features:
    """N pictures and their M captions in the joint space."""

    images: Tensor  # (N, E) unit vectors
    texts: Tensor  # (M, E) unit vectors
    owners: Tensor  # (M,) index of each caption's picture
    captions: list[str]  # M
    shown: Tensor  # (min(N, 64), 3, S, S) uint8, the first pictures
    skipped: list[Skip]  # pictures that could not be read

    @property
    def first(self) -> Tensor:
        """(N,) index of each picture's first caption."""
        return torch.searchsorted(self.owners, torch.arange(len(self.images)))


@dataclass(frozen=True)
class LabelledFeatures:
    """N pictures, each with the number of its class, or the classes of a multi-label set."""

    images: Tensor  # (N, E) unit vectors
    hidden: Tensor  # (N, D) input of the projection into the joint space
    labels: Tensor  # (N,) int64, or (N, C) uint8: a one for each class of the picture
    samples: Tensor  # (N,) int64, ids in the source
    skipped: list[Skip]  # pictures that could not be read


EncodeImages = Callable[[Source], LabelledFeatures]


def pair_loss(val: Features, scale: float) -> float:
    """Symmetric cross-entropy, in nats, of N pictures and their first captions as one batch; ln(N) is chance."""
    texts, total = val.texts[val.first], 0.0
    for queries, items in ((val.images, texts), (texts, val.images)):
        for start in range(0, len(queries), TILE):
            logits = scale * queries[start : start + TILE] @ items.T  # (T, N)
            own = torch.arange(start, start + len(logits))
            total += F.cross_entropy(logits, own, reduction="sum").item()
    return total / (2 * len(texts))
