"""Training health: metrics for TensorBoard, and warnings when they look bad."""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm

from clipx.distributed import gather, world_size
from clipx.models.clip import CLIP
from clipx.training.loop import StepOutput

ROWS = 256  # of a batch that the metrics use
PATIENCE = 300  # steps of bad metrics before a warning
CHANCE = 0.99  # fraction of ln(batch); a loss above it has learnt nothing
COLLAPSED = 2.0  # effective rank; embeddings below it have collapsed


def health_metrics(output: StepOutput, log_scale_range: tuple[float, float]) -> dict[str, float]:
    """Health metrics of a step, by tag.

    All are of 256 images.  ``loss_over_chance``, their contrastive loss whatever the run's loss is, is 1 for an
    untrained model; of K captions per image, it is the mean over batches of one.  The cosines are means over pairs and
    over non-pairs; the ranks are the effective ranks of the embeddings (RankMe: Garrido et al. 2023, arXiv 2210.02885).
    ``scale_at_clamp`` is 1 when the temperature has reached a bound.

    Args:
        output: on the host, where the ranks take some milliseconds while a GPU has the next step to compute; on a GPU,
            computing eigenvalues waits for it.
        log_scale_range: bounds of the logarithm of the inverse temperature.
    """
    rows = -(-ROWS // world_size())
    captions = len(output.text) // len(output.image)  # K
    image, text = gather(output.image[:rows]), gather(output.text[: rows * captions])  # (N, E), (N K, E)
    cosine = image @ text.T  # (N, N K)
    by_caption = cosine.unflatten(1, (-1, captions)).unbind(2)  # K times (N, N)
    pairs, total, count = sum(one.trace().item() for one in by_caption), cosine.sum().item(), len(cosine)
    own = torch.arange(count)
    sides = [side for one in by_caption for side in (one, one.T)]
    loss = sum(F.cross_entropy(output.scale * side, own).item() for side in sides) / len(sides)
    image_norm, text_norm = output.tower_grad_norms.tolist()
    lowest, highest = log_scale_range
    log_scale = output.scale.log().item()
    found = {
        "loss_over_chance": loss / max(math.log(count), 1e-9),
        "positive_cosine": pairs / (count * captions),
        "negative_cosine": (total - pairs) / max(count * (count - 1) * captions, 1),
        "image_rank": effective_rank(image),
        "text_rank": effective_rank(text),
        "scale_at_clamp": float(lowest < highest and not lowest + 1e-3 < log_scale < highest - 1e-3),
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


def weight_norms(model: CLIP) -> dict[str, float]:
    """Weight norm of each tower."""
    return {
        name: get_total_norm(tower.parameters()).item()
        for name, tower in {"image": model.visual, "text": model.text}.items()
    }


class HealthMonitor:
    """Warns once about each problem that the metrics have shown for ``PATIENCE`` steps.

    Args:
        batch_size: of the run.
    """

    def __init__(self, batch_size: int):
        rows = min(batch_size, ROWS)
        chance = f"ln({rows}) = {math.log(rows):.2f}"
        self.since: dict[str, int] = {}
        self.stuck = (
            f"the contrastive loss has stayed at {chance}, which is chance, for {PATIENCE} steps or more. The usual "
            "causes: an optim.lr far too high or too low; captions that do not match their pictures, or are all alike "
            "(python -m clipx.check shows some); frozen towers"
        )
        self.collapsed = (
            f"the embeddings have collapsed for {PATIENCE} steps or more: those of a batch span fewer than "
            f"{COLLAPSED:.0f} directions (health/image_rank, health/text_rank). The usual causes: an optim.lr too "
            "high, a warm-up too short (sched.warmup), pictures or captions that are all alike"
        )
        self.warned: set[str] = set()

    def check(self, step: int, numbers: Mapping[str, float]) -> Iterator[str]:
        """Yield the warnings due at a step, given its metrics by tag."""
        ranks = [numbers.get(f"health/{side}_rank", math.inf) for side in ("image", "text")]
        bad = {self.stuck: numbers.get("health/loss_over_chance", 0) > CHANCE, self.collapsed: min(ranks) < COLLAPSED}
        for message, is_bad in bad.items():
            if not is_bad:
                self.since.pop(message, None)
            elif step - self.since.setdefault(message, step) >= PATIENCE and message not in self.warned:
                self.warned.add(message)
                yield message
