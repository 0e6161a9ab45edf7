"""Errors that a command reports before it imports torch, without leaving files."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import EARLY, FEW, run_python

from clipx import train
from clipx.config import cli, meaning
from clipx.weights import peek

RUN = "outputs/early/checkpoints/clip_last.pt"
NONE = "there is no such run, checkpoint or weights; there is outputs/early"


@pytest.fixture
def without_torch(tmp_path: Path) -> Path:
    """A directory in which importing torch fails."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "args", "line"),
    [
        (
            "train",
            [*EARLY, "optim.lr=0.1"],
            f"{RUN} belongs to another run (optim.lr: 0.0005 -> 0.1); name=... starts "
            "a new run, and resume_allow=[optim.lr] resumes this one anyway",
        ),
        (
            "train",
            [*EARLY, "seed=5", "optim.lr=1", "resume_allow=[optim]"],
            f"{RUN} belongs to another run (seed: 0 -> 5)",
        ),
        ("train", [*EARLY, "resume_allow=[optin]"], "resume_allow=[optin]: there is no such key; did you mean optim"),
        ("train", [*EARLY, "resume=null"], "outputs/early holds a run; resume=auto resumes it, name=... starts"),
        ("train", [*EARLY, "resume=outputs/erly/clip_last.pt"], f"resume=outputs/erly/clip_last.pt: {NONE}"),
        ("train", ["init_from=outputs/erly"], f"init_from=outputs/erly: {NONE}"),
        ("evaluate", ["run=outputs/erly"], f"run=outputs/erly: {NONE}"),
        ("evaluate", ["run=[outputs/early,outputs/b]"], f"run=outputs/b: {NONE}"),
        ("export", ["run=outputs/erly", "to=hf", "out=o"], f"run=outputs/erly: {NONE}"),
        ("predict", ["run=outputs/erly", "images=x", "texts=a"], f"run=outputs/erly: {NONE}"),
        ("compare", ["outputs/erly"], "outputs/erly: there is no such run or folder of runs; there is outputs/early"),
        ("train", ["data=folder", "data.root=no"], "data.root=no is not a directory (relative to "),
        ("train", ["data=coco", "data.root=no"], "data.root=no is not a directory; "),
        ("train", ["data=folder", "data.root=no", "data.crop=[0.5]"], "data.crop=[0.5]: should have 2 values"),
        ("train", ["sched.warmup=x"], "sched.warmup='x': should be a valid integer"),
        ("train", ["optim.lrr=1"], "optim.lrr: there is no such key; did you mean optim.lr?"),
        ("train", ["batch_size=x"], "batch_size='x': should be a valid integer"),
        ("train", ["--batch_size=8"], "--batch_size: there is no such switch; a key has no dashes: batch_size=8"),
    ],
)
def test_a_mistake_is_refused_before_torch_is_imported(
    command: str, args: list[str], line: str, early: Path, without_torch: Path
) -> None:
    result = run_python("-m", f"clipx.{command}", *args, cwd=without_torch)
    assert result.stderr.startswith(line.replace("--batch_size:", "--batch_size=8:")), result.stderr
    assert result.returncode == 1 and result.stderr.count("\n") == 1


def test_a_runs_own_config_may_be_moved_and_name_users_options(
    early: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    message = "batch_size='x': should be a valid integer, unable to parse string as an integer"
    args = ("config=outputs/early/config.yaml", "name=again", "batch_size=x")
    for more in ((), ("hydra.run.dir=new",), ("--config-dir", "mine")):
        assert fails(*more, *args) == message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "outputs"]


def test_a_checkpoint_whose_config_cannot_be_read_early_is_left_to_training(
    early: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = early / "checkpoints/clip_last.pt"
    original = last.read_bytes()
    assert peek.read_config(last)["batch_size"] == 16
    for cut in (0, 100, len(original) // 2, len(original) - 10):
        last.write_bytes(original[:cut])
        assert peek.read_config(last) == {}
    assert peek.read_config(tmp_path) == peek.read_config(tmp_path / "no.pt") == {}


def test_a_checkpoint_that_would_run_something_runs_nothing_when_it_is_looked_at(tmp_path: Path) -> None:
    import os
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("x/data.pkl", pickle.dumps({"config": Evil()}))
    assert peek.read_config(tmp_path / "x.pt") == {} and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        (1, 1.0, False),
        (0.5, "0.5", False),
        (5, "5", False),
        (True, "true", False),
        ([0.5, 1], [0.5, 1.0], False),
        (1, 2.0, True),
        ("a", "b", True),
        (None, 3, True),
        ([0.5], [0.5, 1], True),
        (["a"], ["b"], True),
        (["0.5"], [0.5], False),
    ],
)
def test_only_what_no_conversion_makes_equal_is_surely_another_value(one: object, other: object, differ: bool) -> None:
    assert meaning.certainly_differ(one, other) is meaning.certainly_differ(other, one) is differ


