"""Searches with Optuna: proposed jobs, early stopping, and resuming with the same command."""

import fcntl
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import FEW, assert_same_state, merge_args, run_python, summary
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from clipx.config.arguments import escape_override
from clipx.config.schema import TrainConfig
from clipx.config.study import propose
from clipx.errors import Interrupted, UserError

TAG = "val/retrieval/mean_recall"
SPACE = "optim.lr=tag(log,interval(1e-6,1e-1))"
SEARCH = ("-m", *FEW, "max_steps=10", "name=s", "hydra/sweeper=optuna", "hydra.sweeper.startup=2")
FOUND = Path("outputs/sweeps/s")


@pytest.fixture
def search(train: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[list[str], str]]:
    """Runs a search and returns its output lines and its exit message."""

    def run(*args: str) -> tuple[list[str], str]:
        code = ""
        try:
            train(*SEARCH, *args)
        except SystemExit as ended:
            code = str(ended.code)
        return capsys.readouterr().err.splitlines(), code

    return run


class FakeRuns:
    """Runs that only report a metric, equal to the learning rate; ``ran`` lists the started ones."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, Any]] = []
        self.before: Callable[[TrainConfig], None] = lambda config: None

    def __call__(self, config: TrainConfig, directory: Path) -> float | None:
        self.ran.append((directory.name, config.stop_at))
        self.before(config)
        lr = config.optim["lr"]
        value = {2: None, 4: float("nan")}.get(lr, lr)
        state = "finished" if config.stop_at is None else "stopped"
        final = {} if value is None else {config.objective: value}
        content = {"state": state, "step": 1, "seconds": 1.0, "objective": config.objective, "final": final, "best": {}}
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "summary.json").write_text(json.dumps(content))
        return value


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    runs = FakeRuns()
    monkeypatch.setattr("clipx.training.run.run", runs)
    return runs


def trials() -> list[optuna.trial.FrozenTrial]:
    journal = optuna.storages.journal.JournalFileBackend(str(FOUND / "optuna.journal"))
    return optuna.load_study(study_name="clipx", storage=optuna.storages.JournalStorage(journal)).trials


def test_poor_trials_stop_early_and_the_others_equal_uninterrupted_runs(
    search: Callable[..., tuple[list[str], str]], train: Callable[..., None]
) -> None:
    objective = ("objective=train/lr", "best=null")  # equal on every processor
    args = (
        "optim.lr=tag(log,interval(1e-6,1e-3))",
        *objective,
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.rungs=[20%]",
        "hydra.sweeper.sampler=random",
        "hydra.sweeper.seed=4",
    )
    output, code = search(*args)
    assert code == "", output
    finished: list[float] = []
    for trial in trials():
        lr = trial.params["optim.lr"]
        pruned = len(finished) >= 2 and lr < statistics.median(finished)
        assert trial.state.name == ("PRUNED" if pruned else "COMPLETE")
        finished += [] if pruned else [lr]
    summaries = {run.name: summary(run) for run in FOUND.iterdir() if run.is_dir()}
    outcomes = Counter((one["state"], one["step"]) for one in summaries.values())
    assert outcomes == {("finished", 10): len(finished), ("stopped", 2): 4 - len(finished)} and 2 < len(finished) < 4
    best = max((one["final"]["train/lr"], name) for name, one in summaries.items() if one["state"] == "finished")
    assert f"best      train/lr {best[0]:.4g}: {best[1]}" in output
    assert f"repeat    python -m clipx.train config={FOUND}/{best[1]}/config.yaml name=best" in output
    assert sum(line.startswith("pruned at 20%: optim.lr=") for line in output) == 4 - len(finished)

    before = {path: path.stat().st_mtime_ns for path in FOUND.rglob("*/*") if path.is_file()}
    rerun, code = search(*args)
    assert code == "" and rerun == output[-4:]
    assert before == {path: path.stat().st_mtime_ns for path in FOUND.rglob("*/*") if path.is_file()}

    train(*FEW, "max_steps=10", *objective, best[1], "name=straight")
    assert_same_state(FOUND / best[1], Path("outputs/straight"))


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("random", marks=pytest.mark.long)])
def test_an_interrupted_search_proposes_what_an_uninterrupted_one_does(
    search: Callable[..., tuple[list[str], str]], fake_runs: FakeRuns, sampler: str
) -> None:
    args = (
        SPACE,
        "model.image.depth=range(1,4)",
        "hydra.sweeper.n_trials=8",
        f"hydra.sweeper.sampler={sampler}",
        "hydra.sweeper.rungs=[20%,50%]",
        "stop_at=90%",
    )
    search(*args)
    uninterrupted, fake_runs.ran = fake_runs.ran, []
    names = [trial.params for trial in trials()]
    (FOUND / "optuna.journal").unlink()

    def stops(config: TrainConfig) -> None:
        if len(fake_runs.ran) in (2, 7, 12):
            raise Interrupted(0)

    fake_runs.before = stops
    for _ in range(3):
        assert search(*args)[1] == "0"
    assert search(*args)[1] == ""
    assert [trial.params for trial in trials()] == names
    assert list(dict.fromkeys(fake_runs.ran)) == uninterrupted and len(fake_runs.ran) == len(uninterrupted) + 3
    assert {stop for _, stop in uninterrupted} == {"20%", "50%", "90%"}

    search(*args[:2], "hydra.sweeper.n_trials=9", *args[3:])  # 9 trials in total
    assert len(trials()) == 9
    assert search(*args[:2], *args[4:], "hydra.sweeper.n_trials=3")[1] == "" and len(trials()) == 9


def test_halving_continues_the_better_half(search: Callable[..., tuple[list[str], str]], fake_runs: FakeRuns) -> None:
    search(
        SPACE,
        "hydra.sweeper.n_trials=12",
        "hydra.sweeper.rungs=[20%,50%]",
        "hydra.sweeper.pruner=halving",
        "hydra.sweeper.sampler=random",
    )
    reached = [sum(stop == rung for _, stop in fake_runs.ran) for rung in ("20%", "50%", None)]
    assert reached[0] == 12 and 3 <= reached[2] <= reached[1] <= 8
    best = max(trials(), key=lambda trial: trial.params["optim.lr"])
    assert best.state == optuna.trial.TrialState.COMPLETE


def test_a_failed_trial_ends_no_other_and_is_reported_at_the_end(
    search: Callable[..., tuple[list[str], str]], fake_runs: FakeRuns
) -> None:
    def fails(config: TrainConfig) -> None:
        if config.optim["lr"] == 3:
            raise UserError("it is too fast")

    fake_runs.before = fails
    output, code = search("optim.lr=1,2,3,4", "hydra.sweeper.n_trials=12", "hydra.sweeper.sampler=random")
    no_value = [f"optim.lr={lr}: the run has no finite objective={TAG}" for lr in (2, 4)]
    assert set(code.split("\n")) == {"optim.lr=3: it is too fast", *no_value}
    states = {trial.params["optim.lr"]: trial.state.name for trial in trials()}
    assert states == {"1": "COMPLETE", "2": "FAIL", "3": "FAIL", "4": "FAIL"} and len(trials()) == 12
    assert f"best      {TAG} 1: optim.lr=1" in output


def test_if_all_trials_failed_the_same_command_tries_again(
    search: Callable[..., tuple[list[str], str]], fake_runs: FakeRuns
) -> None:
    def fails(config: TrainConfig) -> None:
        raise UserError("the disk is full")

    fake_runs.before, healthy = fails, fake_runs.before
    for _ in range(2):
        assert search(SPACE, "hydra.sweeper.n_trials=2")[1].count("the disk is full") == 2 and len(trials()) == 2
    fake_runs.before = healthy
    assert search(SPACE, "hydra.sweeper.n_trials=2")[1] == ""
    assert [trial.state.name for trial in trials()] == ["COMPLETE"] * 2


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Calls a function with the last argument of each job before a batch is launched."""

    def use(before: Callable[[list[str]], None]) -> None:
        original = Plugins.instantiate_launcher

        def instantiate(self: Plugins, **kwargs: Any) -> Launcher:
            launcher = original(self, **kwargs)
            launch = launcher.launch

            def before_launch(jobs: list[list[str]], initial_job_idx: int) -> Any:
                before([args[-1] for args in jobs])
                return launch(jobs, initial_job_idx=initial_job_idx)

            launcher.launch = before_launch
            return launcher

        monkeypatch.setattr(Plugins, "instantiate_launcher", instantiate)

    return use


