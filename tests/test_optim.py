import pytest
import torch

from clipx.errors import UserError
from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.tower import Tower
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


def test_layer_decay_lowers_the_rate_of_each_stage_below_the_output() -> None:
    model = CLIP(ImageEncoder(size=32, depth=2, embed=32), TextEncoder(depth=1, embed=32))
    groups = adamw(model, lr=1.0, image_lr_scale=0.1, layer_decay=0.5).param_groups
    rates = {p: group["peak_lr"] for group in groups for p in group["params"]}
    table = {
        "logit_scale": 1.0,
        "visual.class_embedding": 0.0125,
        "visual.positional_embedding": 0.0125,
        "visual.conv1": 0.0125,
        "visual.ln_pre": 0.0125,
        "visual.transformer.resblocks.0": 0.025,
        "visual.transformer.resblocks.1": 0.05,
        "visual.ln_post": 0.1,
        "visual.proj": 0.1,
        "text.token_embedding": 0.25,
        "text.positional_embedding": 0.25,
        "text.transformer.resblocks.0": 0.5,
        "text.ln_final": 1.0,
        "text.text_projection": 1.0,
    }
    found = {name: rates.pop(parameter) for name, parameter in model.named_parameters()}
    assert not rates
    for name, rate in found.items():
        (part,) = (part for part in table if name == part or name.startswith(f"{part}."))
        assert rate == pytest.approx(table[part]), name
    assert groups[0]["peak_lr"] == 1.0


def test_layer_decay_needs_a_tower_that_names_its_stages() -> None:
    model = torch.nn.Module()
    model.visual = Tower()
    with pytest.raises(UserError, match="^Tower has no stages; leave out unlock and optim.layer_decay$"):
        adamw(model, layer_decay=0.5)
