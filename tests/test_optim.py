import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm.optim
import torch
from conftest import FEW
from torch import Tensor

from clipx.errors import UserError
from clipx.models.clip import CLIP
from clipx.models.lora import add_adapters
from clipx.models.resnet import ResNetEncoder
from clipx.models.text import TextEncoder
from clipx.models.timm import TimmTower
from clipx.models.tower import Tower
from clipx.models.vision import ImageEncoder
from clipx.muon import Muon, orthogonalise
from clipx.optim import UNSUITABLE, adamw, block_matrices, muon, named
from clipx.training.loop import State, step_optimizer


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
    with pytest.raises(UserError, match="^Tower has no stages; leave out unlock, optim.layer_decay and optim=muon$"):
        adamw(model, layer_decay=0.5)


OPTIMISERS = {
    "adamw": adamw,
    "muon": muon,
    "lion": partial(named, optimizer="timm.optim.Lion", lr=1e-4, weight_decay=1.0),
    **{
        name: partial(named, optimizer=name, lr=1e-3, weight_decay=0.0)
        for module in (torch.optim, timm.optim)
        for name, found in ((f"{module.__name__}.{key}", value) for key, value in vars(module).items())
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
        if name not in UNSUITABLE
    },
}


def small() -> CLIP:
    torch.manual_seed(0)
    text = TextEncoder(width=32, depth=2, heads=1, embed=32)
    return CLIP(ImageEncoder(size=16, patch=8, width=32, depth=2, heads=1, embed=32), text)


