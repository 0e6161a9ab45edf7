"""The optimiser, and who decays."""

import torch
from torch import nn


def adamw(
    model: nn.Module,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.2,
) -> torch.optim.AdamW:
    """AdamW over all parameters, fused; gains, biases and scalars (one dimension or none) do not decay.

    Each group keeps ``peak_lr``, which the schedule multiplies.  The defaults are the paper's.

    Source: Radford et al. 2021, table 18 and section 2.5 (arXiv 2103.00020).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay, "peak_lr": lr},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "peak_lr": lr},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
