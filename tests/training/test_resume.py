"""Resuming gives the same run: after signals, damaged checkpoints and divergence, or with permitted changes."""

import errno
import fcntl
import itertools
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import EARLY, FEW, assert_same_state, lines, summary

from clipx import distributed
from clipx.data.loader import train_ranges
from clipx.training import lock, logs, run, step
from clipx.training.loop import State
from clipx.training.parts import RunParts
from clipx.weights.checkpoint import read

Train = Callable[..., None]
Fails = Callable[..., str]


def losses(directory: Path) -> list[float]:
    return [line["train/loss"] for line in lines(directory) if "train/loss" in line]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls a function when a run logs a given step."""

    def run_at_step(step: int, action: Callable[[], None]) -> None:
        scalars = logs.RunLog.scalars

        def scalars_with_action(self: logs.RunLog, numbers: dict, logged_step: int, samples: int) -> None:
            scalars(self, numbers, logged_step, samples)
            if logged_step == step and "train/loss" in numbers:
                action()

        monkeypatch.setattr(logs.RunLog, "scalars", scalars_with_action)

    return run_at_step


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGINT,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, marks=pytest.mark.long),
    ],
)
def test_a_signal_saves_and_the_same_command_resumes(
    number: signal.Signals,
    train: Train,
    tmp_path: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(*FEW, "name=straight", "max_steps=9")
    before = signal.getsignal(number)
    at_step(4, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as raised:
        train(*FEW, "name=x", "max_steps=9", "signal_exit_code=75")
    assert raised.value.code == 75 and signal.getsignal(number) is before
    message = capsys.readouterr().err
    assert f"{number.name}: checkpoint saved, stopping" in message
    assert f"resume with  python -m clipx.train {' '.join(FEW)} name=x max_steps=9 signal_exit_code=75" in message
    assert summary(tmp_path / "outputs/x")["state"] == "stopped"
    assert read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["step"] == 5  # the step of the signal is completed
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    train(*FEW, "name=x", "max_steps=9")
    assert_same_state(tmp_path / "outputs/straight", tmp_path / "outputs/x")


def test_a_signal_that_kills_the_workers_too_saves_all_the_same(
    train: Train, tmp_path: Path, at_step: Callable[..., None]
) -> None:
    def whole_group() -> None:
        from multiprocessing import active_children

        signal.raise_signal(signal.SIGTERM)
        for child in active_children():
            os.kill(child.pid, signal.SIGKILL)

    at_step(4, whole_group)
    with pytest.raises(SystemExit) as raised:
        train(*FEW, "name=x", "max_steps=300", "workers=1", "eval_every=null")
    assert raised.value.code == 0 and read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["step"] in range(4, 300)


def test_a_sweep_ends_with_its_job_at_a_signal(train: Train, tmp_path: Path, at_step: Callable[..., None]) -> None:
    at_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as raised:
        train("-m", *FEW, "max_steps=4", "seed=0,1")
    assert raised.value.code == 0 and len(list((tmp_path / "outputs/sweeps/sweep").iterdir())) == 1


def test_a_job_ended_by_a_signal_says_at_which_step(
    train: Train, at_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train("-m", *FEW, "max_steps=9", "name=s", "seed=0,1")
    assert re.search(r"^\[0\] seed=0: stopped at step 3, ", capsys.readouterr().err, re.MULTILINE)


def test_nohup_keeps_a_run_going_when_its_terminal_is_closed(
    train: Train, tmp_path: Path, at_step: Callable[..., None]
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    at_step(2, lambda: signal.raise_signal(signal.SIGHUP))
    train(*FEW, "name=x", "max_steps=3")
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
    assert summary(tmp_path / "outputs/x")["state"] == "finished"


def test_a_second_ctrl_c_ends_at_once(train: Train, at_step: Callable[..., None]) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(2, twice)
    with pytest.raises(KeyboardInterrupt):
        train(*FEW, "max_steps=4")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("spoil", [flipped, cut, Path.unlink])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    spoil: Callable[[Path], None], train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*FEW, "data.val_samples=0", "evals=[]", "max_steps=12"]  # a new best would be saved at the same step
    train(*args, "name=straight")
    train(*args, "name=x", "stop_at=9", "save_every=3")
    checkpoints = tmp_path / "outputs/x/checkpoints"
    spoil(checkpoints / "clip_last.pt")
    before = (checkpoints / "clip_previous.pt").read_bytes()
    capsys.readouterr()
    train(*args, "name=x", "stop_at=8")
    message = capsys.readouterr().err
    warned = "clip_last.pt is" in message and "resuming from outputs/x/checkpoints/clip_previous.pt, after step 6"
    assert spoil is Path.unlink or warned in message
    assert (checkpoints / "clip_previous.pt").read_bytes() == before  # not replaced by the damaged one
    train(*args, "name=x")
    assert_same_state(tmp_path / "outputs/straight", tmp_path / "outputs/x")
    assert losses(tmp_path / "outputs/x") == losses(tmp_path / "outputs/straight")


def test_where_both_are_damaged_the_others_are_named(train: Train, fails: Fails, tmp_path: Path) -> None:
    train(*FEW, "name=x", "max_steps=9", "stop_at=8", "save_every=2", "keep_every=4")
    for name in ("last", "previous"):
        cut(tmp_path / f"outputs/x/checkpoints/clip_{name}.pt")
    message = fails(*FEW, "name=x", "max_steps=9")
    assert "clip_last.pt is not a checkpoint: it is cut short" in message and "clip_previous.pt is not" in message
    assert "resume=PATH resumes from another checkpoint (outputs/x/checkpoints/clip_step_4.pt, outputs/x/ch" in message
    train(*FEW, "name=x", "max_steps=9", "resume=outputs/x/checkpoints/clip_step_4.pt")
    assert summary(tmp_path / "outputs/x")["state"] == "finished"


def test_the_best_checkpoint_is_a_third_as_large_and_nothing_is_resumed_from_it(
    train: Train, fails: Fails, tmp_path: Path
) -> None:
    train(*FEW, "name=x", "max_steps=2")
    best, last = (tmp_path / f"outputs/x/checkpoints/clip_{name}.pt" for name in ("best", "last"))
    assert best.stat().st_size < 0.4 * last.stat().st_size
    assert fails(*FEW, "name=y", "max_steps=2", f"resume={best}") == (
        f"{best} has weights but no training state to resume; init_from={best} starts from these weights, "
        "name=... starts another run"
    )
    train(*FEW, "name=y", "max_steps=2", f"init_from={best}")
    assert summary(tmp_path / "outputs/y")["state"] == "finished"


def test_a_checkpoint_of_another_model_is_refused_even_where_it_is_allowed(
    train: Train, fails: Fails, tmp_path: Path
) -> None:
    train(*FEW, "name=x", "max_steps=2", "evals=[]")
    args = (
        *FEW,
        "name=y",
        "max_steps=2",
        "resume=outputs/x/checkpoints/clip_last.pt",
        "model.image.width=96",
        "model.image.heads=1",
        "evals=[]",
    )
    assert "belongs to another run (model.image.width: 192 -> 96; model.image.heads: 3 -> 1)" in fails(*args)
    message = fails(*args, "resume_allow=[model]")
    assert "clip_last.pt holds weights of another shape (size mismatch for visual" in message
    torch.save({"model_state_dict": {}}, tmp_path / "weights.pt")
    message = fails(*FEW, "name=z", "max_steps=2", "resume=weights.pt")
    assert message.startswith("weights.pt has weights but no training state to resume")


def test_what_is_allowed_may_change_and_what_is_not_may_not(
    train: Train, fails: Fails, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train(*FEW, "name=x", "max_steps=6", "stop_at=3")
    args = (*FEW, "name=x", "max_steps=6", "optim.lr=0.01", "batch_size=8", "data.samples=48")
    message = fails(*args, "resume_allow=[optim]")
    assert "batch_size: 16 -> 8" in message and "data.samples: 40 -> 48" in message and "optim.lr" not in message
    assert fails(*args, "resume_allow=[optimm]").startswith("resume_allow=[optimm]: there is no such key; did you")
    capsys.readouterr()
    train(*args, "resume_allow=[optim.lr,batch_size,data]")
    assert "resuming with changes that resume_allow permits: data.samples: 40 -> 48; optim." in capsys.readouterr().err
    assert lines(tmp_path / "outputs/x")[-1]["samples"] == 3 * 16 + 3 * 8
    groups = read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["optimizer"]["param_groups"]
    assert [group["peak_lr"] for group in groups] == [0.01, 0.01] and max(group["lr"] for group in groups) > 5e-4
    assert "clip_last.pt belongs to another run" in fails(*FEW, "name=x", "max_steps=6", "stop_at=3")


def test_a_run_may_become_longer_and_says_what_that_does_to_its_schedule(
    train: Train, fails: Fails, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train(*FEW, "name=x", "max_steps=10")
    capsys.readouterr()
    train(*FEW, "name=x", "max_steps=20")
    assert (
        "the length of the run changed from 10 to 20 steps: at step 10 the learning rate is 0.587 of its peak; "
        "with the old length it would be 0"
    ) in capsys.readouterr().err
    assert summary(tmp_path / "outputs/x")["step"] == 20
    assert "max_steps: 20 -> 15" in fails(*FEW, "name=x", "max_steps=15")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Replaces the pictures of all batches that start at the given positions with NaN."""

    def poison_positions(positions: set[int]) -> None:
        batches, normalise, bad = run.train_batches, step.Normalise.__call__, [False]

        def record_batches(parts: RunParts, state: State, *features: object) -> Iterator:
            for chunks in batches(parts, state, *features):
                bad[0] = chunks[0].position in positions
                yield chunks

        monkeypatch.setattr(run, "train_batches", record_batches)
        monkeypatch.setattr(
            step.Normalise, "__call__", lambda self, images: normalise(self, images) * (math.nan if bad[0] else 1)
        )

    return poison_positions


