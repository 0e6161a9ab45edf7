"""Optimisers, which parameters decay, and how fast each learns."""

import importlib
import inspect
from collections.abc import Callable
from itertools import chain
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from clipx.config.validate import suggest
from clipx.errors import UserError
from clipx.models.lora import LowRank
from clipx.muon import Muon

Group = dict[str, Any]
LayerDecay = Annotated[float, Field(gt=0, le=1)]
JOINT = ("in_proj_weight", "qkv.weight")  # ends of the names of matrices that stack those of queries, keys and values
LIBRARIES = ("torch.optim", "timm.optim")
UNSUITABLE = {
    "torch.optim.LBFGS": "it computes the loss several times a step",
    "torch.optim.Muon": "it takes matrices only; use optim=muon",
    "torch.optim.SparseAdam": "it takes sparse gradients only",
    "timm.optim.Adahessian": "it needs second derivatives",
    "timm.optim.Lookahead": "it wraps another optimiser",
}


def adamw(
    model: nn.Module,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.2,
    image_lr_scale: float = 1.0,
    text_lr_scale: float = 1.0,
    pretrained_lr_scale: float = 1.0,
    layer_decay: LayerDecay = 1.0,
) -> torch.optim.AdamW:
    """Fused AdamW over ``parameter_groups``.  The defaults are the paper's.

    Source: Radford et al. 2021, table 18 and section 2.5 (arXiv 2103.00020).
    """
    scales = (image_lr_scale, text_lr_scale, pretrained_lr_scale, layer_decay)
    groups = parameter_groups(model, lr, weight_decay, *scales)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def muon(
    model: nn.Module,
    lr: float = 5e-4,
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.2,
    image_lr_scale: float = 1.0,
    text_lr_scale: float = 1.0,
    pretrained_lr_scale: float = 1.0,
    layer_decay: LayerDecay = 1.0,
) -> Muon:
    """Muon for the matrices in the blocks of both towers, AdamW for everything else, over ``parameter_groups``.

    ``momentum`` is Muon's; ``betas`` and ``eps`` are AdamW's, which trains embeddings, projections, the convolutions of
    patches and stems and those of single channels, gains, biases and the temperature.

    Raises:
        UserError: no matrix of a block is trained, or a tower has no ``stages``.

    Source: Liu et al. 2025, section 2 (arXiv 2502.16982).
    """
    stacked = block_matrices(model)
    scales = (image_lr_scale, text_lr_scale, pretrained_lr_scale, layer_decay)
    groups: list[Group] = []
    for group in parameter_groups(model, lr, weight_decay, *scales):
        others = [p for p in group["params"] if p not in stacked]
        groups.append({**group, "params": others, "betas": betas, "eps": eps})
        for parts in sorted({stacked[p] for p in group["params"] if p in stacked}):
            matrices = [p for p in group["params"] if stacked.get(p) == parts]
            groups.append({**group, "params": matrices, "momentum": momentum, "parts": parts})
    return Muon(groups, lr)


