"""Runs with LoRA: what they keep, evaluate and save, and that they resume."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FEW, assert_same_state, lines
from torch import Tensor
from torch.nn.utils import parametrize

from clipx import load
from clipx.evals.validation import Validation
from clipx.models.clip import CLIP
from clipx.weights.checkpoint import read
from clipx.weights.load import find

Train = Callable[..., None]
RUN = (*FEW, "max_steps=9", "optim.lr=0.01", "sched.warmup=0", "evals=[]")
LORA = (*RUN, "lora.rank=4")
MATRICES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def saved(run: Path, kind: str = "last") -> dict:
    return read(run / f"checkpoints/clip_{kind}.pt")


def unequal(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    assert one.keys() == two.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


def test_the_weights_that_a_run_starts_from_stay_as_they_are(train: Train, tmp_path: Path) -> None:
    train(*RUN, "max_steps=1", "name=start")
    train(*LORA, "name=x", "init_from=outputs/start")
    start, tuned = saved(tmp_path / "outputs/start")["model_state_dict"], saved(tmp_path / "outputs/x")
    changed = unequal(start, tuned["model_state_dict"])
    assert changed == {name for name in start if name.endswith(MATRICES)} | {"logit_scale"}
    kept = {name: tensor for name, tensor in tuned["lora_state_dict"].items() if name.endswith(".original")}
    for name, tensor in kept.items():
        plain = name.replace("parametrizations.", "").removesuffix(".original").removeprefix("text.")
        assert torch.equal(tensor, start[plain])
    assert len(kept) == 8 and len(tuned["optimizer"]["state"]) == 2 * 8 + 1


def test_a_resumed_run_ends_where_an_unbroken_one_does(train: Train, tmp_path: Path) -> None:
    args = (*LORA, "ema=0.8", "micro_batch_size=8")
    train(*args, "name=straight")
    train(*args, "name=x", "stop_at=1")
    train(*args, "name=x", "stop_at=5")
    train(*args, "name=x")
    assert_same_state(tmp_path / "outputs/straight", tmp_path / "outputs/x")


@pytest.mark.parametrize("ema", ["null", "0.8"])
def test_what_is_evaluated_is_saved_as_plain_weights(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: str
) -> None:
    image, tokens = torch.randn(3, 3, 32, 32), torch.tensor([[49406, 320, 49407]])
    evaluated: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
    call = Validation.__call__

    def recorded(self: Validation, model: CLIP, *args: object) -> dict[str, float]:
        with torch.no_grad():
            evaluated.append((copy.deepcopy(model.state_dict()), model.encode_image(image), model.encode_text(tokens)))
        return call(self, model, *args)

    monkeypatch.setattr(Validation, "__call__", recorded)
    train(*LORA, f"ema={ema}", "evals=[retrieval]", "eval_every=3", "best=val/loss", "name=x")
    run = tmp_path / "outputs/x"
    losses = [row["val/loss"] for row in lines(run) if "val/loss" in row]
    state, *features = evaluated[losses.index(min(losses))]
    best, last = saved(run, "best"), saved(run)
    assert not unequal(best["model_state_dict"], find(run).state)
    assert not best.keys() & {"optimizer", "lora_state_dict", "ema_state_dict", "ema_lora_state_dict"}
    assert not unequal(evaluated[-1][0], find(run / "checkpoints/clip_last.pt").state)
    assert bool(unequal(evaluated[-1][0], last["model_state_dict"])) == (ema != "null")

    model, _, _ = load(run)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    with torch.no_grad():
        for one, other in zip(features, (model.encode_image(image), model.encode_text(tokens)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert not unequal(state, {**model.state_dict()})


def test_one_tower_is_adapted_and_the_other_frozen_or_trained(train: Train, tmp_path: Path) -> None:
    train(*RUN, "max_steps=1", "name=start")
    start = saved(tmp_path / "outputs/start")["model_state_dict"]
    for name, freeze in (("locked", "[text]"), ("whole", "[]")):
        train(*LORA, "lora.towers=[image]", f"freeze={freeze}", "init_from=outputs/start", f"name={name}")
        changed = unequal(start, saved(tmp_path / f"outputs/{name}")["model_state_dict"])
        image = {key for key in changed if key.startswith("visual.")}
        assert image == {key for key in start if key.startswith("visual.") and key.endswith(MATRICES)}
        assert bool(changed - image - {"logit_scale"}) == (name == "whole")


def test_adapters_are_drawn_from_the_seed(train: Train, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(*LORA, "max_steps=1", f"seed={seed}", f"name={name}")
    a, b, c = (saved(tmp_path / f"outputs/{name}")["lora_state_dict"] for name in "abc")
    assert not unequal(a, b) and unequal(a, c) == a.keys()


def test_header_and_check_say_what_is_trained_and_what_the_optimiser_keeps(
    train: Train, check: Callable[..., tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    train(*LORA, "max_steps=1", "name=x")
    output = capsys.readouterr().err
    assert "lora      rank 4, alpha 16, 8 matrices\n" in output
    trained = 4 * (4 * 192 + 2 * 192 + 2 * 5 * 192) + 4 * (4 * 32 + 2 * 32 + 2 * 5 * 32) + 1
    said = f"{trained:,} of 2,139,585 parameters (0.67%); the optimiser keeps 115kB\n"
    assert f"trained   {said}" in output
    output, code = check(*LORA, "name=y")
    assert f"ok    model     trains {said}" in output and code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora.rank=0"], "lora.rank=0: should be greater than 0"),
        (["lora.rnk=4"], "lora.rnk: there is no such key; did you mean lora.rank?"),
        (["lora=8"], "lora=8: should have keys; lora.rank=... sets one"),
        (["lora.alpha=32"], "lora has no effect without a rank; add lora.rank=8"),
        (["lora.rank=4", "lora.towers=[vision]"], "lora.towers=['vision']: should be 'image' or 'text'"),
        (
            ["lora.rank=4", "lora.weights=[atn]"],
            "lora.weights: no matrix has atn in its name; there are attn.in_proj_weight, attn.out_proj.weight, "
            "mlp.c_fc.weight, mlp.c_proj.weight",
        ),
        (
            ["lora.rank=64"],
            "lora.rank=64 is more than a side of transformer.resblocks.0.attn.in_proj_weight, 96 x 32; give at most 32",
        ),
        (
            ["lora.rank=4", "freeze=[image]"],
            "freeze=[image] contradicts lora.towers=[image,text]: a frozen tower has no adapters; leave out freeze, "
            "or set lora.towers=[text]",
        ),
        (
            ["lora.rank=4", "freeze=[image,text]"],
            "freeze=[image,text] contradicts lora.towers=[image,text]: a frozen tower has no adapters; leave out "
            "freeze, or lora",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused_in_one_line(
    fails: Callable[..., str], arguments: list[str], message: str
) -> None:
    assert fails(*RUN, *arguments) == message
    assert not Path("outputs").exists()


def test_a_run_with_other_adapters_is_another_run(train: Train, fails: Callable[..., str]) -> None:
    train(*LORA, "max_steps=2", "stop_at=1", "name=x")
    assert "(lora.rank: 4 -> 8; lora.alpha: 16.0 -> 8.0)" in fails(*LORA, "lora.rank=8", "lora.alpha=8", "name=x")
    assert "(lora.rank: 4 -> None)" in fails(*RUN, "max_steps=2", "name=x")