def test_a_step_without_a_finite_gradient_changes_nothing_but_the_count(
    train: Train, tmp_path: Path, poison: Callable[[set[int]], None]
) -> None:
    poison({16 * 3})
    train(*FEW, "name=x", "max_steps=5", "keep_every=1")
    rows = [line for line in lines(tmp_path / "outputs/x") if "train/lr" in line]
    assert ["train/loss" in row for row in rows] == [True, True, True, False, True]
    assert [row["train/bad_steps"] for row in rows] == [0, 0, 0, 1, 1]
    names = sorted(path.name for path in (tmp_path / "outputs/x/checkpoints").glob("clip_step_*"))
    assert names == [f"clip_step_{step}.pt" for step in (1, 2, 3, 5)]  # none for the bad step
    saved = read(tmp_path / "outputs/x/checkpoints/clip_last.pt")
    assert all(tensor.isfinite().all() for tensor in saved["model_state_dict"].values())


def test_a_save_waits_for_a_step_that_is_good(train: Train, tmp_path: Path, poison: Callable[[set[int]], None]) -> None:
    poison({16 * 3, 16 * 4})  # steps 4 and 5
    train(*FEW, "name=x", "max_steps=7", "save_every=4", "stop_at=6")
    train(*FEW, "name=x", "max_steps=7", "save_every=4", "stop_at=6")  # nothing left to do
    assert [read(tmp_path / f"outputs/x/checkpoints/clip_{which}.pt")["step"] for which in ("last",)] == [6]
    assert read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["bad_steps"] == 2


