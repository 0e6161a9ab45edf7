"""A moving average of the weights: what it is, where it is used, and that it resumes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FEW, assert_same_state, lines
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clipx.config.instantiate import build
from clipx.evals.validation import Validation
from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.training import loop, step
from clipx.training.average import WeightAverage
from clipx.training.loop import State
from clipx.weights.checkpoint import read
from clipx.weights.load import find, initialise

Train = Callable[..., None]
RUN = (*FEW, "max_steps=9", "optim.lr=0.01", "sched.warmup=0", "evals=[]", "ema=0.8")


def saved(run: Path, kind: str = "last") -> dict:
    return read(run / f"checkpoints/clip_{kind}.pt")


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> list[AveragedModel]:
    """torch's own average, driven next to each run that follows."""
    averages: list[AveragedModel] = []
    step_optimizer = loop.step_optimizer

    def step_and_average(state: State, *args: object) -> object:
        norms = step_optimizer(state, *args)
        if state.step == 0:
            averages.append(AveragedModel(state.model, multi_avg_fn=get_ema_multi_avg_fn(0.8)))
        averages[-1].update_parameters(state.model)
        return norms

    monkeypatch.setattr(loop, "step_optimizer", step_and_average)
    return averages


def test_the_average_is_that_of_torch_and_changes_nothing_else(
    train: Train, tmp_path: Path, by_hand: list[AveragedModel]
) -> None:
    train(*RUN, "name=averaged")
    train(*RUN, "name=plain", "ema=null")
    averaged, plain = saved(tmp_path / "outputs/averaged"), saved(tmp_path / "outputs/plain")
    assert equal(averaged["ema_state_dict"], by_hand[0].module.state_dict()) and averaged["ema_updates"] == 9
    assert equal(averaged["model_state_dict"], plain["model_state_dict"])
    assert not equal(averaged["ema_state_dict"], averaged["model_state_dict"])
    assert averaged.keys() - plain.keys() == {"ema_state_dict", "ema_lora_state_dict", "ema_updates"}


def test_a_resumed_run_ends_with_the_average_of_an_unbroken_one(train: Train, tmp_path: Path) -> None:
    train(*RUN, "name=straight")
    train(*RUN, "name=x", "stop_at=1")
    train(*RUN, "name=x", "stop_at=5")
    train(*RUN, "name=x")
    assert_same_state(tmp_path / "outputs/straight", tmp_path / "outputs/x")


def test_the_average_is_what_is_evaluated_kept_and_loaded(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[dict[str, Tensor]] = []
    call = Validation.__call__

    def recorded(self: Validation, model: CLIP, *args: object) -> dict[str, float]:
        evaluated.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return call(self, model, *args)

    monkeypatch.setattr(Validation, "__call__", recorded)
    train(*RUN, "evals=[retrieval]", "eval_every=3", "best=val/loss", "name=x")
    run = tmp_path / "outputs/x"
    best, last = saved(run, "best"), saved(run)
    losses = [row["val/loss"] for row in lines(run) if "val/loss" in row]
    assert equal(evaluated[losses.index(min(losses))], best["model_state_dict"])
    assert equal(evaluated[-1], last["ema_state_dict"])
    assert not best.keys() & {"optimizer", "ema_state_dict", "ema_updates"}

    assert equal(find(run).state, best["model_state_dict"])
    assert equal(find(run / "checkpoints/clip_last.pt").state, last["ema_state_dict"])
    model = build(last["config"]["model"])
    initialise(model, str(run / "checkpoints/clip_last.pt"))
    assert equal(dict(model.state_dict()), last["ema_state_dict"])


def test_a_frozen_tower_is_its_own_average(train: Train, tmp_path: Path) -> None:
    train(*RUN, "freeze=[image]", "max_steps=3", "name=x")
    content = saved(tmp_path / "outputs/x")
    averaged, trained = content["ema_state_dict"], content["model_state_dict"]
    assert {name for name in trained if torch.equal(averaged[name], trained[name])} >= {
        name for name in trained if name.startswith("visual.")
    }


def test_a_run_that_goes_back_has_the_average_of_its_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalise, calls = step.Normalise.__call__, [0]

    def poisoned(self: step.Normalise, images: Tensor) -> Tensor:
        calls[0] += 1
        return normalise(self, images) * (float("nan") if calls[0] in (5, 6, 7) else 1)

    monkeypatch.setattr(step.Normalise, "__call__", poisoned)
    train(*RUN, "name=x", "keep_every=4", "save_every=4", "max_bad_steps=2")
    assert saved(tmp_path / "outputs/x", "step_4")["ema_updates"] == 4
    assert saved(tmp_path / "outputs/x")["ema_updates"] == 9


def test_a_run_that_had_no_average_starts_one_where_it_resumes(train: Train, tmp_path: Path) -> None:
    train(*RUN, "name=x", "ema=null", "stop_at=8")
    train(*RUN, "name=x", "resume_allow=[ema]")
    content = saved(tmp_path / "outputs/x")
    assert content["ema_updates"] == 1 and equal(content["ema_state_dict"], content["model_state_dict"])


def test_before_the_first_step_the_average_is_the_model() -> None:
    model = CLIP(ImageEncoder(32, 16, 64, 1, 1, 32), TextEncoder(width=64, depth=1, heads=1, embed=32))
    average = WeightAverage(model, 0.9)
    assert average.model is model and average.state_dict() == {}
    average.update()
    assert average.model is not model and equal(average.model.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("decay", "message"),
    [
        ("1", "ema=1: should be less than 1"),
        ("0", "ema=0: should be greater than 0"),
        ("slow", "ema='slow': should be a valid number, unable to parse string as a number"),
    ],
)
def test_a_decay_that_cannot_be_is_refused(fails: Callable[..., str], decay: str, message: str) -> None:
    assert fails(*RUN, f"ema={decay}") == message