def test_of_many_runs_the_similar_names_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipx.config.runs import suggest_runs

    monkeypatch.chdir(tmp_path)
    assert suggest_runs(Path("outputs/x")) == ""
    for name in ("outputs/flowers_small", "outputs/sweeps/lr/seed=1", *(f"outputs/zz{number}" for number in range(9))):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    assert suggest_runs(Path("outputs/flower_small")).startswith("; there are outputs/flowers_small, ")
    assert suggest_runs(Path("seed=2")).startswith("; there are outputs/sweeps/lr/seed=1, ")
    assert suggest_runs(Path("outputs/flower_small")).endswith(" and 6 more")
    (tmp_path / "outputs/zz1/checkpoints").mkdir()
    (tmp_path / "outputs/zz1/checkpoints/clip_step_50.pt").touch()
    message = suggest_runs(Path("outputs/zz1/checkpoints/clip_step_5.pt"))
    assert message.startswith("; there are outputs/zz1/checkpoints/clip_step_50.pt, ")


def test_a_run_that_is_refused_late_leaves_nothing(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"no weights")
    assert fails(*FEW, "name=x", "init_from=w.pt").startswith("w.pt is not a checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


SETTINGS = {
    "job: {chdir: true}": "hydra.job.chdir", "verbose: true": "hydra.verbose", "output_subdir: .hydra2":
    "hydra.output_subdir", "job_logging: {root: {level: DEBUG}}": "hydra.job_logging.root.level",
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("source", ["experiment", "base of an experiment", "primary"])
def test_a_setting_of_hydra_without_effect_is_refused_in_a_file_as_on_the_command_line(
    setting: str, source: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    text = f"hydra: {{run: {{dir: theirs}}, {setting}}}\n"
    (tmp_path / "mine/experiment/odd.yaml").write_text(f"# @package _global_\ndefaults: [smoke]\n{text}")
    (tmp_path / "mine/experiment/mine.yaml").write_text("# @package _global_\ndefaults: [odd]\nname: x\n")
    (tmp_path / "mine/own.yaml").write_text(f"defaults: [train, _self_]\n{text}")
    args = {"experiment": ["experiment=odd"], "base of an experiment": ["experiment=mine"], "primary": ["-cn", "own"]}
    assert fails("--config-dir", "mine", *args[source], "batch_size=0").startswith(
        f"{SETTINGS[setting]}, as a file of mine sets it, has no effect in clipx: a run keeps its own log and config"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_refused_sweep_leaves_nothing(fails: Callable[..., str], tmp_path: Path) -> None:
    assert fails("-m", "optim.lrr=1,2") == "optim.lrr: there is no such key; did you mean optim.lr?"
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("args", [["data=folder", "data.root=no"], ["batch_size=x"], ["optim.lr=fast"]])
@pytest.mark.parametrize("directory", ["new/deep", "there/new/${name}", "there"])
def test_a_refused_command_does_not_create_hydra_run_dir(
    directory: str, args: list[str], fails: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    fails(f"hydra.run.dir={directory}", "name=x", *args)
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not [*(tmp_path / "there").iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="torch grows segments on Linux alone")
@pytest.mark.parametrize("given", [{}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": ""}])
def test_a_command_lets_segments_of_gpu_memory_grow_unless_the_user_says_how(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in cli.ALLOC_CONF:
        monkeypatch.setenv(name, "")  # restored in the end
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["clipx.train", "optim.lr=x"])
    with pytest.raises(SystemExit):
        train.main()
    found = {name: os.environ[name] for name in cli.ALLOC_CONF if name in os.environ}
    assert found == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
