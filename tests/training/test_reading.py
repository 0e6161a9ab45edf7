"""What a step logs is the same whether it is read at once or, as on a GPU, when the next step has been launched."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FEW, assert_same_state, lines
from gradients import CPU

from clipx.models.packed import to_device
from clipx.training import callbacks, step
from clipx.training.reading import Reading

Train = Callable[..., None]
TIMES = {"seconds", "train/samples_per_s", "train/data_wait", "train/host_memory_gb"}


@pytest.fixture
def read_late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets runs read one step later; the steps that the run had done when it logged one."""
    monkeypatch.setattr(callbacks, "runs_ahead", lambda _output: True)
    log, seen = callbacks.Callbacks.log, []

    def noted(self: callbacks.Callbacks, state: object, reading: Reading, output: object) -> None:
        seen.append(state.step - reading.step)
        log(self, state, reading, output)

    monkeypatch.setattr(callbacks.Callbacks, "log", noted)
    return seen


def rows(run: Path) -> list[dict]:
    return [{tag: value for tag, value in row.items() if tag not in TIMES} for row in lines(run)]


WORDS = (*FEW, "max_steps=12", "eval_every=5", "save_every=4")


@pytest.fixture
def at_once(train: Train, tmp_path: Path) -> Path:
    """A run that reads at once."""
    train(*WORDS, "name=at_once")
    return tmp_path / "outputs/at_once"


def test_rows_read_late_are_those_read_at_once(
    at_once: Path, read_late: list[int], train: Train, tmp_path: Path
) -> None:
    train(*WORDS, "name=late")
    assert rows(tmp_path / "outputs/late") == rows(at_once)
    assert read_late == [1, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0]  # at once where an evaluation or a save is due, or the end
    assert_same_state(at_once, tmp_path / "outputs/late")


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_stopped_run_that_reads_late_loses_and_repeats_no_row(
    at_once: Path, read_late: list[int], train: Train, tmp_path: Path, log_every: int
) -> None:
    words = (*WORDS, "name=late", f"log_every={log_every}")
    for stop in (2, 7, 12):
        train(*words, f"stop_at={stop}")
    logged = [row["step"] for row in rows(tmp_path / "outputs/late") if "train/lr" in row]
    assert logged == sorted({*range(log_every, 13, log_every), 2, 7, 12})
    expected = {row["step"]: row for row in rows(at_once) if "train/lr" in row}
    assert all(row == expected[row["step"]] for row in rows(tmp_path / "outputs/late") if "train/lr" in row)


@pytest.mark.parametrize("log_every", [1, 50])
def test_bad_steps_count_and_roll_back_the_same_when_read_late(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, log_every: int
) -> None:
    monkeypatch.setattr(callbacks, "MAX_UNCHECKED", 3)
    optimise = step.backward

    def spoilt(encoder: object, loss_fn: object, parts: list, scaler: object) -> object:
        bad = parts[0].captions.ids.sum().item() in bad_batches
        return optimise(encoder, (lambda *x: loss_fn(*x) * math.nan) if bad else loss_fn, parts, scaler)

    bad_batches: set[int] = set()
    monkeypatch.setattr("clipx.training.loop.backward", spoilt)
    from clipx.training import loop

    split, sums = loop.split_micro_batches, []

    def recorded(*args: object) -> list:
        parts = split(*args)
        sums.append(parts[0].captions.ids.sum().item())
        return parts

    monkeypatch.setattr(loop, "split_micro_batches", recorded)
    train(*WORDS, "name=good")
    bad_batches |= {sums[1], *sums[5:9]}  # step 2, and steps 6 to 9
    words = (*WORDS, "max_bad_steps=3", f"log_every={log_every}")
    train(*words, "name=at_once")
    request.getfixturevalue("read_late")
    train(*words, "name=late")
    assert rows(tmp_path / "outputs/late") == rows(tmp_path / "outputs/at_once")
    assert rows(tmp_path / "outputs/late")[-1]["samples"] > 16 * 12  # went back, and left batches out
    assert_same_state(tmp_path / "outputs/at_once", tmp_path / "outputs/late")


def test_without_a_gpu_tensors_stay_where_they_are() -> None:
    x = torch.ones(2)
    assert to_device(x, CPU) is x