def test_trials_at_once_are_one_batch_and_a_job_whose_process_is_killed_fails_alone(
    search: Callable[..., tuple[list[str], str]], fake_runs: FakeRuns, launched: Callable[..., None]
) -> None:
    batches = []

    def kill(jobs: list[str]) -> None:
        batches.append(jobs)
        if "optim.lr=5" in jobs:
            raise BrokenProcessPool("a process was killed")

    launched(kill)
    _, code = search(
        "optim.lr=1,3,5", "hydra.sweeper.n_jobs=6", "hydra.sweeper.n_trials=12", "hydra.sweeper.sampler=random"
    )
    assert sorted(batches[0]) == ["optim.lr=1", "optim.lr=3", "optim.lr=5"]
    assert all(len(set(batch)) == len(batch) for batch in batches)  # equal trials share a job
    states = {trial.params["optim.lr"]: trial.state.name for trial in trials()}
    assert states == {"1": "COMPLETE", "3": "COMPLETE", "5": "FAIL"} and len(trials()) == 12
    assert code == "optim.lr=5: its process was killed, probably out of memory"


def test_in_a_grid_a_killed_process_is_reported_in_one_line(
    fails: Callable[..., str], fake_runs: FakeRuns, launched: Callable[..., None]
) -> None:
    def kill(jobs: list[str]) -> None:
        raise BrokenProcessPool("a process was killed")

    launched(kill)
    assert fails("-m", *FEW, "seed=1,2").startswith("a job's process was killed, probably out of memory")


