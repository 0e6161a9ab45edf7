"""Whether higher or lower is better, for the best checkpoint, comparisons and searches."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FEW, summary

from clipx import compare, load
from clipx.errors import UserError
from clipx.evals.validation import Validation
from clipx.training import run as training
from clipx.training.callbacks import Callbacks
from clipx.training.direction import is_better, mode_of
from clipx.weights.checkpoint import read


@pytest.mark.parametrize(("tag", "mode"), [
    ("val/loss", "min"), ("train/loss", "min"), ("val/retrieval/i2t_median_rank", "min"), ("val/skipped", "min"),
    ("val/retrieval@b/i2t_r1", "max"), ("val/zero_shot@a/top1", "max"), ("val/gap/closeness", "max"),
    ("val/retrieval/shuffled_t2i_mean_rank", "min"), ("val/retrieval/mean_recall", "max"),
])  # fmt: skip
def test_the_direction_of_built_in_metrics_is_known(tag: str, mode: str) -> None:
    assert mode_of(tag, None) == mode


def test_a_wrong_mode_is_refused_and_a_users_metric_follows_it() -> None:
    assert mode_of("val/gap/closeness", "min") == "min"
    with pytest.raises(UserError, match="^mode=max: val/loss is better when it is low; leave out mode, or"):
        mode_of("val/loss", "max")
    with pytest.raises(UserError, match="^mode=min: val/retrieval/mean_recall is better when it is high"):
        mode_of("val/retrieval/mean_recall", "min")


def test_a_nan_is_never_the_best() -> None:
    assert not is_better(math.nan, None, "min") and not is_better(math.nan, 1.0, "min") and is_better(1.0, None, "min")
    assert is_better(1.0, 2.0, "min") and not is_better(1.0, 2.0, "max") and not is_better(2.0, 2.0, "max")


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation with a fixed loss at each step."""
    known = {1: 3.0, 2: 1.0, 3: 2.0}
    monkeypatch.setattr(Validation, "__call__", lambda self, model, step, log: {"val/loss": known[step]})


def test_the_best_checkpoint_by_a_loss_is_that_of_the_lowest(
    losses: None, train: Callable[..., None], tmp_path: Path
) -> None:
    train(*FEW, "name=x", "max_steps=3", "objective=val/loss", "eval_every=1")
    run = tmp_path / "outputs/x"
    assert summary(run)["best"] == {"metric": "val/loss", "mode": "min", "value": 1.0, "step": 2}
    assert summary(run)["mode"] == "min" and read(run / "checkpoints/clip_best.pt")["step"] == 2
    best = read(run / "checkpoints/clip_best.pt")["model_state_dict"]
    assert all((tensor == best[name]).all() for name, tensor in load(str(run))[0].state_dict().items())


def test_a_run_returns_its_objective_also_when_it_has_finished_before(
    losses: None, train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned = []
    run = training.run
    monkeypatch.setattr(training, "run", lambda *args: returned.append(run(*args)))
    args = [*FEW, "name=x", "max_steps=3", "objective=val/loss", "eval_every=1"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "read_summary", None)  # fails if a run reads its own summary
        train(*args, "stop_at=2")
        train(*args)
    train(*args)
    (tmp_path / "outputs/x/summary.json").unlink()
    train(*args)
    assert returned == [1.0, 2.0, 2.0, 2.0] and summary(tmp_path / "outputs/x")["state"] == "finished"


def test_a_best_chosen_in_the_wrong_direction_is_dropped(
    losses: None, train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Older(Callbacks):
        def save(self, state: object, kinds: list[str]) -> None:
            state.best = {"metric": "val/loss", "value": 0.5, "step": 1}  # without a mode
            super().save(state, kinds)

    with monkeypatch.context() as patch:
        patch.setattr("clipx.training.run.Callbacks", Older)
        train(*FEW, "name=x", "max_steps=3", "objective=val/loss", "eval_every=1", "stop_at=1")
    train(*FEW, "name=x", "max_steps=3", "objective=val/loss", "eval_every=1")
    assert summary(tmp_path / "outputs/x")["best"]["value"] == 1.0


def test_compare_lists_the_lowest_loss_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, loss in (("a", 2.0), ("b", 1.0), ("c", math.nan), ("d", 3.0)):
        common = {"state": "finished", "objective": "val/loss", "mode": "min", "best": {}, "step": 1, "seconds": 1}
        (tmp_path / name).mkdir()
        content = {**common, "final": {"val/loss": loss}, "config": {"x": name}}
        (tmp_path / name / "summary.json").write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["clipx.compare", str(tmp_path)])
    compare.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "b", "a", "d", "c"]


def test_a_direction_that_contradicts_the_objective_is_refused(fails: Callable[..., str]) -> None:
    search = ("-m", *FEW, "hydra/sweeper=optuna", "optim.lr=interval(0,1)")
    assert fails(*search, "hydra.sweeper.direction=minimize").startswith(
        "hydra.sweeper.direction=minimize: val/retrieval/mean_recall is better when it is high"
    )
    assert fails("name=x", "mode=min").startswith("mode=min: val/retrieval/mean_recall is better when it is high")


def test_a_run_ends_in_a_table_of_each_score_its_last_and_best_value(
    losses: None, train: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*FEW, "name=x", "max_steps=3", "objective=val/loss", "eval_every=1"]
    train(*args, "stop_at=2")
    capsys.readouterr()
    train(*args)  # the best value is from before the resume
    lines = capsys.readouterr().err.splitlines()
    first = lines.index("metric      value  best  at step")
    assert lines[first + 1 : first + 3] == ["val/loss *      2     1        2", "* selects clip_best.pt"]
    assert max(map(len, lines[first:])) < 100 and any(line.startswith("weights   outputs/x/checkpo") for line in lines)
