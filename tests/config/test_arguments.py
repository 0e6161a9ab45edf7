"""Every argument of a command takes effect, or is refused in one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from conftest import FEW
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

import clipx.train
from clipx.config import arguments
from clipx.config.runs import expand_runs
from clipx.errors import UserError

SHORT = (*FEW, "max_steps=2")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--name=first"], "--name=first: there is no such switch; a key has no dashes: name=first"),
        (["--batch-size", "8"], "--batch-size: there is no such switch; a key has no dashes: batch_size=8"),
        (["-m", "seed=0,1", "--cfg", "job"], "-m and --cfg exclude each other; leave out one of them"),
        (["--info=all", "--multirun"], "--info and -m exclude each other; leave out one of them"),
        (["batch_size:8"], "'batch_size:8' is not KEY=VALUE; write batch_size=8"),
        (["batch_size"], "'batch_size' is not KEY=VALUE; --help lists the keys"),
        (
            ["run=outputs/a", "outputs/b"],
            "'outputs/b' is not KEY=VALUE; several values of run are one list: run=[outputs/a,outputs/b]",
        ),
        (["seed=1", "2"], "'2' is not KEY=VALUE; several values of seed are one list: seed=[1,2]"),
        (
            ["model=tiny,"],
            "model=tiny, ends in a comma; write model=tiny, or quote a comma that belongs to the value: "
            "\"model='tiny,'\"",
        ),
        (
            ["hydra.verbose=true"],
            "hydra.verbose has no effect in clipx: a run keeps its own log and config in its "
            "directory, and paths are relative to the current directory; leave it out",
        ),
    ],
)
def test_a_mistyped_argument_is_refused_with_the_right_form(
    args: list[str], line: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    assert fails(*args) == line
    assert not list(tmp_path.iterdir())


def test_a_repeated_key_is_refused_with_a_hint_at_shell_braces(
    train: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["clipx.train", "data=shards", "data.shards=s/0.tar", "data.shards=s/1.tar"])
    with pytest.raises(SystemExit) as raised:
        clipx.train.main()
    assert raised.value.code == (
        "data.shards is given twice, data.shards=s/0.tar and data.shards=s/1.tar; give it once, and quote a pattern "
        "that the shell would expand: 'data.shards=DIR/{00000..00001}.tar'"
    )


@pytest.mark.parametrize("setting", [
    "hydra.job.chdir=true", "hydra.output_subdir=.hydra", "hydra/job_logging=colorlog", "hydra.runtime.cwd=x",
    "hydra.job_logging.version=1", "hydra.help.template=x", "+hydra.verbose=true",
])  # fmt: skip
def test_a_setting_of_hydra_without_effect_is_refused(setting: str, fails: Callable[..., str]) -> None:
    assert "has no effect in clipx" in fails(setting)


def test_values_with_commas_get_a_hint_at_sweeps_and_lists(fails: Callable[..., str]) -> None:
    assert fails("seed=0,1").endswith("; -m runs once for each value (seed=0,1), and seed=[0,1] is one list")
    assert fails("model=tiny,small").endswith(
        "; -m runs once for each value (model=tiny,small), and model=[tiny,small] is one list"
    )


def test_an_unknown_setting_of_a_sweeper_has_a_near_match_among_its_own(fails: Callable[..., str]) -> None:
    message = fails("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trial=3", "seed=1,2")
    assert message == "hydra.sweeper.n_trial: there is no such key; did you mean hydra.sweeper.n_trials?"


@pytest.mark.parametrize("value", ["007", "1e3", "1_000", "true", "inf"])
@pytest.mark.parametrize("key", ["name", "data.root", "data.sources.a.root"])
@pytest.mark.parametrize("sweep", [False, True])
def test_a_number_is_a_name_where_a_name_or_a_path_is_wanted(key: str, value: str, sweep: bool) -> None:
    argument = arguments.escape_override(f"{key}={value}", sweep)
    assert OverridesParser.create().parse_override(argument).value() == value


@pytest.mark.parametrize("root", ["1e3", "007"])
def test_a_directory_whose_name_is_a_number_is_looked_for_as_it_is_typed(root: str, fails: Callable[..., str]) -> None:
    assert fails("data=folder", f"data.root={root}").startswith(f"data.root={root} is not a directory")


def test_a_run_can_be_named_by_a_number(train: Callable[..., None], tmp_path: Path) -> None:
    train(*SHORT, "name=1e3")
    assert (tmp_path / "outputs/1e3/summary.json").exists()


def test_a_home_directory_is_found_in_data_root(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for option in ("folder", "shards"):
        assert fails(f"data={option}", "data.root=~/x").startswith(f"data.root={tmp_path}/x is not a directory")


def test_hydra_run_dir_is_obeyed(train: Callable[..., None], tmp_path: Path) -> None:
    train(*SHORT, "hydra.run.dir=here/${name}", "name=mine")
    assert json.loads((tmp_path / "here/mine/summary.json").read_text())["state"] == "finished"
    assert not (tmp_path / "outputs").exists()


def test_hydra_sweep_dir_and_subdir_are_obeyed(train: Callable[..., None], tmp_path: Path) -> None:
    train("-m", *SHORT, "hydra.sweep.dir=all", "seed=1,2", "name=s")
    assert sorted(path.parent.name for path in tmp_path.glob("all/*/summary.json")) == ["seed=1", "seed=2"]
    train("-m", *SHORT, "hydra.sweep.subdir=job${hydra.job.num}", "seed=1,2", "name=s")
    assert sorted(path.parent.name for path in tmp_path.glob("outputs/sweeps/s/*/summary.json")) == ["job0", "job1"]


def test_a_recipe_can_say_where_its_runs_live(train: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/placed.yaml").write_text(
        "# @package _global_\ndefaults: [smoke]\nhydra: {run: {dir: theirs}}\n"
    )
    train("--config-dir", "mine", "experiment=placed", *SHORT[1:])
    assert (tmp_path / "theirs/summary.json").exists()


def test_a_notebook_trains_by_a_call_that_returns_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    with hydra.initialize_config_module("clipx.conf", version_base="1.3"):
        returned = clipx.train.run(overrides=[*SHORT, "name=a"])
        train(*SHORT, "name=b")
        with pytest.raises(UserError, match="optim.lr='fast': should be a valid number"):
            clipx.train.run(["optim.lr=fast"])
        with pytest.raises(UserError, match="did you mean max_steps"):
            clipx.train.run(["max_step=3"])
        with pytest.raises(UserError, match="one call is one run"):
            clipx.train.run(["-m", "seed=1,2"])
        assert GlobalHydra.instance().is_initialized()
    assert returned["state"] == "finished" and returned["step"] == 2
    assert (tmp_path / "outputs/b/summary.json").exists()


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PY": sys.executable}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("command", ["clipx.train --help", "clipx.train --cfg job", "clipx.compare --help"])
def test_a_page_may_be_read_in_part(command: str, tmp_path: Path) -> None:
    result = shell(f"$PY -m {command} | head -c 1", tmp_path)
    assert result.stderr == "" and result.returncode == 0


@pytest.mark.parametrize("closed", ["2>&1 | true", pytest.param(">&- 2>&-", marks=pytest.mark.long)])
def test_a_closed_console_does_not_end_a_run(closed: str, tmp_path: Path) -> None:
    result = shell(f"$PY -m clipx.train {' '.join(SHORT)} name=x {closed}", tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "outputs/x/summary.json").read_text())["state"] == "finished"
    assert "finished at step 2" in (tmp_path / "outputs/x/train.log").read_text()


def test_several_runs_are_a_list_or_a_pattern_and_their_names_may_have_commas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["outputs/b", "outputs/model=tiny,seed=1"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "outputs/no_run").mkdir()
    assert [*expand_runs(f"[{names[1]},{names[0]}]")] == names[::-1]
    assert [*expand_runs(["outputs/model=tiny", "seed=1", "outputs/b"])] == names[::-1]
    assert [*expand_runs("outputs/*")] == [*expand_runs("[outputs/*]")] == [*expand_runs(["outputs/*"])] == names
    assert [*expand_runs("open_clip:x,outputs/none")] == ["open_clip:x", "outputs/none"]