def fill_gradients(model: CLIP, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None


def weights(model: CLIP) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("amp", [None, torch.float16])
def test_a_gradient_that_is_not_finite_changes_nothing_whatever_the_optimiser(
    name: str, amp: torch.dtype | None
) -> None:
    model = small()
    state = State(model, OPTIMISERS[name](model), torch.amp.GradScaler("cpu", 1.0))
    for step in range(3):
        fill_gradients(model, step)
        before, moments = weights(model), copy.deepcopy(state.optimizer.state_dict()["state"])
        if step == 1:
            model.visual.proj.grad[0, 0] = torch.nan
        state.scaler.scale(torch.zeros(()))
        step_optimizer(state, None, amp)
        changed = [key for key, value in weights(model).items() if not torch.equal(value, before[key])]
        assert changed or step < 2
        if step == 1:
            assert not changed
            assert str(state.optimizer.state_dict()["state"]) == str(moments)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_continues_from_its_saved_state_to_the_bit(name: str, tmp_path: Path) -> None:
    def steps(state: State, first: int, last: int) -> None:
        for step in range(first, last):
            for group in state.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (1 - step / 10)
            fill_gradients(state.model, step)
            state.scaler.scale(torch.zeros(()))
            step_optimizer(state, None, None)

    def fresh() -> State:
        model = small()
        model.text.freeze()
        return State(model, OPTIMISERS[name](model, image_lr_scale=0.5), torch.amp.GradScaler("cpu", 1.0))

    straight = fresh()
    steps(straight, 0, 3)
    torch.save(straight.state_dict(), tmp_path / "saved.pt")
    steps(straight, 3, 6)
    resumed = fresh()
    resumed.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    steps(resumed, 3, 6)
    for key, value in weights(straight.model).items():
        assert torch.equal(value, weights(resumed.model)[key]), key


def test_muon_is_that_of_torch_for_the_matrices_of_blocks_and_adamw_for_the_rest() -> None:
    model, peer = small(), small()
    chosen = {name for name, p in model.named_parameters() if p in block_matrices(model)}
    assert len(chosen) == 4 * 4 and all(re.search(r"resblocks\.\d\.(attn|mlp)\..*weight$", name) for name in chosen)
    ours = muon(model, lr=1e-2, weight_decay=0.1)
    joint = {
        name: p for name, p in peer.named_parameters() if "in_proj_weight" in name
    }  # one matrix, one momentum each
    single = {
        f"{name}.{part}": torch.nn.Parameter(rows.clone())
        for name, p in joint.items()
        for part, rows in enumerate(p.chunk(3))
    }
    single |= {name: p for name, p in peer.named_parameters() if name in chosen - joint.keys()}
    others = adamw(peer, lr=1e-2, weight_decay=0.1)
    for group in others.param_groups:
        group["params"] = [p for p in group["params"] if not any(p is q for q in (*joint.values(), *single.values()))]
    matrices = torch.optim.Muon(single.values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = weights(model)
    for step in range(4):
        fill_gradients(model, step)
        fill_gradients(peer, step)
        for name, p in joint.items():
            for part, rows in enumerate(p.grad.chunk(3)):
                single[f"{name}.{part}"].grad = rows
        for optimizer in (ours, matrices, others):
            optimizer.step()
    theirs = weights(peer) | {
        name: torch.cat([single[f"{name}.{part}"].detach() for part in range(3)]) for name in joint
    }
    for name, value in weights(model).items():
        if name in chosen:  # torch's products are of bfloat16
            assert (value - theirs[name]).norm() < 0.02 * (value - start[name]).norm(), name
        else:
            assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("shape", [(1, 24, 10), (3, 10, 10), (2, 10, 24)])
def test_orthogonalising_applies_the_polynomial_to_the_singular_values(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert s.min() > 0.6 and s.max() < 1.3
    torch.testing.assert_close(orthogonalise(matrices), (u * s[:, None] @ v).float(), rtol=1e-4, atol=1e-5)


def test_a_kernel_is_updated_as_the_matrix_of_its_output_channels() -> None:
    tower = ResNetEncoder(size=8, widths=[8, 16], depths=[1, 1], embed=32)
    model = CLIP(tower, TextEncoder(width=32, depth=1, heads=1, embed=32))
    kernels = {name for name, p in tower.named_parameters() if p in block_matrices(model) and p.ndim == 4}
    assert kernels == {name for name, p in tower.named_parameters() if p.ndim == 4} - {"stem.0.weight"}
    optimizer, before = muon(model, lr=1e-2, weight_decay=0.1), weights(tower)
    matrices = {name: torch.nn.Parameter(before[name].flatten(1).clone()) for name in kernels}
    peer = torch.optim.Muon(matrices.values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        fill_gradients(model, step)
        for name, matrix in matrices.items():
            matrix.grad = tower.get_parameter(name).grad.flatten(1)
        optimizer.step()
        peer.step()
    for name, value in weights(tower).items():
        if name in kernels:  # torch's products are of bfloat16
            assert (value.flatten(1) - matrices[name]).norm() < 0.02 * (value - before[name]).norm(), name


def test_muon_takes_the_matrices_of_timm_and_of_lora_but_no_convolution_of_single_channels() -> None:
    text = TextEncoder(width=32, depth=1, heads=1, embed=32)
    image = TimmTower("test_vit", embed=32, size=16)
    found = block_matrices(CLIP(image, text))
    names = {name: found[p] for name, p in image.named_parameters() if p in found}
    assert names["trunk.blocks.0.attn.qkv.weight"] == 3 and names["trunk.blocks.0.mlp.fc1.weight"] == 1
    assert not {"trunk.pos_embed", "head.proj.weight", "trunk.patch_embed.proj.weight"} & names.keys()
    convolutional = TimmTower("test_convnext", embed=32, size=32)
    chosen = {name for name, p in convolutional.named_parameters() if p in block_matrices(CLIP(convolutional, text))}
    assert "trunk.stages.1.downsample.1.weight" in chosen and not any("conv_dw" in name for name in chosen)
    model = small()
    model.text.freeze()
    add_adapters({"image": model.visual}, rank=2)
    names = {name for name, p in model.named_parameters() if p in block_matrices(model)}
    assert len(names) == 2 * 4 * 2 and all(name.endswith((".A", ".B")) for name in names)


def test_muon_without_a_matrix_to_train_is_refused() -> None:
    model = small()
    for tower in model.towers.values():
        tower.freeze()
    with pytest.raises(UserError, match="^optim=muon: no matrix in the blocks of a tower is trained; use optim=adamw"):
        muon(model)


def test_muon_learns_at_the_rates_of_towers_and_stages() -> None:
    model = small()
    optimizer = muon(model, lr=1.0, image_lr_scale=0.1, layer_decay=0.5)
    expected = {
        p: group["peak_lr"]
        for group in adamw(model, lr=1.0, image_lr_scale=0.1, layer_decay=0.5).param_groups
        for p in group["params"]
    }
    found = {p: group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert isinstance(optimizer, Muon) and found == expected and optimizer.param_groups[0]["peak_lr"] == 1.0


RADAM = "optim.optimizer=torch.optim.RAdam"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["optim.optimizer=heavy.Ball"],
            "optim.optimizer=heavy.Ball: should be a class of torch.optim or timm.optim, such as torch.optim.RAdam; "
            "for others, see docs/extend.md",
        ),
        (
            ["optim.optimizer=torch.optim.Radam"],
            "optim.optimizer=torch.optim.Radam: no such class; did you mean torch.optim.RAdam?",
        ),
        (
            ["optim.optimizer=torch.optim.LBFGS"],
            "optim.optimizer=torch.optim.LBFGS: cannot be used: it computes the loss several times a step",
        ),
        (
            ["optim.optimizer=torch.optim.Muon"],
            "optim.optimizer=torch.optim.Muon: cannot be used: it takes matrices only; use optim=muon",
        ),
        ([RADAM, "+optim.beta=[0.9,0.95]"], "optim.beta: RAdam has no such argument; did you mean optim.betas?"),
        ([RADAM, "+optim.betas=[2,0.95]"], f"{RADAM} refuses its arguments: Invalid beta parameter at index 0: 2"),
        (
            [RADAM, "optim.betas=[0.9,0.95]"],
            "optim.betas: not a key of clipx; if it is an argument of the optimiser, add it with +optim.betas=...",
        ),
        (
            ["optim.optimizer=torch.optim.Rprop", "optim.weight_decay=0.1"],
            "optim.weight_decay=0.1: Rprop has none; set optim.weight_decay=0",
        ),
    ],
)
def test_what_the_named_optimiser_does_not_take_is_refused_in_one_line(
    args: list[str], line: str, fails: Callable[..., str]
) -> None:
    assert fails(*FEW, "optim=any", "optim.lr=1e-3", *args) == line
