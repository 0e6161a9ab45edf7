"""Optimisers, and which parameters decay."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from clipx.errors import UserError
from clipx.models.lora import LowRank


def adamw(
    model: nn.Module,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.2,
    image_lr_scale: float = 1.0,
    text_lr_scale: float = 1.0,
    pretrained_lr_scale: float = 1.0,
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0,
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; gains, biases and scalars (one dimension or none) do not decay.

    Each group stores ``peak_lr``, which the schedule multiplies: ``lr`` times the scale of its tower, times
    ``pretrained_lr_scale`` for what another library trained, and times ``layer_decay`` for each stage between its
    parameters and the tower's output; the first group's is ``lr``.  The defaults are the paper's.

    Raises:
        UserError: ``layer_decay`` is set for a tower without ``stages``, or ``pretrained_lr_scale`` for a model that
            trains no pretrained weights.

    Source: Radford et al. 2021, table 18 and section 2.5 (arXiv 2103.00020); layer-wise decay: Clark et al. 2020,
    section 3.2 (arXiv 2003.10555).
    """
    scales = {
        **tower_scales(model, "visual", image_lr_scale, layer_decay),
        **tower_scales(model, "text", text_lr_scale, layer_decay),
    }
    if pretrained_lr_scale != 1:
        for parameter in pretrained_parameters(model, pretrained_lr_scale):
            scales[parameter] *= pretrained_lr_scale
    trained = [(scales.get(p, 1.0), p) for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for own, p in trained if own == scale and (p.ndim >= 2) == decays],
            "weight_decay": weight_decay if decays else 0.0,
            "peak_lr": lr * scale,
        }
        for scale in dict.fromkeys([1.0, image_lr_scale, text_lr_scale, *(own for own, _ in trained)])
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def pretrained_parameters(model: nn.Module, scale: float) -> list[nn.Parameter]:
    """The trained parameters that start from weights of others, as ``pretrained`` of their tower says.

    Adapters of LoRA are new, like the projection.

    Raises:
        UserError: there are none.
    """
    towers = [tower for name in ("visual", "text") if (tower := getattr(model, name, None)) and tower.pretrained]
    new = {parameter for module in model.modules() if isinstance(module, LowRank) for parameter in module.parameters()}
    trunks = [parameter for tower in towers for parameter in tower.trunk_parameters()]
    found = [parameter for parameter in trunks if parameter.requires_grad and parameter not in new]
    if not found:
        missing = "no tower is of timm or transformers with pretrained weights"
        reason = "all pretrained weights are frozen" if towers else missing
        raise UserError(
            f"optim.pretrained_lr_scale={scale} has no effect, as {reason}; "
            "optim.image_lr_scale and optim.text_lr_scale change the rate of a whole tower"
        )
    return found


def tower_scales(model: nn.Module, name: str, scale: float, layer_decay: float) -> dict[nn.Parameter, float]:
    """What multiplies the learning rate of each parameter of a tower, if the model has it."""
    tower = getattr(model, name, None)
    if tower is None:
        return {}
    if layer_decay == 1:
        return dict.fromkeys(tower.parameters(), scale)
    return {
        parameter: scale * layer_decay**above
        for above, stage in enumerate(reversed(tower.stages()))
        for parameter in stage
    }