@pytest.mark.parametrize(("argument", "choices"), [
    ("optim.lr=tag(log,interval(1e-5,1e-2))", None), ("optim.lr=interval(0,1)", None),
    ("model.image.depth=int(interval(2,4))", {"2", "3", "4"}), ("model.image.depth=range(2,6)", {"2", "3", "4", "5"}),
    ("batch_size=tag(log,range(1,4))", {"1", "2", "3"}), ("batch_size=range(8,1,-3)", {"2", "5", "8"}),
    ("loss.x=range(0,1,0.25)", {"0.0", "0.25", "0.5", "0.75"}), ("batch_size=choice(64,128)", {"64", "128"}),
    ("batch_size=64,128", {"64", "128"}), ("freeze=[image],[text]", {"[image]", "[text]"}),
    ("+data.root='a b','c=d'", {"'a b'", "'c=d'"}),
])  # fmt: skip
def test_every_kind_of_sweep_can_be_searched(argument: str, choices: set[str] | None) -> None:
    assert escape_override(argument, sweep=True) == argument
    override = OverridesParser.create().parse_override(argument)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    proposed = [propose(study.ask(), override).partition("=") for _ in range(30)]
    assert {key for key, _, _ in proposed} == {argument.partition("=")[0]}
    values = {value for _, _, value in proposed}
    assert values == choices if choices else len(values) == 30 and all(0 <= float(value) <= 1 for value in values)


def test_a_job_runs_with_exactly_the_value_that_is_recorded(
    search: Callable[..., tuple[list[str], str]], fake_runs: FakeRuns
) -> None:
    recorded: list[float] = []
    fake_runs.before = lambda config: recorded.append(config.optim["lr"])
    assert search(SPACE, "hydra.sweeper.n_trials=4")[1] == ""
    assert recorded == [trial.params["optim.lr"] for trial in trials()] == [trial.value for trial in trials()]


