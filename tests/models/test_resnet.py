"""The convolutional image tower."""

import re

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from clipx.models.clip import CLIP
from clipx.models.resnet import GROUPS, ResNetBlock, ResNetEncoder
from clipx.models.text import TextEncoder
from clipx.optim import adamw


def tower(**changes: object) -> ResNetEncoder:
    return ResNetEncoder(**{"size": 16, "widths": [8, 16], "depths": [1, 2], "embed": 12, **changes})


@pytest.mark.parametrize(("before", "after", "halve"), [(16, 16, False), (16, 32, True), (16, 32, False)])
def test_a_block_is_torchvisions_with_group_norm(before: int, after: int, halve: bool) -> None:
    own = ResNetBlock(before, after, halve)
    shortcut = own.shortcut if isinstance(own.shortcut, nn.Sequential) else None
    peer = BasicBlock(before, after, 2 if halve else 1, shortcut, norm_layer=lambda width: nn.GroupNorm(GROUPS, width))
    for theirs, ours in zip((peer.conv1, peer.bn1, peer.conv2, peer.bn2), [*own.conv1, *own.conv2], strict=True):
        theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, before, 8, 8)
    torch.testing.assert_close(own(x), peer(x))


def test_the_features_of_a_picture_do_not_depend_on_its_batch() -> None:
    model, images = tower().train(), torch.randn(6, 3, 16, 16)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone)
    assert model.features(images).shape == (6, 16)
    assert alone.shape == (6, 12)


def test_its_arguments_build_the_same_tower_and_its_stages_have_every_parameter_once() -> None:
    model = tower()
    again = ResNetEncoder(**model.arguments())
    again.load_state_dict(model.state_dict())
    stages = [parameter for stage in model.stages() for parameter in stage]
    assert len(model.stages()) == 5  # stem, three blocks, projection
    assert len(stages) == len(set(stages)) == len([*model.parameters()])
    groups = adamw(CLIP(model, TextEncoder(width=8, depth=1, heads=1, embed=12)), layer_decay=0.5).param_groups
    assert len({group["peak_lr"] for group in groups}) == 5


def test_recomputed_activations_give_the_same_gradient() -> None:
    model, images = tower(), torch.randn(4, 3, 16, 16)
    model(images).square().sum().backward()
    plain = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpoint(True)
    model(images).square().sum().backward()
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [1]}, "depths=[1]: should have 2 values, one for each of widths=[8, 16]"),
        ({"size": 18}, "size=18 is not divisible by 4, as 2 stages need"),
        ({"widths": [8, 12]}, "widths=[8, 12]: 12 is not divisible by 8"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tower(**changes)
