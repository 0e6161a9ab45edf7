"""Fit position embeddings to another picture size or context."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipx.weights.archive import CheckpointError

IMAGE_POSITIONS, TEXT_POSITIONS = "visual.positional_embedding", "positional_embedding"
KEPT = 20  # first positions of a caption, which stay as they are: most captions that CLIP has seen are shorter

Beyond = Literal["stretch", "new"]  # positions of captions beyond the context of the weights


def fit_positions(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], beyond: Beyond = "stretch"
) -> tuple[dict[str, Tensor], str]:
    """Fit the position embeddings of a state dict to those of another.

    Those of pictures are interpolated.  Those of captions are truncated to a shorter context; for a longer one they
    are stretched, or the weights' own are kept and ``own`` gives the others.

    Args:
        state: the weights.
        own: the state dict of the model.
        beyond: for a longer context.

    Returns:
        The state dict, and a description of what was resized.

    Raises:
        CheckpointError: the weights have too few positions to be stretched, or the context does not need new ones.
    """
    state, descriptions = dict(state), []
    image, text = (differ_in_length(state.get(key), own.get(key)) for key in (IMAGE_POSITIONS, TEXT_POSITIONS))
    if beyond == "new" and not (text and len(own[TEXT_POSITIONS]) > len(state[TEXT_POSITIONS])):
        raise CheckpointError(
            "init_positions=new has no effect, as the context is not longer than that of the weights; set a longer "
            "model.text.context, or leave it out"
        )
    if image:
        before, after = (round((len(one[IMAGE_POSITIONS]) - 1) ** 0.5) for one in (state, own))
        state[IMAGE_POSITIONS] = resize(state[IMAGE_POSITIONS], before, after)
        descriptions.append(f"pictures resized from {before} x {before} to {after} x {after} patches")
    if text:
        before, after = len(state[TEXT_POSITIONS]), len(own[TEXT_POSITIONS])
        state[TEXT_POSITIONS], how = fit_captions(state[TEXT_POSITIONS], own[TEXT_POSITIONS], beyond)
        descriptions.append(f"captions {how} from {before} to {after} tokens")
    return state, "".join(f"; position embeddings of {description}" for description in descriptions)


def differ_in_length(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are there, of the same width."""
    return one is not None and other is not None and len(one) != len(other) and one.shape[1:] == other.shape[1:]


def fit_captions(positions: Tensor, own: Tensor, beyond: Beyond) -> tuple[Tensor, str]:
    """Fit (L, D) to the length of ``own``; also return how, in a word."""
    if len(positions) > len(own):
        return positions[: len(own)], "truncated"
    if beyond == "stretch":
        return stretch(positions, len(own)), "stretched"
    return torch.cat([positions, own[len(positions) :].to(positions)]), "extended by new ones"


def resize(positions: Tensor, before: int, after: int) -> Tensor:
    """Interpolate the grid of patches: (1 + before^2, D) -> (1 + after^2, D)."""
    first, grid = positions.split([1, before * before])  # the class token's, (before^2, D)
    grid = grid.T.reshape(1, -1, before, before)  # (1, D, S, S)
    grid = F.interpolate(grid, (after, after), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, grid.flatten(2)[0].T])


def stretch(positions: Tensor, context: int) -> Tensor:
    """Keep the first 20 positions, and spread the others over a longer context: (L, D) -> (context, D).

    From 77 to 248 the ratio is 4: four positions for one.  Between two old positions the new ones are on a line; those
    after the last continue the line of the last two.

    Source: Zhang et al. 2024, knowledge-preserved stretching (Long-CLIP, arXiv 2403.15378).

    Raises:
        CheckpointError: there are too few positions.
    """
    length = len(positions)
    if length < KEPT + 2:
        raise CheckpointError(
            f"model.text.context={context}: the {length} positions of the weights are too few to be stretched, which "
            f"keeps the first {KEPT}; init_positions=new learns the further ones anew"
        )
    ratio = (length - KEPT) / (context - KEPT)
    at = KEPT + ratio * torch.arange(context - KEPT, dtype=torch.float64)  # where a new position is among the old
    lower = at.long().clamp(max=length - 2)
    weight = (at - lower)[:, None].to(positions.dtype)  # of the old position after it
    return torch.cat([positions[:KEPT], torch.lerp(positions[lower], positions[lower + 1], weight)])
