"""Mixtures of two weights of one model.

Fine-tuned weights mixed with those that they started from often keep more of what these could do, and gain almost as
much.  Source: Wortsman et al. 2022 (WiSE-FT, arXiv 2109.01903).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from clipx.models.clip import CLIP
from clipx.models.layers import Act
from clipx.weights.archive import CheckpointError
from clipx.weights.load import DROPOUT, check_shapes, load


def mixtures(
    run: str,
    mix: str,
    alphas: Sequence[float],
    device: str | torch.device = "cpu",
    trust: Sequence[str] = (),
    act: Act | None = None,
) -> Iterator[tuple[float, CLIP]]:
    """Yield ``(1 - alpha) mix + alpha run`` for each alpha, as one model whose weights change.

    The temperature is mixed as it is learnt, as its logarithm.

    Args:
        run: the weights at alpha 1, as in ``load``.
        mix: the weights at alpha 0.
        alphas: from 0 to 1.
        device: as in ``load``, like the other arguments.

    Raises:
        CheckpointError: the two are not weights of one model.
    """
    model, other = (load(where, device, trust, act)[0] for where in (run, mix))
    check_shapes(other.state_dict(), model.state_dict(), f"mix={mix}", f" of run={run}")
    for key, value in settings(model).items():
        if (theirs := settings(other).get(key)) != value:
            raise CheckpointError(f"mix={mix} does not fit: {key} is {theirs} in the weights and {value} in run={run}")
    tuned = {name: value.clone() for name, value in model.state_dict().items()}
    for alpha in alphas:
        model.load_state_dict(interpolate(other.state_dict(), tuned, alpha))
        yield alpha, model


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Interpolate between two state dicts; 0 and 1 give the two to the bit, and counters are those of ``end``."""
    if alpha in (0, 1):
        return dict(end if alpha else start)
    return {
        name: torch.lerp(start[name], value, alpha) if value.is_floating_point() else value
        for name, value in end.items()
    }


def settings(model: CLIP) -> dict[str, object]:
    """The arguments of both towers that say what they compute; shapes do not show all of them."""
    return {
        f"model.{name}.{key}": value
        for name, tower in model.towers.items()
        for key, value in tower.arguments().items()
        if key not in (*DROPOUT, "layer_scale")  # its initial value, which training changes
    }
