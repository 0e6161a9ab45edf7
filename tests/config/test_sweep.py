"""Sweeps: each job has its own directory, reports its result in one line, and leaves no resources open."""

import gc
import logging
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import FEW, assert_same_state, lines, merge_args, run_python, summary, until

from clipx.config.sweep import is_sweep
from clipx.tools.runs_table import Spread, find_runs, table
from clipx.training import run
from clipx.training.parts import RunParts
from clipx.weights.checkpoint import read

Train = Callable[..., None]
TAG = "val/retrieval/mean_recall"
SHORT = (*FEW, "max_steps=2", "eval_every=1")


@pytest.fixture
def sweep(train: Train, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs a sweep and returns its output and its exit message."""

    def run(*args: str) -> tuple[str, str]:
        code = ""
        try:
            train(*args)
        except SystemExit as ended:
            code = str(ended.code)
        return capsys.readouterr().err, code

    return run


def test_each_job_has_a_directory_and_a_line_and_a_failed_one_ends_no_other(
    sweep: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    output, code = sweep("-m", *SHORT, "name=s", "optim.lr=1e-4,fast,5e-4")
    assert code == "optim.lr=fast: optim.lr='fast': should be a valid number, unable to parse string as a number"
    job_lines = [line for line in output.splitlines() if line.startswith("[")]
    starts = [
        "[0] optim.lr=0.0001: finished at step 2",
        "[1] optim.lr=fast: failed: optim.lr='fast'",
        "[2] optim.lr=0.0005: finished at step 2",
    ]
    assert [line.startswith(head) for line, head in zip(job_lines, starts, strict=True)] == [True] * 3
    assert "val/retrieval/mean_recall 0." in job_lines[0] and "model     " not in output
    jobs = tmp_path / "outputs/sweeps/s"
    ends = {path.name: summary(path)["state"] for path in jobs.iterdir()}
    assert ends == {"optim.lr=0.0001": "finished", "optim.lr=fast": "failed", "optim.lr=0.0005": "finished"}
    assert read(jobs / "optim.lr=0.0005/checkpoints/clip_last.pt")["config"]["optim"]["lr"] == 5e-4
    assert [row["optim.lr"] for row in table(find_runs([jobs]))][2] == "fast"

    before = {path: path.stat().st_mtime_ns for path in jobs.rglob("clip_last.pt")}
    output, code = sweep("-m", *SHORT, "name=s", "optim.lr=1e-4,5e-4,1e-3")
    assert code == "" and before.items() < {p: p.stat().st_mtime_ns for p in jobs.rglob("clip_last.pt")}.items()
    assert [line.split(":")[1][:9] for line in output.splitlines() if line.startswith("[")] == [" finished"] * 3


def test_without_a_name_shared_arguments_keep_sweeps_apart(
    sweep: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    for steps in (1, 2):
        output, code = sweep("-m", *FEW[:2], *FEW[2:6], f"max_steps={steps}", "seed=0,1")
        assert code == "", output
    jobs = sorted(path.name for path in (tmp_path / "outputs/sweeps/sweep").iterdir())
    assert len(jobs) == 4 and all("experiment=smoke" in job for job in jobs)


def test_a_defect_in_one_job_keeps_its_traceback_and_the_others_train(
    sweep: Callable[..., tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run.train

    def fail_first(parts: RunParts, *rest: Any) -> Any:
        if parts.config.seed == 0:
            raise ZeroDivisionError("nobody expected this")
        return original(parts, *rest)

    monkeypatch.setattr(run, "train", fail_first)
    output, code = sweep("-m", *SHORT, "name=s", "seed=0,1")
    assert (
        code == "seed=0: ZeroDivisionError: nobody expected this"
        and "Traceback" in output
        and "in fail_first" in output
    )
    jobs = tmp_path / "outputs/sweeps/s"
    assert [summary(jobs / f"seed={seed}")["state"] for seed in (0, 1)] == ["failed", "finished"]


def test_a_recipe_that_sweeps_needs_no_m(sweep: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    recipe = tmp_path / "own/experiment/widths.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\nname: widths\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '3,4'}}}\n")
    args = ["--config-dir", str(tmp_path / "own"), "experiment=widths"]
    assert is_sweep(args) and not is_sweep(args[2:]) and not is_sweep(["experiment=smoke"])
    rest = [arg for arg in SHORT if not arg.startswith("experiment")]
    output, code = sweep(*args, "data=dummy", *rest, "optim.lr=1e-4,1e-3")
    assert code == "", output
    names = sorted(path.name for path in (tmp_path / "outputs/sweeps/widths").iterdir())
    assert names == [f"optim.lr={lr},seed={seed}" for lr in ("0.0001", "0.001") for seed in (3, 4)]


def test_jobs_leave_no_threads_handlers_or_files_open(
    sweep: Callable[..., tuple[str, str]], train: Train, tmp_path: Path
) -> None:
    def traces() -> tuple[Any, ...]:
        gc.collect()
        return (
            [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
            logging.getLogger("clipx").handlers[:], threading.active_count(), psutil.Process().num_fds(),
            len(psutil.Process().children()), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    train(*SHORT, "seed=1", "name=alone")
    before = traces()
    sweep("-m", *SHORT, "name=s", "seed=0,1")
    assert traces() == before
    assert_same_state(tmp_path / "outputs/alone", tmp_path / "outputs/sweeps/s/seed=1")
    tags = [
        {tag: value for tag, value in row.items() if tag.startswith("val/") or tag == "train/loss"}
        for row in lines(tmp_path / "outputs/sweeps/s/seed=1")
    ]
    assert tags == [
        {tag: value for tag, value in row.items() if tag.startswith("val/") or tag == "train/loss"}
        for row in lines(tmp_path / "outputs/alone")
    ]


@pytest.mark.long
def test_a_killed_sweep_resumes_with_the_same_command(tmp_path: Path) -> None:
    args = merge_args("-m", "clipx.train", "-m", *FEW, "save_every=5", "name=s", "optim.lr=1e-4,1e-3", "seed=0,1,2")
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    assert run_python(*args, cwd=tmp_path / "whole").returncode == 0
    started = subprocess.Popen(
        [sys.executable, *args],
        cwd=tmp_path / "cut",
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    jobs = tmp_path / "cut/outputs/sweeps/s"
    third = jobs / "optim.lr=0.0001,seed=2"
    until(lambda: (third / "metrics.jsonl").exists() and len(lines_of(third)) > 8, started)
    os.killpg(started.pid, signal.SIGKILL)
    started.communicate()
    states = {run.path.name: run.state for run in find_runs([jobs])}
    assert states == {f"optim.lr=0.0001,seed={seed}": state for seed, state in enumerate(["finished"] * 2 + ["killed"])}
    before = {seed: (jobs / f"optim.lr=0.0001,seed={seed}/summary.json").read_bytes() for seed in (0, 1)}

    rerun = run_python(*args, cwd=tmp_path / "cut")
    assert rerun.returncode == 0 and rerun.stderr.count(": finished at step 20") == 6, rerun.stderr
    assert all((jobs / f"optim.lr=0.0001,seed={seed}/summary.json").read_bytes() == old for seed, old in before.items())
    for job in jobs.iterdir():
        assert_same_state(job, tmp_path / "whole/outputs/sweeps/s" / job.name)
    rows = table(find_runs([jobs]))
    assert [(row["run"], row["state"]) for row in rows] == [("3 seeds", "3 finished")] * 2
    for row in rows:
        values = [summary(jobs / f"optim.lr={row['optim.lr']},seed={seed}")["final"][TAG] for seed in range(3)]
        assert row[TAG] == Spread(statistics.fmean(values), statistics.stdev(values))


def lines_of(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()
