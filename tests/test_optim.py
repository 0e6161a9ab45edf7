import pytest
import torch

from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.optim import adamw


def test_gains_biases_and_scalars_do_not_decay() -> None:
    model = CLIP(ImageEncoder(size=32, depth=1, embed=32), TextEncoder(depth=1, embed=32))
    decayed, kept = adamw(model, lr=1e-3, weight_decay=0.3).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3 and kept["weight_decay"] == 0
    assert decayed["peak_lr"] == kept["peak_lr"] == 1e-3
    spared = {names[id(parameter)] for parameter in kept["params"]}
    assert {"logit_scale", "visual.class_embedding", "visual.ln_pre.weight", "text.ln_final.bias"} <= spared
    assert all(name.endswith(("bias", "class_embedding", "logit_scale")) or ".ln_" in name for name in spared)
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert [len(group["params"]) for group in adamw(model).param_groups] == [0, 1]


def test_a_tower_learns_more_slowly_and_the_first_group_tells_the_rate_of_the_rest() -> None:
    model = CLIP(ImageEncoder(size=32, depth=1, embed=32), TextEncoder(depth=1, embed=32))
    groups = adamw(model, lr=1e-3, image_lr_scale=0.1).param_groups
    assert groups[0]["peak_lr"] == 1e-3
    rates = {id(p): (group["peak_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        rate, decay = rates.pop(id(p))
        assert rate == pytest.approx(1e-4 if name.startswith("visual.") else 1e-3), name
        assert decay == (0.2 if p.ndim >= 2 else 0)
    assert not rates
