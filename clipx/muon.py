"""Muon: steps along the orthogonal factor of the momentum, for matrices and kernels; AdamW for everything else."""

from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5: five iterations bring singular values to 0.7 ... 1.2
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon for the groups that have a ``momentum``, torch's fused AdamW for those that have ``betas``.

    The update of a matrix has a root mean square of 0.2, as AdamW's mostly has, so that both share learning rate and
    weight decay.  A group's ``parts`` is the number of matrices that each of its parameters stacks: 3 for queries, keys
    and values.  The kernel of a convolution is a matrix with a row for each output channel.

    Args:
        groups: parameter groups, with ``weight_decay``, and ``momentum`` and ``parts``, or ``betas`` and ``eps``.
        lr: learning rate of groups that do not say theirs.

    Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), also for the coefficients, stacked matrices
    and kernels; the size of the update: Liu et al. 2025, section 2.2 (arXiv 2502.16982).
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float):
        super().__init__(groups, {"lr": lr})
        self.link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # a copy, or what load_state_dict read
        self.link()

    def link(self) -> None:
        """Let AdamW work on this optimiser's groups and state."""
        self.adamw = torch.optim.AdamW([group for group in self.param_groups if "betas" in group], fused=True)
        self.adamw.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "betas" in param_group and hasattr(self, "adamw"):  # later than the others
            self.adamw.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.adamw.step()
        for group in self.param_groups:
            if "momentum" not in group:
                continue
            for matrix in group["params"]:
                if matrix.grad is not None:
                    update = self.advance(matrix, matrix.grad, group["momentum"]).flatten(1)
                    update = update.unflatten(0, (group["parts"], -1))
                    size = 0.2 * max(update.shape[-2:]) ** 0.5
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(orthogonalise(update).reshape(matrix.shape), alpha=group["lr"] * size)

    def advance(self, matrix: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """Advance the momentum of a matrix; returns Nesterov's."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        average: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, nearly: singular values are brought close to 1. (N, O, I) -> (N, O, I).

    Newton-Schulz iterations, in bfloat16 on a GPU; on a CPU in float32, which is far faster without units for bfloat16.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
