"""Runs that learn from a teacher: a larger one, with another width, picture size and tokenizer."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_same_state, command, lines, merge_args, until

from clipx.data.images import TrainCrop
from clipx.weights.checkpoint import read
from clipx.weights.load import load

SAMPLES, STEPS = 24, 15  # five epochs of three steps
TINY = (
    "data=dummy", f"data.samples={SAMPLES}", "data.val_samples=0", "evals=[]", "batch_size=8", "workers=0",
    "device=cpu", "model.image.depth=1", "model.image.width=32", "model.image.heads=1", "model.image.embed=16",
    "model.text.depth=1", "model.text.width=16", "model.text.heads=1", "sched.warmup=0", f"max_steps={STEPS}",
    "log_every=1", "save_every=null",
)  # fmt: skip
TEACHER = ("name=teacher", "model.image.size=48", "model.image.embed=24", "model.text.context=6", "max_steps=3")
RUN = (*TINY, "views=2", "loss=distill", "teacher=outputs/teacher", "clip_norm=1.0")
CACHED, UNCACHED = "feature_cache=cache", "feature_cache=null"
Train = Callable[..., None]


@pytest.fixture
def teach(train: Train) -> Train:
    """``train``, in a directory with a teacher."""
    train(*TINY, *TEACHER)
    return train


def losses(name: str) -> list[float]:
    return [line["train/loss"] for line in lines(Path(f"outputs/{name}")) if "train/loss" in line]


def last(name: str) -> dict:
    return read(Path(f"outputs/{name}/checkpoints/clip_last.pt"))


def start(cwd: Path, ranks: int, *args: str) -> subprocess.Popen[str]:
    """The train command in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = [sys.executable, *launcher, "-m", "clipx.train", *merge_args(*RUN, *args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("args", [[], ["freeze=[image]"], ["data.captions_per_picture=2", "loss.same=positive"]])
def test_stored_features_give_the_bits_of_computed_ones(teach: Train, args: list[str]) -> None:
    for name, cache in (("cached", CACHED), ("again", CACHED), ("plain", UNCACHED)):
        teach(*RUN, *args, cache, f"name={name}")
    assert losses("cached") == losses("plain") == losses("again") and len(losses("plain")) == STEPS
    assert_same_state(Path("outputs/cached"), Path("outputs/plain"))
    assert len([*Path("cache").glob("teacher-*")]) == 2


def test_later_passes_and_later_runs_do_not_run_the_teacher(teach: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    crop = TrainCrop.__call__
    monkeypatch.setattr(TrainCrop, "__call__", lambda self, *args: sizes.append(self.size) or crop(self, *args))
    teach(*RUN, CACHED, "name=one")
    assert sizes.count(48) == 2 * SAMPLES and len(sizes) - sizes.count(48) == STEPS * 8  # two views
    sizes.clear()
    teach(*RUN, CACHED, "optim.lr=1e-5", "name=two")
    assert 48 not in sizes


def test_micro_batches_and_workers_do_not_change_what_is_learnt(teach: Train) -> None:
    teach(*RUN, UNCACHED, "name=whole")
    teach(*RUN, CACHED, "micro_batch_size=3", "workers=1", "name=parts")
    assert losses("parts") == pytest.approx(losses("whole"), rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("micro", ["null", "2"])
@pytest.mark.parametrize("args", [[], ["data.captions_per_picture=2", "loss.same=mask"]])
def test_two_ranks_learn_what_one_does(teach: Train, tmp_path: Path, args: list[str], micro: str) -> None:
    process = start(tmp_path, 2, CACHED, *args, "name=two", f"micro_batch_size={micro}")
    _, output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    teach(*RUN, *args, UNCACHED, "name=one")
    assert losses("two") == pytest.approx(losses("one"), rel=1e-3)
    for name, weight in last("one")["projection_state_dict"].items():
        torch.testing.assert_close(last("two")["projection_state_dict"][name], weight, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("step", [2, 8])  # in the first pass, and in the third
def test_a_run_that_is_stopped_resumes_bit_for_bit(teach: Train, step: int) -> None:
    teach(*RUN, UNCACHED, "name=whole")
    teach(*RUN, CACHED, "name=parts", f"stop_at={step}")
    teach(*RUN, CACHED, "name=parts")
    assert losses("parts") == losses("whole")
    assert_same_state(Path("outputs/parts"), Path("outputs/whole"))
    one, two = (last(name)["projection_state_dict"] for name in ("whole", "parts"))
    assert one.keys() == {"image", "text"} and all(torch.equal(one[name], two[name]) for name in one)
    assert all(weight.shape == (24, 16) for weight in one.values())


def test_a_run_that_is_killed_resumes_bit_for_bit(teach: Train, tmp_path: Path) -> None:
    teach(*RUN, UNCACHED, "name=whole")
    process = start(tmp_path, 1, CACHED, "name=x", "save_every=2", "workers=1")
    file = tmp_path / "outputs/x/metrics.jsonl"
    until(lambda: file.exists() and file.read_bytes().count(b"\n") > 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    teach(*RUN, CACHED, "name=x", "save_every=2", "workers=1")
    assert losses("x") == losses("whole")
    assert_same_state(Path("outputs/x"), Path("outputs/whole"))


@pytest.mark.parametrize("optim", ["adamw_paper", "muon", "lion"])
def test_the_projections_are_trained_and_no_part_of_the_model(teach: Train, optim: str) -> None:
    teach(*RUN, CACHED, "name=short", "max_steps=1", f"optim={optim}")
    teach(*RUN, CACHED, "name=x", "data.val_samples=8", "evals=[retrieval]", f"optim={optim}")
    for name, weight in last("x")["projection_state_dict"].items():
        assert not torch.equal(weight, last("short")["projection_state_dict"][name])
    teach(*TINY, "name=plain", "max_steps=1")
    assert last("x")["model_state_dict"].keys() == last("plain")["model_state_dict"].keys()
    best = read(Path("outputs/x/checkpoints/clip_best.pt"))
    assert "projection_state_dict" not in best
    assert load("outputs/x")[0].visual.embed == 16


def test_a_teacher_of_the_same_width_needs_no_projection(teach: Train) -> None:
    teach(*TINY, *TEACHER, "model.image.embed=16", "name=same")
    teach(*RUN, CACHED, "teacher=outputs/same", "name=x")
    assert "projection_state_dict" not in last("x") and len(losses("x")) == STEPS


def test_a_student_gets_nearer_to_its_teacher(teach: Train) -> None:
    teach(*TINY, *TEACHER, "model.image.embed=16", "name=same", "max_steps=30")
    loss = ["loss.interactive=0", "loss.relational=0", "loss.feature=100", "optim.lr=1e-3", "max_steps=40"]
    teach(*RUN, CACHED, "teacher=outputs/same", "name=x", *loss)
    from_teacher = losses("x")
    assert sum(from_teacher[-5:]) < 0.5 * sum(from_teacher[:5])


@pytest.mark.parametrize("views", ["null", "9"])
def test_without_views_that_return_nothing_is_stored(teach: Train, views: str) -> None:
    teach(*RUN, CACHED, f"views={views}", "name=x")
    log = Path("outputs/x/train.log").read_text()
    assert "features  of the teacher are computed in each step: views=" in log and not Path("cache").exists()


def test_the_log_and_check_say_who_teaches_and_where_its_features_are(
    teach: Train, check: Callable[..., tuple[str, int]]
) -> None:
    output, code = check(*RUN, CACHED, "name=x")
    about = "teacher outputs/teacher: "
    assert code == 0 and about in output and "parameters, pictures of 48 pixels, features of 24 numbers" in output
    assert "6.59kB for the features of the teacher's image tower in cache" in output
    teach(*RUN, CACHED, "name=x")
    log = Path("outputs/x/train.log").read_text()
    assert (
        "teacher   outputs/teacher: " in log and "features  of the teacher's text tower in cache/teacher-text-" in log
    )
    assert "0 of 48 are there already" in log
    output, code = check(*RUN, CACHED, "name=y")
    assert code == 0 and "holds 48 of 48 features of the teacher's image tower" in output
    output, code = check(*RUN, CACHED, "views=null", "name=y")
    assert code == 0 and "the teacher's features are computed in each step: views=null" in output


def test_what_has_no_effect_and_what_is_missing_is_refused(teach: Train, fails: Callable[..., str]) -> None:
    assert fails(*RUN, "loss=info_nce", "name=x") == (
        "teacher=outputs/teacher has no effect with the loss clipx.loss.clip_loss, which does not take one; add "
        "loss=distill, or leave it out"
    )
    assert fails(*TINY, "loss=distill", "name=x") == (
        "the loss clipx.loss.distill_loss needs a teacher to learn from; add teacher=RUN_OR_WEIGHTS"
    )
    assert fails(*RUN, "teacher=outputs/teachr", "name=x").startswith(
        "teacher=outputs/teachr: there is no such run, checkpoint or weights; there is outputs/teacher"
    )
    assert "loss.feature" in fails(*RUN, "loss.feature=-1", "name=x")


def test_weights_of_others_teach_as_well(
    teach: Train, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(*RUN, UNCACHED, "name=x", "max_steps=4")
    command("export", tmp_path, monkeypatch)("run=outputs/teacher", "to=open_clip", "out=exported")
    command("train", tmp_path, monkeypatch)(*RUN, UNCACHED, "name=y", "max_steps=4", "teacher=exported")
    assert losses("y") == losses("x")
    torch.save(last("teacher")["model_state_dict"], "w.pt")
    assert fails(*RUN, "teacher=w.pt", "name=z").startswith(
        "teacher=w.pt does not say its activation; export it once with clipx.export act=quick_gelu"
    )


def test_another_teacher_is_another_run(teach: Train, fails: Callable[..., str]) -> None:
    teach(*RUN, CACHED, "name=x", "stop_at=4")
    teach(*TINY, *TEACHER, "name=other", "seed=1")
    assert "teacher: 'outputs/teacher' -> 'outputs/other'" in fails(*RUN, CACHED, "teacher=outputs/other", "name=x")
    file = Path("outputs/teacher/checkpoints/clip_best.pt")
    file = file if file.exists() else file.with_name("clip_last.pt")
    Path("outputs/other/checkpoints", file.name).replace(file)
    message = fails(*RUN, CACHED, "name=x")
    assert "teacher=outputs/teacher: it has other weights than before" in message
    teach(*RUN, CACHED, "name=x", "resume_allow=[teacher]")
    assert len([*Path("cache").glob("teacher-*")]) == 4


def test_bench_measures_the_teacher(
    teach: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = command("bench", tmp_path, monkeypatch)
    bench(*RUN, "workers=1", "rounds=1", "steps=2", "parts=[step]")
    output = capsys.readouterr().err
    assert "features  computed in each step, as in the first 2 epochs of the run" in output and "teacher " in output