def test_an_evaluation_that_is_due_on_a_bad_step_waits_for_a_good_one(
    train: Train, tmp_path: Path, poison: Callable[[set[int]], None]
) -> None:
    poison({16 * 3, 16 * 4})  # steps 4 and 5
    train(*FEW, "name=x", "max_steps=8", "eval_every=4", "keep_every=5")
    run = tmp_path / "outputs/x"
    assert [row["step"] for row in lines(run) if "val/loss" in row] == [6, 8]
    assert [path.name for path in (run / "checkpoints").glob("clip_step_*")] == ["clip_step_6.pt"]
    assert "step 4 had no effect: its gradient is not finite" in (run / "train.log").read_text()


def test_a_run_most_of_whose_steps_had_no_effect_fails(train: Train, fails: Fails, tmp_path: Path) -> None:
    args = (*FEW, "name=x", "max_steps=20", "optim.lr=1e6", "sched.warmup=1")
    message = fails(*args)
    run = tmp_path / "outputs/x"
    bad = max(row.get("train/bad_steps", 0) for row in lines(run))
    assert message.startswith(f"outputs/x: {bad} of 20 steps had no effect because their gradient was not finite")
    assert summary(run)["state"] == "failed" and fails(*args) == message
    for file in ("metrics.jsonl", "summary.json"):
        assert "NaN" not in (run / file).read_text() and "Infinity" not in (run / file).read_text()
    assert (run / "train.log").read_text().count("had no effect: its gradient is not finite") == 1


