"""Small complete runs: their output files, how they resume, and how they end."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FEW, assert_same_state, lines, picture, summary, write_tar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipx.weights.checkpoint import read


def test_a_run_leaves_what_was_promised(train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "name=x", "max_steps=15", "keep_every=10")
    run = tmp_path / "outputs" / "x"
    assert sorted(path.name for path in run.iterdir() if "tfevents" not in path.name) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "train.log",
    ]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "clip_best.pt",
        "clip_last.pt",
        "clip_step_10.pt",
    ]
    steps = [line for line in lines(run) if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 16))
    assert [line["samples"] for line in steps] == list(range(16, 16 * 16, 16))
    assert {
        "train/loss",
        "train/lr",
        "train/logit_scale",
        "train/grad_norm",
        "train/samples_per_s",
        "train/data_wait",
        "epoch",
        "seconds",
    } <= set(steps[0])
    scores = [line for line in lines(run) if "val/retrieval/i2t_r1" in line]
    assert [line["step"] for line in scores] == [7, 14, 15]
    final_summary = summary(run)
    best = max(line["val/retrieval/mean_recall"] for line in scores)
    assert (
        final_summary["state"] == "finished" and final_summary["step"] == 15 and final_summary["best"]["value"] == best
    )
    assert final_summary["final"]["train/loss"] == steps[-1]["train/loss"]
    final_summary = (run / "train.log").read_text()
    assert "finished at step 15 of 15" in final_summary and "step 7  val/retrieval/mean_recall 0." in final_summary


@pytest.mark.pictures
def test_tensorboard_has_the_same_numbers_and_the_pictures(train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "name=x", "max_steps=8")
    run = tmp_path / "outputs" / "x"
    events = EventAccumulator(str(run)).Reload()
    for tag in ("train/loss", "train/lr", "val/retrieval/t2i_r10"):
        written = {line["step"]: line[tag] for line in lines(run) if tag in line}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(written)
    for tag in ("val/nearest_captions", "val/similarity"):
        assert [image.step for image in events.Images(tag)] == [7, 8]
        assert events.Images(tag)[0].encoded_image_string.startswith(b"\x89PNG")
    assert "config/text_summary" in events.Tags()["tensors"]


def test_twenty_steps_equal_ten_and_a_resume_and_ten_bit_for_bit(train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "name=straight")
    train(*FEW, "name=broken", "stop_at=10")  # 160 samples are 4 epochs of 40
    run = tmp_path / "outputs" / "broken"
    assert summary(run)["state"] == "stopped" and read(run / "checkpoints/clip_last.pt")["samples"] == 160
    train(*FEW, "name=broken")
    assert_same_state(tmp_path / "outputs" / "straight", run)
    assert [line["train/loss"] for line in lines(run) if "train/loss" in line] == [
        line["train/loss"] for line in lines(tmp_path / "outputs" / "straight") if "train/loss" in line
    ]


def test_a_resume_in_the_middle_of_an_epoch_and_with_other_workers_changes_nothing(
    train: Callable[..., None], tmp_path: Path
) -> None:
    train(*FEW, "name=straight", "max_steps=12")
    train(*FEW, "name=broken", "max_steps=12", "stop_at=3", "workers=1")
    train(*FEW, "name=broken", "max_steps=12", "stop_at=9", "workers=2")
    train(*FEW, "name=broken", "max_steps=12")
    assert_same_state(tmp_path / "outputs" / "straight", tmp_path / "outputs" / "broken")


def test_rows_logged_after_the_checkpoint_are_dropped_on_resume(train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "name=x", "max_steps=12", "stop_at=6", "save_every=4")
    run = tmp_path / "outputs" / "x"
    shutil.copy(run / "checkpoints/clip_last.pt", tmp_path / "six.pt")
    with (run / "metrics.jsonl").open("a") as file:  # as if the run had been killed at step 8
        file.write('{"step": 8, "samples": 128, "train/loss": 0}\n{"step": 9, "sam')
    train(*FEW, "name=x", "max_steps=12", "save_every=4")
    steps = [line["step"] for line in lines(run) if "train/loss" in line]
    assert steps == list(range(1, 13))


def test_a_run_resumes_from_a_named_checkpoint(train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "name=x", "max_steps=6", "keep_every=3")
    train(*FEW, "name=y", "max_steps=6", f"resume={tmp_path}/outputs/x/checkpoints/clip_step_3.pt")
    assert_same_state(tmp_path / "outputs/x", tmp_path / "outputs/y")
    assert [line["step"] for line in lines(tmp_path / "outputs/y") if "train/loss" in line] == [4, 5, 6]


def test_a_finished_run_says_so_and_is_left_as_it_is(
    train: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*FEW, "max_steps=3")
    (run,) = (tmp_path / "outputs").iterdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    train(*FEW, "max_steps=3")
    assert "is finished (3 steps); nothing is changed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_of_other_meaning_in_the_same_directory_is_refused(
    train: Callable[..., None], fails: Callable[..., str], tmp_path: Path
) -> None:
    train(*FEW, "name=x", "max_steps=3", "stop_at=2")
    message = fails(*FEW, "name=x", "max_steps=3", "optim.lr=0.1", "seed=5")
    assert message == (
        "outputs/x/checkpoints/clip_last.pt belongs to another run (optim.lr: 0.0005 -> 0.1; "
        "seed: 0 -> 5); name=... starts a new run, and resume_allow=[optim.lr,seed] resumes this one "
        "anyway"
    )
    assert "resume=auto resumes it" in fails(*FEW, "name=x", "max_steps=3", "resume=null")
    assert read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["step"] == 2


def test_other_data_under_the_same_arguments_are_refused(
    train: Callable[..., None], fails: Callable[..., str], make_shards: Callable[..., Path]
) -> None:
    args = ("data=shards", f"data.root={make_shards(30)}", "workers=0", "batch_size=8", "max_steps=4", "evals=[]")
    train(*args, "stop_at=2")
    make_shards(31)
    assert "belongs to another run (data: different shards, or different files in them)" in fails(*args)


def test_the_same_run_again_from_its_config(
    train: Callable[..., None], fails: Callable[..., str], tmp_path: Path
) -> None:
    train(*FEW, "name=x", "max_steps=3")
    train("config=outputs/x/config.yaml", "name=again")
    assert_same_state(tmp_path / "outputs/x", tmp_path / "outputs/again")
    train("config=outputs/x/config.yaml", "name=other", "optim.lr=0.01")
    other = read(tmp_path / "outputs/other/checkpoints/clip_last.pt")
    assert other["config"]["optim"]["lr"] == 0.01 and other["config"]["choices"]["data"] == "dummy"
    assert "already fixes every group" in fails("config=outputs/x/config.yaml", "data=emoji")
    assert "did you mean optim.lr?" in fails("config=outputs/x/config.yaml", "optim.lrr=0.01")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_float32_weights(amp: str, train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, f"amp={amp}", "name=x", "max_steps=4")
    saved = read(tmp_path / "outputs/x/checkpoints/clip_last.pt")
    assert all(tensor.dtype == torch.float32 for tensor in saved["model_state_dict"].values())
    assert saved["scaler"]["scale"] == (2.0**16 if amp == "fp16" else 1)
    assert all(math.isfinite(line["train/loss"]) for line in lines(tmp_path / "outputs/x") if "train/loss" in line)


def test_bad_samples_are_listed_and_too_many_end_the_run(
    train: Callable[..., None], fails: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(count: int) -> str:
        members = []
        for number in range(60):
            members += [(f"{number}.png", picture(number) if number >= count else b"broken")]
            members += [(f"{number}.txt", f"thing {number}".encode())]
        write_tar(tmp_path / f"spoilt{count}" / "x.tar", members)
        return f"data.root={tmp_path}/spoilt{count}"

    args = ("data=shards", "workers=0", "batch_size=20", "max_steps=6", "log_every=1", "data.val=0", "evals=[]")
    train(*args, spoil(4), "name=x")
    log = capsys.readouterr().err
    assert log.count("bad samples are skipped, first x.tar/") == 1
    records = lines(tmp_path / "outputs/x", "skipped.jsonl")
    assert {record["place"] for record in records} == {f"x.tar/{number}" for number in range(4)}
    assert lines(tmp_path / "outputs/x")[-1]["train/skipped"] == 4
    message = fails(*args, spoil(12), "name=y")
    assert message.startswith("12 bad samples, more than data.max_skipped allows, last x.tar/")


def test_a_run_shorter_than_log_every_still_logs_its_last_step(train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "name=x", "max_steps=2", "log_every=50", "evals=[]")
    assert [line["step"] for line in lines(tmp_path / "outputs/x")] == [2]


@pytest.mark.parametrize("name", ["5", "nan", "1e3"])
def test_a_number_is_a_name(name: str, train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, f"name={name}", "max_steps=1", "evals=[]")
    (run,) = (tmp_path / "outputs").iterdir()
    assert run.name in (name, "1000.0")


def test_the_log_says_which_warm_up_applied(train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "name=x", "max_steps=20", "stop_at=1", "evals=[]")
    log = (tmp_path / "outputs/x/train.log").read_text()
    assert "warm-up 2 (sched.warmup=2,000, capped by sched.warmup_cap)" in log
    train(*FEW, "name=y", "max_steps=20", "stop_at=1", "evals=[]", "sched.warmup=1")
    assert "warm-up 1 (sched.warmup)" in (tmp_path / "outputs/y/train.log").read_text()


def test_without_a_validation_set_a_run_is_saved_all_the_same(train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "name=x", "max_steps=2", "evals=[]")
    assert [path.name for path in (tmp_path / "outputs/x/checkpoints").iterdir()] == ["clip_last.pt"]


def test_a_batch_larger_than_the_data_is_refused(fails: Callable[..., str]) -> None:
    assert fails(*FEW, "batch_size=41").startswith("batch_size=41 is more than the 40 training samples")


def test_a_missing_device_is_named(fails: Callable[..., str]) -> None:
    assert fails(*FEW, "device=tpu9").startswith("device=tpu9 cannot be used (")


@pytest.mark.long
def test_a_model_learns_shapes_that_it_has_not_seen(train: Callable[..., None], tmp_path: Path) -> None:
    train("data=dummy", "workers=0", "batch_size=64", "max_steps=250", "optim.lr=1e-3", "eval_every=250", "name=x")
    final = summary(tmp_path / "outputs/x")["final"]
    # 256 pictures share 128 captions in pairs, so even a perfect model has a recall at 1 of one half
    assert final["val/retrieval/i2t_r10"] > 0.9 and final["train/loss"] < 2
    assert final["health/loss_over_chance"] < 0.5 and final["health/positive_cosine"] > final["health/negative_cosine"]
    assert "The usual causes" not in (tmp_path / "outputs/x/train.log").read_text()
