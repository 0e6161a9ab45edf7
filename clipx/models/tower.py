"""What CLIP asks of its towers: features, their projection, and how the input is made."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipx.errors import UserError
from clipx.models.packed import grid_edges
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import Tokenizer


class Tower(nn.Module):
    """Half of a CLIP: ``features``, and their projection into the joint space."""

    width: int  # D, size of the features
    embed: int  # E, size of the joint space
    pretrained: bool | str = False  # weights that another library trained: a file, or true for those it downloads
    source: str = ""  # where the library downloads them from

    def features(self, inputs: Any, /) -> Tensor:
        """A batch of inputs -> (B, D)."""
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, E)."""
        raise NotImplementedError

    def forward(self, inputs: Any) -> Tensor:
        return self.project(self.features(inputs))

    def arguments(self) -> dict[str, Any]:
        """The arguments that build such a tower, by which weights are compared; empty if it does not say."""
        return {}

    def load_trunk(self, weights: Mapping[str, Tensor] | None) -> None:
        """Load pretrained weights of what computes the features; None for those that its library downloads.

        Raises:
            ValueError: they are not those of this tower.
            OSError: they cannot be downloaded.
        """
        raise NotImplementedError

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that ``freeze`` freezes; all, if the projection comes with them."""
        return self.parameters()

    def freeze(self) -> None:
        """Stop training the tower; a new projection of a pretrained trunk is still trained."""
        for parameter in self.trunk_parameters():
            parameter.requires_grad_(False)

    def stages(self) -> list[list[nn.Parameter]]:
        """The parameters from input to output: embeddings, each block, projection."""
        raise UserError(f"{type(self).__name__} has no stages; leave out unlock, optim.layer_decay and optim=muon")

    def set_grad_checkpoint(self, on: bool) -> None:
        """Recompute activations in the backward pass to save memory."""
        if on:
            raise UserError(f"grad_checkpoint: {type(self).__name__} has no blocks to recompute")


class ImageTower(Tower):
    """Pictures, (B, 3, S, S) floats prepared as ``preprocessing`` says -> (B, E)."""

    preprocessing: Preprocessing

    def set_patch_dropout(self, share: float) -> None:
        """Leave out a share of the patches in training; 0 for none."""
        if share:
            raise UserError(f"patch_dropout={share:g}: {type(self).__name__} does not leave out patches; set 0")

    @property
    def size(self) -> int:
        """Side of the pictures, pixels."""
        return self.preprocessing.size


class TextTower(Tower):
    """Captions, packed or (B, L) token ids -> (B, E)."""

    tokenizer: Tokenizer

    @property
    def context(self) -> int:
        """Maximum number of tokens of a caption."""
        return self.tokenizer.context

    def grid_edges(self, device: torch.device, amp: torch.dtype | None, compiled: bool = False) -> Sequence[int] | None:
        """How captions are packed for this tower, as ``pack`` takes it."""
        return grid_edges(device, amp, compiled)