def named(
    model: nn.Module,
    optimizer: str,
    lr: float,
    weight_decay: float,
    image_lr_scale: float = 1.0,
    text_lr_scale: float = 1.0,
    pretrained_lr_scale: float = 1.0,
    layer_decay: LayerDecay = 1.0,
    **arguments: Any,
) -> torch.optim.Optimizer:
    """An optimiser of torch or timm, such as ``torch.optim.RAdam``, over ``parameter_groups``.

    Other ``arguments`` are those of its class.

    Raises:
        UserError: there is no such class, or it does not take these arguments.
    """
    found = find_class(optimizer)
    known = [key for key in inspect.signature(found).parameters if key != "params"]
    for key in arguments:
        if key not in known:
            raise UserError(f"optim.{key}: {found.__name__} has no such argument{suggest(key, known, 'optim.')}")
    if weight_decay and "weight_decay" not in known:
        raise UserError(f"optim.weight_decay={weight_decay}: {found.__name__} has none; set optim.weight_decay=0")
    scales = (image_lr_scale, text_lr_scale, pretrained_lr_scale, layer_decay)
    groups = parameter_groups(model, lr, weight_decay, *scales)
    try:
        return found(groups, lr=lr, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optim.optimizer={optimizer} refuses its arguments: {error}") from error


def find_class(path: str) -> Callable[..., torch.optim.Optimizer]:
    """Import an optimiser of torch or timm.

    Raises:
        UserError: there is none, or it needs more than a gradient.
    """
    library, _, name = path.rpartition(".")
    if library not in LIBRARIES:
        raise UserError(
            f"optim.optimizer={path}: should be a class of {' or '.join(LIBRARIES)}, such as torch.optim.RAdam; for "
            "others, see docs/extend.md"
        )
    base, members = torch.optim.Optimizer, vars(importlib.import_module(library))
    classes = [key for key, value in members.items() if inspect.isclass(value) and issubclass(value, base)]
    suitable = sorted(key for key in classes if f"{library}.{key}" not in UNSUITABLE and members[key] is not base)
    if name not in suitable:
        reason = UNSUITABLE.get(path)
        problem = f"cannot be used: {reason}" if reason else f"no such class{suggest(name, suitable, f'{library}.')}"
        raise UserError(f"optim.optimizer={path}: {problem}")
    return members[name]


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    image_lr_scale: float = 1.0,
    text_lr_scale: float = 1.0,
    pretrained_lr_scale: float = 1.0,
    layer_decay: float = 1.0,
) -> list[Group]:
    """The trainable parameters in groups; gains, biases and scalars (one dimension or none) do not decay.

    Each group stores ``peak_lr``, which the schedule multiplies: ``lr`` times the scale of its tower, times
    ``pretrained_lr_scale`` for what another library trained, and times ``layer_decay`` for each stage between its
    parameters and the tower's output; the first group's is ``lr``.

    Raises:
        UserError: ``layer_decay`` is set for a tower without ``stages``, or ``pretrained_lr_scale`` for a model that
            trains no pretrained weights.

    Source: layer-wise decay: Clark et al. 2020, section 3.2 (arXiv 2003.10555).
    """
    scales = {
        **tower_scales(model, "visual", image_lr_scale, layer_decay),
        **tower_scales(model, "text", text_lr_scale, layer_decay),
    }
    if pretrained_lr_scale != 1:
        for parameter in pretrained_parameters(model, pretrained_lr_scale):
            scales[parameter] *= pretrained_lr_scale
    trained = [(scales.get(p, 1.0), p) for p in model.parameters() if p.requires_grad]
    return [
        {
            "params": [p for own, p in trained if own == scale and (p.ndim >= 2) == decays],
            "weight_decay": weight_decay if decays else 0.0,
            "peak_lr": lr * scale,
        }
        for scale in dict.fromkeys([1.0, image_lr_scale, text_lr_scale, *(own for own, _ in trained)])
        for decays in (True, False)
    ]


def block_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """The trained matrices in the blocks of both towers, each with how many matrices it stacks.

    They are the weights of linear layers, the joint projections of attention, LoRA's adapters, and the kernels of
    convolutions over all channels.

    Raises:
        UserError: there are none, or a tower has no ``stages``.
    """
    found: dict[nn.Parameter, int] = {}
    for tower in (getattr(model, "visual", None), getattr(model, "text", None)):
        if tower is None or not any(p.requires_grad for p in tower.parameters()):
            continue
        inside = {*chain(*tower.stages()[1:-1])}
        for path, module in tower.named_modules():
            for name, p in module.named_parameters(recurse=False):
                linear = isinstance(module, (nn.Linear, LowRank)) or name == "in_proj_weight"
                kernel = isinstance(module, nn.Conv2d) and module.groups == 1
                if (linear or kernel) and p.ndim >= 2 and p.requires_grad and p in inside:
                    joint = f"{path}.{name}".endswith(JOINT) and p.shape[0] == 3 * p.shape[1]
                    found[p] = 3 if joint else 1
    if not found:
        raise UserError("optim=muon: no matrix in the blocks of a tower is trained; use optim=adamw_paper")
    return found


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
