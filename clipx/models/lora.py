"""LoRA: frozen matrices with low-rank adapters, which state dicts hold as plain, merged matrices."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipx.errors import UserError
from clipx.models.tower import Tower


class LowRank(nn.Module):
    """A matrix plus a learnt product of two thin ones: W -> W + alpha / R * B A. (O, I) -> (O, I).

    A is drawn from a normal distribution and B is zero, so that training starts from W.  The sum is computed without
    autocast: training sees the matrix that a checkpoint holds.

    Args:
        weight: W (O, I), for shape, precision and device.
        rank: R.
        alpha: scale of the product, times R.

    Source: Hu et al. 2021, section 4.1 (arXiv 2106.09685).
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        outputs, inputs = weight.shape
        self.scale = alpha / rank
        self.A = nn.Parameter((inputs**-0.5 * torch.randn(rank, inputs)).to(weight))  # (R, I)
        self.B = nn.Parameter(weight.new_zeros(outputs, rank))  # (O, R)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.B, self.A, alpha=self.scale)


class Matrix(NamedTuple):
    """A matrix that linearly maps the rows of a module's input."""

    name: str  # in its tower
    module: nn.Module
    attribute: str  # of the module
    weight: nn.Parameter  # (O, I)


def add_adapters(
    towers: Mapping[str, Tower], rank: int, alpha: float = 16.0, weights: Sequence[str] | None = None
) -> None:
    """Freeze towers, and add adapters to their frozen matrices.

    All that ``Tower.freeze`` freezes keeps its values to the bit: matrices, biases, norms, embeddings.  Trained are A
    and B, and a new projection of a pretrained trunk.

    Args:
        towers: by name; changed in place.
        rank: of the adapters.
        alpha: as ``LowRank`` takes it.
        weights: parts of the names of the matrices to adapt, such as ``attn`` or ``mlp.c_fc``; None for all.

    Raises:
        UserError: no matrix has such a name, or the rank is more than a side of a matrix.
    """
    chosen = {name: [one for one in matrices(tower) if matches(one.name, weights)] for name, tower in towers.items()}
    check_adapted(towers, chosen, rank, weights)
    for name, tower in towers.items():
        tower.freeze()
        for matrix in chosen[name]:
            adapt(matrix, rank, alpha)


def matrices(tower: Tower) -> Iterator[Matrix]:
    """The matrices that can be adapted: the weights of linear layers, and of attention's joint projection."""
    frozen = {id(parameter) for parameter in tower.trunk_parameters()}
    for path, module in tower.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            linear = isinstance(module, nn.Linear) and attribute == "weight"
            if (linear or attribute == "in_proj_weight") and id(weight) in frozen:
                yield Matrix(f"{path}.{attribute}".removeprefix("."), module, attribute, weight)


def matches(name: str, parts: Sequence[str] | None) -> bool:
    """Whether a name contains one of the parts, as whole words between dots: ``attn`` is in ``0.attn.out_proj``."""
    return parts is None or any(f".{part}." in f".{name}." for part in parts)


def check_adapted(
    towers: Mapping[str, Tower], chosen: Mapping[str, Sequence[Matrix]], rank: int, weights: Sequence[str] | None
) -> None:
    """
    Raises:
        UserError: a tower has nothing to adapt, a name matches nothing, or the rank is too large.
    """
    adapted = [matrix for found in chosen.values() for matrix in found]
    for part in weights or ():
        if not any(matches(matrix.name, [part]) for matrix in adapted):
            raise UserError(f"lora.weights: no matrix has {part} in its name; {list_names(towers.values())}")
    for name, tower in towers.items():
        if not chosen[name]:
            raise UserError(
                f"lora.towers: the {name} tower has no matrix to adapt"
                + (f" with lora.weights={list(weights)}; {list_names([tower])}" if weights else "; leave it out")
            )
    smallest = min(adapted, key=lambda matrix: min(matrix.weight.shape))
    if rank > (most := min(smallest.weight.shape)):
        shape = " x ".join(map(str, smallest.weight.shape))
        raise UserError(f"lora.rank={rank} is more than a side of {smallest.name}, {shape}; give at most {most}")


def list_names(towers: Iterable[Tower]) -> str:
    """The names that ``lora.weights`` can select, without the numbers of the blocks."""
    names = dict.fromkeys(re.split(r"(?:^|\.)\d+\.", one.name)[-1] for tower in towers for one in matrices(tower))
    return f"there are {', '.join(names)}" if names else "there is none"


def adapt(matrix: Matrix, rank: int, alpha: float) -> None:
    """Add an adapter to a matrix; state dicts of its module keep their names and hold the sum."""
    module, known = matrix.module, parametrize.is_parametrized(matrix.module)
    parametrize.register_parametrization(module, matrix.attribute, LowRank(matrix.weight, rank, alpha))
    if not known:
        module.register_state_dict_post_hook(merge)
        module.register_load_state_dict_pre_hook(split)


def adapters(module: nn.Module) -> dict[str, LowRank]:
    """The adapters of a module, by the attribute that they change."""
    assert isinstance(module.parametrizations, nn.ModuleDict)
    return {name: cast(LowRank, parts.get_submodule("0")) for name, parts in module.parametrizations.items()}


def merge(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    """Put the merged matrices of a module into a state dict, in place of the frozen ones and their adapters."""
    for name in adapters(module):
        for key in [key for key in state if key.startswith(f"{prefix}parametrizations.{name}.")]:
            del state[key]
        state[f"{prefix}{name}"] = getattr(module, name).detach()


def split(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Load plain matrices as the frozen ones, with a product of zero."""
    for name, adapter in adapters(module).items():
        if f"{prefix}{name}" in state:
            inner = f"{prefix}parametrizations.{name}."
            state[f"{inner}original"] = state.pop(f"{prefix}{name}")
            state.update({f"{inner}0.A": adapter.A.detach(), f"{inner}0.B": torch.zeros_like(adapter.B)})


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Frozen matrices and adapters of a model by name, which ``state_dict`` has only merged; empty without LoRA."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if ".parametrizations." in name}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore what ``adapter_state`` returned, or a part of it."""
    own = dict(model.named_parameters())
    for name, tensor in state.items():
        own[name].copy_(tensor)
