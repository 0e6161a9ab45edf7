"""Parallel jobs with joblib: same results as sequential ones, with the cores divided among them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FEW, assert_same_state, run_python, summary

SHARE = """
import json, os, torch
from joblib import Parallel, cpu_count, delayed

def share():
    from clipx.devices import one_of_several_jobs, available_cores
    from clipx.devices import select_workers
    workers = select_workers("auto", torch.device("cpu"))
    return torch.get_num_threads(), available_cores(), workers, one_of_several_jobs()

jobs = Parallel(2)(delayed(share)() for _ in "ab")
print(json.dumps([cpu_count(), [os.environ.get("OMP_NUM_THREADS"), *share()], *jobs]))
"""


def test_each_of_two_jobs_has_half_of_the_cores(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    shown = subprocess.run([sys.executable, "-c", SHARE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    cores, alone, *jobs = json.loads(shown.stdout)
    half = max(1, cores // 2)
    assert jobs == [[half, half, min(8, max(1, half // 2)), True]] * 2
    assert alone[0] is None and alone[2] >= cores and alone[4] is False


@pytest.mark.parametrize("error", ["Interrupted(3)", "Diverged(BadStep(1, 2, 0.5), 4, 5, 0.6, {'image': 1.0})"])
def test_an_error_from_another_process_keeps_its_message(error: str) -> None:
    import pickle

    from clipx.errors import Interrupted
    from clipx.training.callbacks import BadStep, Diverged

    sent = eval(error, {"Interrupted": Interrupted, "Diverged": Diverged, "BadStep": BadStep})
    came = pickle.loads(pickle.dumps(sent))
    assert (str(came), vars(came), type(came)) == (str(sent), vars(sent), type(sent))


@pytest.mark.long
def test_jobs_at_once_end_as_they_do_alone(train: Callable[..., None], tmp_path: Path) -> None:
    short = (*FEW, "max_steps=8")
    result = run_python(
        "-m",
        "clipx.train",
        "-m",
        *short,
        "name=s",
        "workers=auto",
        "seed=0,1,2",
        "optim.lr=1e-3,fast",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        cwd=tmp_path,
    )
    jobs = tmp_path / "outputs/sweeps/s"
    assert result.returncode == 1 and result.stderr.count("finished at step 8") == 3, result.stderr
    failed = sorted(line for line in result.stderr.splitlines() if line.startswith("optim.lr=fast"))
    assert [line.split(":")[0] for line in failed] == [f"optim.lr=fast,seed={seed}" for seed in range(3)]
    assert "Traceback" not in result.stderr and "step/s" not in result.stderr
    assert "workers=1" in (jobs / "optim.lr=0.001,seed=0/train.log").read_text()
    for seed in (0, 1):
        train(*short, f"name=alone{seed}", f"seed={seed}", "optim.lr=1e-3")
        assert_same_state(jobs / f"optim.lr=0.001,seed={seed}", tmp_path / f"outputs/alone{seed}")
        assert summary(jobs / f"optim.lr=0.001,seed={seed}")["state"] == "finished"


@pytest.mark.long
def test_a_search_runs_its_trials_at_once(tmp_path: Path) -> None:
    result = run_python(
        "-m",
        "clipx.train",
        "-m",
        *FEW,
        "max_steps=10",
        "name=s",
        "hydra/sweeper=optuna",
        "optim.lr=tag(log,interval(1e-6,1e-1))",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.rungs=[20%]",
        "hydra.sweeper.pruner=halving",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    states = [summary(run)["state"] for run in (tmp_path / "outputs/sweeps/s").iterdir() if run.is_dir()]
    assert len(states) == 4 and "finished" in states and "trials    4: " in result.stderr
