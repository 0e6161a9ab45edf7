"""Optimisers, and which parameters decay."""

import torch
from torch import nn


def adamw(
    model: nn.Module,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.2,
    image_lr_scale: float = 1.0,
    text_lr_scale: float = 1.0,
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; gains, biases and scalars (one dimension or none) do not decay.

    Each group stores ``peak_lr``, which the schedule multiplies: ``lr`` times the scale of its tower; the first group's
    is ``lr``.  The defaults are the paper's.

    Source: Radford et al. 2021, table 18 and section 2.5 (arXiv 2103.00020).
    """
    scales = {"visual": image_lr_scale, "text": text_lr_scale}
    trained = [(scales.get(name.partition(".")[0], 1.0), p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for own, p in trained if own == scale and (p.ndim >= 2) == decays],
            "weight_decay": weight_decay if decays else 0.0,
            "peak_lr": lr * scale,
        }
        for scale in dict.fromkeys([1.0, *scales.values()])
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
