"""Is it learning: numbers for TensorBoard, and words where they look bad."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from clipx.distributed import gather, world_size
from clipx.models.clip import CLIP, MAX_LOG_SCALE
from clipx.training.loop import StepOutput

ROWS = 256          # of a batch that are looked at
PATIENCE = 300      # steps for which something looks bad before it is told
CHANCE = 0.99       # of ln(batch): a loss above it has learnt nothing
COLLAPSED = 2.0     # directions that embeddings span at least


def health(numbers: StepOutput) -> dict[str, float]:
    """How a step looks, by tag.

    ``loss_over_chance`` is 1 for a model that knows nothing; the cosines are means over the pairs, and over what are
    no pairs; the ranks tell how many directions the embeddings of 256 rows span (RankMe: Garrido et al. 2023,
    arXiv 2210.02885); ``scale_at_clamp`` is 1 where the temperature has reached its bound.
    """
    rows = -(-ROWS // world_size())
    image, text = (gather(features[:rows].cpu()) for features in (numbers.image, numbers.text))     # (N, E)
    cosine = image @ text.T                                                                         # (N, N)
    pairs, total, count = cosine.trace().item(), cosine.sum().item(), len(cosine)
    image_norm, text_norm = numbers.norms.tolist()
    found = {
        "loss_over_chance": numbers.loss.item() / max(math.log(numbers.samples), 1e-9),
        "positive_cosine": pairs / count,
        "negative_cosine": (total - pairs) / max(count * (count - 1), 1),
        "image_rank": effective_rank(image),
        "text_rank": effective_rank(text),
        "scale_at_clamp": float(numbers.scale.log().item() > MAX_LOG_SCALE - 1e-3 or numbers.scale.item() < 1 + 1e-3),
        "grad_norm_image": image_norm,
        "grad_norm_text": text_norm,
    }
    return {f"health/{name}": value for name, value in found.items()}


def effective_rank(features: Tensor) -> float:
    """(N, E) -> exp of the entropy of its singular values as shares of their sum: 1 to min(N, E)."""
    small = features if len(features) <= features.shape[1] else features.T
    values = torch.linalg.eigvalsh((small @ small.T).double()).clamp(min=0).sqrt()
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


def tower_norms(model: CLIP) -> dict[str, float]:
    """Norms of the weights of both towers."""
    return {name: get_total_norm(part.parameters()).item() for name, part in
            {"image": model.visual, "text": model.text}.items()}


class HealthMonitor:
    """Says in words, once each, what numbers have shown for a while.

    Args:
        batch_size: of the run.
    """

    def __init__(self, batch_size: int):
        chance = f"ln(batch_size) = {math.log(batch_size):.2f}"
        self.since: dict[str, int] = {}
        self.stuck = (
            f"the loss has stayed at {chance}, which is chance, for {PATIENCE} steps or more. The usual causes: an "
            "optim.lr far too high or too low; captions that do not belong to their pictures, or are all alike "
            "(python -m clipx.check shows some); towers of which nothing trains"
        )
        self.collapsed = (
            f"the embeddings have collapsed for {PATIENCE} steps or more: those of a batch span fewer than "
            f"{COLLAPSED:.0f} directions (health/image_rank, health/text_rank). The usual causes: an optim.lr too "
            "high, a warm-up too short (sched.warmup), pictures or captions that are all alike"
        )
        self.told: set[str] = set()

    def look(self, step: int, numbers: Mapping[str, float]) -> Iterator[str]:
        """What is to be told at a step, with its numbers by tag."""
        ranks = [numbers.get(f"health/{side}_rank", math.inf) for side in ("image", "text")]
        bad = {self.stuck: numbers.get("health/loss_over_chance", 0) > CHANCE, self.collapsed: min(ranks) < COLLAPSED}
        for words, now in bad.items():
            if not now:
                self.since.pop(words, None)
            elif step - self.since.setdefault(words, step) >= PATIENCE and words not in self.told:
                self.told.add(words)
                yield words