def test_a_mistake_ends_in_a_line(
    fails: Callable[..., str], search: Callable[..., tuple[list[str], str]], fake_runs: FakeRuns,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert fails("-m", *FEW, SPACE) == (
        "a sweep needs a list of values, not an interval; add hydra/sweeper=optuna to search the interval"
    )
    assert search(SPACE, "hydra.sweeper.sampler=best")[1] == "hydra.sweeper.sampler='best': should be 'tpe' or 'random'"
    assert search(SPACE, "hydra.sweeper.rungs=[30%,2ep]")[1].startswith("hydra.sweeper.rungs=[30%,2ep]: should be dura")
    assert search(SPACE, "hydra.sweeper.rungs=[30%,10%]")[1].startswith("hydra.sweeper.rungs=[30%,10%]: should be dura")
    assert search(SPACE, "hydra.sweeper.rungs=[soon]")[1].startswith("hydra.sweeper.rungs=['soon']: should be a durati")
    assert search()[1].startswith("there is nothing to search; give a key several values")
    assert search(SPACE, "objective=null")[1].startswith("objective=null: a search needs a metric")
    assert not FOUND.exists() and not fake_runs.ran
    assert search("optim.lr=tag(log,interval(0,1))")[1].startswith("optim.lr=tag(log,interval(0,1)): ")
    assert search(SPACE, "hydra.sweeper.n_trials=1")[1] == "" and len(fake_runs.ran) == 1

    assert search(SPACE, "hydra.sweeper.n_trials=1", "name=t")[1] == ""
    started = len(fake_runs.ran)
    assert search("optim.lr=interval(0,1)", "seed=5", "name=t")[1] == (
        "outputs/sweeps/t holds another search (seed: 0 -> 5; hydra.sweeper.params.optim.lr: "
        "'tag(log,interval(1e-6,1e-1))' -> 'interval(0,1)'); name=... starts a new one"
    )
    assert len(fake_runs.ran) == started

    with (FOUND / "optuna.journal").open("ab") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        assert search(SPACE)[1].startswith("another process searches in outputs/sweeps/s; name=... starts a new")

    monkeypatch.setitem(sys.modules, "optuna", None)
    assert search(SPACE)[1] == 'hydra/sweeper=optuna needs Optuna; pip install "clipx[optuna]"'


def test_the_recipe_searches_without_m(train: Callable[..., None], fake_runs: FakeRuns) -> None:
    train("experiment=tune", "hydra.sweeper.n_trials=2", "optim.weight_decay=0")
    assert len(fake_runs.ran) == 6 and {stop for _, stop in fake_runs.ran} == {"20%", "50%", None}
    pattern = r"model\.image\.depth=[1-4],optim\.lr=0\.\d+,optim\.weight_decay=0"
    assert all(re.fullmatch(pattern, name) for name, _ in fake_runs.ran)
    assert Path("outputs/sweeps/tune/optuna.journal").exists()


def test_the_config_of_a_run_can_be_searched_around(train: Callable[..., None], fake_runs: FakeRuns) -> None:
    with initialize_config_module("clipx.conf", version_base="1.3"):
        saved = OmegaConf.to_yaml(compose("train", ["experiment=smoke"]), resolve=True)
    Path("saved.yaml").write_text(saved)
    train("config=saved.yaml", "-m", "name=s", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", SPACE)
    assert len(fake_runs.ran) == 3 and all(name.startswith("optim.lr=") for name, _ in fake_runs.ran)


def test_a_start_without_a_search_imports_no_optuna(tmp_path: Path) -> None:
    code = "import sys, hydra_plugins.clipx_optuna; assert not {'optuna', 'torch', 'numpy'} & set(sys.modules)"
    assert run_python("-c", code, cwd=tmp_path).returncode == 0


@pytest.mark.long
def test_a_killed_search_resumes_its_unfinished_trial(
    search: Callable[..., tuple[list[str], str]], tmp_path: Path
) -> None:
    args = (SPACE, "hydra.sweeper.n_trials=4", "hydra.sweeper.rungs=[20%,50%]", "max_steps=60", "eval_every=null")
    process = subprocess.Popen(
        [sys.executable, "-m", "clipx.train", *merge_args(*SEARCH, *args)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while "[1]" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = trials()
    assert before[-1].state == optuna.trial.TrialState.RUNNING and len(before) < 4
    assert search(*args)[1] == ""
    after = trials()
    assert [trial.params for trial in after[: len(before)]] == [trial.params for trial in before]
    assert len(after) == 4 and all(trial.state.is_finished() for trial in after)
    states = [summary(run)["state"] for run in FOUND.iterdir() if run.is_dir()]
    assert len(states) == 4 and set(states) <= {"finished", "stopped"}