def test_a_run_that_diverges_goes_back_and_leaves_those_batches_out(
    train: Train, tmp_path: Path, poison: Callable[[set[int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    poison({16 * step for step in (6, 7, 8)})
    train(*FEW, "name=x", "max_steps=12", "save_every=4", "max_bad_steps=2")
    message = capsys.readouterr().err
    assert (
        "the loss or its gradient has not been finite for 3 steps, from step 7 on; going back to the last "
        "checkpoint and skipping the samples of these steps"
    ) in message and "resuming after step 4" in message
    saved = read(tmp_path / "outputs/x/checkpoints/clip_last.pt")
    assert saved["left_out"] == [[96, 144]] and saved["samples"] == 16 * 15 and saved["step"] == 12
    rows = [line for line in lines(tmp_path / "outputs/x") if "train/loss" in line]
    assert [row["samples"] for row in rows] == [16, 32, 48, 64, 80, 144, *range(160, 256, 16)]
    assert [row["step"] for row in rows] == list(range(1, 13))


def test_a_rollback_to_right_before_the_bad_steps_leaves_one_row_a_step(
    train: Train, tmp_path: Path, poison: Callable[[set[int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks synchronise before they look for a checkpoint, so rank 0 has finished saving it."""
    checkpoints_at_barrier = []
    monkeypatch.setattr(
        distributed,
        "barrier",
        lambda: checkpoints_at_barrier.append([path.name for path in (tmp_path / "outputs/x/checkpoints").iterdir()]),
    )
    poison({16 * step for step in (4, 5, 6)})
    train(*FEW, "name=x", "max_steps=12", "save_every=4", "max_bad_steps=2", "evals=[]", "eval_every=null")
    assert checkpoints_at_barrier == [["clip_last.pt"]]
    rows = [line for line in lines(tmp_path / "outputs/x") if "train/lr" in line]
    assert [row["step"] for row in rows] == list(range(1, 13)) and all("train/loss" in row for row in rows)


def test_left_out_positions_begin_no_batch_on_any_rank() -> None:
    ranges = itertools.islice(train_ranges(0, 8, rank=1, world=2, left_out=[range(8, 16), range(24, 32)]), 4)
    assert list(ranges) == [range(4, 8), range(20, 24), range(36, 40), range(44, 48)]


def test_a_run_that_diverges_too_often_names_step_samples_and_norms(
    train: Train, fails: Fails, tmp_path: Path, poison: Callable[[set[int]], None]
) -> None:
    poison(set(range(16 * 5, 16 * 40, 16)))
    message = fails(*FEW, "name=x", "max_steps=30", "save_every=4", "max_bad_steps=1", "max_rollbacks=2")
    assert message.startswith("the loss or its gradient has not been finite for 2 steps, from step 6 on, and max_rollb")
    for part in ("samples dummy/0-", "and 13 more, learning rate 0.0004", "logit scale 14.", "of the image tower",
                 "of the text tower", "The last good checkpoint is kept"):  # fmt: skip
        assert part in message
    saved = read(tmp_path / "outputs/x/checkpoints/clip_last.pt")
    assert saved["step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved["model_state_dict"].values())
    assert summary(tmp_path / "outputs/x")["state"] == "failed"


def test_a_full_disk_ends_the_run_with_the_space_needed_and_keeps_the_old_checkpoint(
    train: Train, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(*FEW, "name=straight", "max_steps=9")
    train(*FEW, "name=x", "max_steps=9", "stop_at=3")
    save = torch.save

    def full(content: object, file: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    message = fails(*FEW, "name=x", "max_steps=9", "save_every=2")
    assert "clip_last.pt cannot be written: No space left on device. It needs 0.0" in message
    assert [path.name for path in (tmp_path / "outputs/x/checkpoints").iterdir() if "writing" in path.name] == []
    monkeypatch.setattr(torch, "save", save)
    train(*FEW, "name=x", "max_steps=9")
    assert_same_state(tmp_path / "outputs/straight", tmp_path / "outputs/x")


def test_a_log_that_cannot_be_written_ends_in_one_line(
    fails: Fails, at_step: Callable[..., None], tmp_path: Path
) -> None:
    def refuse() -> None:
        raise OSError(28, "No space left on device")

    at_step(3, refuse)
    assert fails(*FEW, "name=x", "max_steps=9") == (
        "outputs/x: No space left on device; fix this, then rerun the same command to resume from the last checkpoint"
    )


def test_a_file_that_may_not_be_read_is_named_itself(
    fails: Fails, at_step: Callable[..., None], tmp_path: Path
) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "labels/7.png")

    at_step(3, refuse)
    assert fails(*FEW, "name=x", "max_steps=9").startswith("labels/7.png: Permission denied; fix this")


def test_one_process_at_a_time_trains_in_a_directory(train: Train, fails: Fails, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from clipx.training.lock import directory_lock\n"
        "with directory_lock(Path('outputs/x')): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        message = fails(*FEW, "name=x", "max_steps=2")
        assert message.startswith(f"outputs/x is in use: process {other.pid} on {socket.gethostname()}, since 20")
        assert message.endswith("works there; wait for it, stop it, or train elsewhere with name=...")
        other.kill()
    assert (tmp_path / "outputs/x/lock").exists()  # left by the dead process, and ignored
    train(*FEW, "name=x", "max_steps=2")
    assert summary(tmp_path / "outputs/x")["state"] == "finished" and not (tmp_path / "outputs/x/lock").exists()


def test_a_run_is_locked_before_its_state_is_read(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = []
    monkeypatch.setattr(run, "restore", lambda *_: locked.append((tmp_path / "outputs/x/lock").exists()))
    train(*FEW, "name=x", "max_steps=1", "evals=[]")
    assert locked == [True]


def test_a_lock_file_that_its_owner_has_just_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_lockf, removed = fcntl.lockf, []

    def lockf(file: object, operation: int) -> None:
        if not removed:
            removed.append((tmp_path / "lock").unlink())  # removed between opening and locking
        real_lockf(file, operation)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with lock.directory_lock(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    assert removed and not (tmp_path / "lock").exists()


def test_a_finished_run_that_cannot_be_written_says_so_all_the_same(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*FEW, "name=x", "max_steps=1", "evals=[]")

    def read_only(path: Path, _other: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(lock, "acquire", read_only)
    train(*FEW, "name=x", "max_steps=1", "evals=[]")
    assert "outputs/x is finished (1 steps); nothing is changed" in capsys.readouterr().err


def test_a_file_where_the_runs_directory_should_be_is_named(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/x").write_text("mine")
    problem = (
        "is a file where the run's directory outputs/x should be; move it away, or set name=... to train elsewhere"
    )
    assert fails(*FEW, "name=x", "max_steps=2") == f"outputs/x {problem}"
    assert (tmp_path / "outputs/x").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}"])
def test_a_summary_that_cannot_be_read_is_written_again(train: Train, tmp_path: Path, text: str) -> None:
    args = (*FEW, "name=x", "max_steps=3")
    train(*args, "stop_at=2")
    path = tmp_path / "outputs/x/summary.json"
    path.write_text(text)
    train(*args)
    before = summary(tmp_path / "outputs/x")
    path.write_text(text)
    train(*args)
    after = summary(tmp_path / "outputs/x")
    assert {key: after[key] for key in ("state", "step", "final", "best")} == {
        key: before[key] for key in ("state", "step", "final", "best")
    } and after["state"] == "finished"


@pytest.mark.parametrize("save_every", ["null", "3"])
def test_a_run_whose_directory_is_taken_away_ends_in_one_line(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, save_every: str
) -> None:
    def take_away(self: logs.RunLog, step: int, _numbers: dict) -> None:
        if step == 3:
            self.flush()
            self.directory.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(logs.RunLog, "progress", take_away)
    assert fails(*FEW, "name=x", "max_steps=9", f"save_every={save_every}").startswith(
        "outputs/x was moved or deleted during the run"
    )


def test_a_named_checkpoint_is_where_a_run_starts_once(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*FEW, "name=base", "max_steps=12", "stop_at=4")
    args = [*FEW, "name=x", "max_steps=12", "resume=outputs/base/checkpoints/clip_last.pt"]
    train(*args, "stop_at=6")
    capsys.readouterr()
    train(*args, "stop_at=8")  # as when a scheduler restarts the job
    assert "this run has already resumed from it; resuming from outputs/x/che" in capsys.readouterr().err
    train(*args)
    assert [line["step"] for line in lines(tmp_path / "outputs/x") if "train/lr" in line] == list(range(5, 13))
    train(*FEW, "name=base", "max_steps=12")
    assert_same_state(tmp_path / "outputs/base", tmp_path / "outputs/x")
    flipped(tmp_path / "outputs/x/checkpoints/clip_last.pt")
    train(*args, "stop_at=10")
    assert "its checksum" in capsys.readouterr().err  # so the previous one is used


COOLDOWN = ("sched=warmup_constant_cooldown", "sched.warmup=2", "sched.warmup_cap=0.5")


def test_a_long_run_of_constant_rate_gives_shorter_ones_that_are_those_trained_from_the_start(
    train: Train, fails: Fails, tmp_path: Path
) -> None:
    constant = ("sched=constant", "sched.warmup=2", "sched.warmup_cap=0.5")
    train(*FEW, "name=long", *constant, "max_steps=30", "stop_at=9", "keep_every=4")
    branch = f"resume={tmp_path}/outputs/long/checkpoints/clip_step_4.pt"
    args = (*FEW, *COOLDOWN, "sched.cooldown=4", "max_steps=9")
    train(*args, branch, "name=short", "stop_at=6")
    train(*args, branch, "name=short")  # from its own checkpoint
    log = (tmp_path / "outputs/short/train.log").read_text()
    assert "9 steps of 16, 3.6 epochs, warm-up 2 (sched.warmup), cooldown 4" in log
    assert "clip_step_4.pt has taken the first 4 steps of a run with this schedule" in log
    train(*args, "name=straight")
    assert_same_state(tmp_path / "outputs/short", tmp_path / "outputs/straight")
    rates = {
        name: [line["train/lr"] for line in lines(tmp_path / "outputs" / name) if "train/lr" in line]
        for name in ("long", "short")
    }
    assert rates["long"][4:5] == rates["short"][:1] and rates["short"] == sorted(rates["short"], reverse=True)
    assert "belongs to another run (sched._target_" in fails(
        *args, "name=long"
    )  # in its directory the run stays what it is


@pytest.mark.parametrize(
    ("args", "rates"),
    [
        (["max_steps=9", "sched.cooldown=6"], "up to step 5, but at step 4 it is 0.592 of its peak and was 1"),
        (["max_steps=9", "sched.warmup_cap=0.1"], "up to step 5, but at step 0 it is 1 of its peak and was 0.5"),
        (["max_steps=5", "sched.cooldown=1"], "; a run of 5 steps has none after the 5 of this checkpoint"),
    ],
)
def test_a_schedule_that_differs_in_the_steps_done_is_refused_with_the_step(
    args: list[str], rates: str, train: Train, fails: Fails, tmp_path: Path
) -> None:
    train(*FEW, "evals=[]", "name=long", *COOLDOWN, "sched.cooldown=4", "max_steps=30", "stop_at=5")
    branch = f"resume={tmp_path}/outputs/long/checkpoints/clip_last.pt"
    message = fails(*FEW, "evals=[]", "name=x", *COOLDOWN, *args, branch)
    assert "clip_last.pt belongs to another run" in message and rates in message


def test_another_optimiser_begins_with_its_own_moments(train: Train, tmp_path: Path) -> None:
    args = (*FEW, "evals=[]", "name=x", "max_steps=6")
    train(*args, "stop_at=2")
    for stop, option in ((4, "lion"), (5, "muon"), (6, "adamw_paper")):
        train(*args, f"optim={option}", f"stop_at={stop}", "resume_allow=[optim]")
    moments = read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["optimizer"]["state"]
    assert {int(state["step"]) for state in moments.values()} == {1}


def test_half_precision_begins_with_its_own_loss_scale(train: Train, tmp_path: Path) -> None:
    train(*FEW, "evals=[]", "name=x", "max_steps=6", "stop_at=2", "amp=bf16")
    train(*FEW, "evals=[]", "name=x", "max_steps=6", "stop_at=3", "amp=fp16", "resume_allow=[amp]")
    assert read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["scaler"]["scale"] >= 2.0**15


def test_automatic_precision_is_recorded_as_what_it_was(
    train: Train, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*FEW, "evals=[]", "name=x", "max_steps=6"]
    monkeypatch.setattr("clipx.devices.has_amx", lambda: True)
    train(*args, "amp=auto", "stop_at=2")
    train(*args, "amp=bf16", "stop_at=3")
    assert yaml.safe_load((tmp_path / "outputs/x/config.yaml").read_text())["amp"] == "bf16"
    assert "amp=bf16" in (tmp_path / "outputs/x/train.log").read_text()
    monkeypatch.setattr("clipx.devices.has_amx", lambda: False)
    assert "another run (amp: 'bf16' -> 'none'); name=... starts a new" in fails(*args, "amp=auto")
    train(*args, "amp=auto", "resume_allow=[amp]")
    assert summary(tmp_path / "outputs/x")["state"] == "finished"


def test_deterministic_runs_resume_to_the_bit_and_are_those_of_a_cpu_anyway(train: Train, tmp_path: Path) -> None:
    train(*FEW, "name=straight", "max_steps=6")
    train(*FEW, "name=x", "max_steps=6", "stop_at=2", "deterministic=true")
    train(*FEW, "name=x", "max_steps=6", "stop_at=4", "deterministic=true")
    train(*FEW, "name=x", "max_steps=6")  # the key may change
    assert_same_state(tmp_path / "outputs/straight", tmp_path / "outputs/x")


@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_deterministic_runs_on_a_gpu_resume_to_the_bit(amp: str, train: Train, tmp_path: Path) -> None:
    args = [*FEW, "device=cuda", "deterministic=true", f"amp={amp}", "max_steps=20"]
    train(*args, "name=straight")
    train(*args, "name=x", "stop_at=7")
    train(*args, "name=x")
    assert_same_state(tmp_path / "outputs/straight", tmp_path / "outputs/x")


def without(early: Path, *keys: str) -> None:
    """Removes keys from a run, as if a version without them had written it."""
    path = early / "checkpoints/clip_last.pt"
    content = torch.load(path, weights_only=True)
    plain = yaml.safe_load((early / "config.yaml").read_text())
    for key in keys:
        *groups, last = key.split(".")
        for config in (content["config"], plain):
            for group in groups:
                config = config[group]
            del config[last]
    torch.save(content, path)
    (early / "config.yaml").write_text(yaml.safe_dump(plain))


def test_a_run_of_the_first_version_is_resumed(train: Train, early: Path) -> None:
    train(*EARLY)
    assert summary(early)["state"] == "finished" and [line["step"] for line in lines(early)] == [1, 2, 3, 4]
    train("config=outputs/early/config.yaml", "name=again")
    assert summary(early.parent / "again")["state"] == "finished"


def test_keys_that_a_later_version_adds_have_their_defaults_in_earlier_runs(
    train: Train, fails: Fails, early: Path
) -> None:
    without(early, "clip_norm", "max_rollbacks", "best", "optim.betas", "model.image.act")
    assert "belongs to another run (clip_norm: None -> 1.0)" in fails(*EARLY, "clip_norm=1")
    assert "belongs to another run (matmul_precision: 'highest' -> 'high')" in fails(*EARLY, "matmul_precision=high")
    assert "belongs to another run (optim.betas: [0.9, 0.98] -> [0.9, 0.95])" in fails(*EARLY, "optim.betas=[0.9,0.95]")
    assert "belongs to another run (data.word_dropout: 0.0 -> 0.1)" in fails(*EARLY, "data.word_dropout=0.1")
    train(*EARLY)
    assert summary(early)["state"] == "finished"
    train("config=outputs/early/config.yaml", "name=again", "max_rollbacks=1")
    assert summary(early.parent / "again")["state"] == "finished"
