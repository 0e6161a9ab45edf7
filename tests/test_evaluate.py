"""``python -m clipx.evaluate``: it writes results next to runs and weights, and they equal those of training."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import FEW, command, picture, run_ranks, summary, train_in
from labelled_data import class_folders, class_shards
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipx.config.runs import expand_runs
from clipx.data.dummy import Dummy
from clipx.evals.encoder import EvalEncoder
from clipx.evals.linear_probe import LinearProbe
from clipx.evals.retrieval import retrieval
from clipx.evals.validation import Validation
from clipx.evals.zero_shot import ZeroShot
from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.tokenizer import SimpleTokenizer
from clipx.training.logs import SilentLog
from clipx.weights import checkpoint

DUMMY = ("data=dummy", "data.val_samples=20", "workers=0", "device=cpu")
Evaluate = Callable[..., str]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, which tests must not modify."""
    return train_in(tmp_path_factory.mktemp("trained"), "max_steps=4")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return Path(shutil.copytree(trained, tmp_path / "outputs/x"))


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Evaluate:
    """``python -m clipx.evaluate ARGUMENTS`` in this process, from an empty directory; returns its output."""
    call = command("evaluate", tmp_path, monkeypatch)

    def run(*args: str) -> str:
        capsys.readouterr()
        try:
            call(*args)
        except SystemExit as ended:
            assert "\n" not in str(ended.code)
            return str(ended.code)
        return capsys.readouterr().err

    return run


def metrics(directory: Path) -> dict:
    return json.loads((directory / "metrics.json").read_text())


def test_a_run_gives_the_numbers_of_its_training_to_a_file_to_tensorboard_and_to_a_table(
    run: Path, evaluate: Evaluate
) -> None:
    output = evaluate("run=outputs/x", *DUMMY)
    scores = metrics(run)["checkpoints/clip_best.pt"]["dummy"]["retrieval"]
    trained = {tag: value for tag, value in summary(run)["final"].items() if tag.startswith("val/retrieval/")}
    assert len(trained) == 13
    for tag, value in trained.items():
        assert scores[tag.rpartition("/")[2]] == pytest.approx(value), tag
    assert scores["step"] == 4 and scores["mean_recall_low"] <= scores["mean_recall"] <= scores["mean_recall_high"]
    events = EventAccumulator(str(run)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/retrieval@dummy/mean_recall")] == [
        (4, pytest.approx(scores["mean_recall"]))
    ]
    lines = output.splitlines()
    assert lines[0] == "x: outputs/x/metrics.json" and lines[1].split() == ["x"]
    assert lines[2].split()[:2] == ["retrieval@dummy", "i2t_r1"] and " to " in lines[2]
    assert lines[3].startswith(" ") and len(lines) == 15


def test_several_runs_give_one_table_and_weights_keep_their_numbers_beside_them(
    run: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    shutil.copy(run / "checkpoints/clip_last.pt", tmp_path / "mine/a.pt")
    shutil.copy(run / "checkpoints/clip_last.pt", tmp_path / "mine/b.pt")
    (tmp_path / "bees").mkdir()
    class_folders(tmp_path / "bees/test")
    args = (
        "evals=[zero_shot]",
        "labelled={bees:{folder:bees/test}}",
        "workers=0",
        "device=cpu",
        "evals.zero_shot.templates=simple",
    )
    output = evaluate("run=[outputs/x,mine/a.pt]", *args)
    assert output.splitlines()[2].split() == ["x", "a.pt"]
    assert output == evaluate("run=outputs/x,mine/a.pt", *args)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "a-zero_shot@bees-mistakes.png",
        "a.pt",
        "b.pt",
        "metrics.json",
    ]
    assert (run / "zero_shot@bees-mistakes.png").stat().st_size > 5000
    first = metrics(tmp_path / "mine")
    assert set(first["a.pt"]["bees"]["zero_shot"]) >= {"top1", "per_class/red panda", "pictures", "skipped", "data"}
    evaluate("run=mine/a.pt", *DUMMY)
    evaluate("run=mine/b.pt", *DUMMY)
    merged = metrics(tmp_path / "mine")
    assert merged["a.pt"]["bees"] == first["a.pt"]["bees"]
    assert set(merged["a.pt"]) == {"bees", "dummy"} and set(merged["b.pt"]) == {"dummy"}


def test_other_data_of_the_same_name_do_not_take_the_place_of_the_first(run: Path, evaluate: Evaluate) -> None:
    evaluate("run=outputs/x", *DUMMY)
    before = metrics(run)["checkpoints/clip_best.pt"]["dummy"]
    evaluate("run=outputs/x", *DUMMY, "data.val_samples=10")
    after = metrics(run)["checkpoints/clip_best.pt"]
    assert len(after) == 2 and after["dummy"] == before
    evaluate("run=outputs/x", *DUMMY, "data.val_samples=10", "bootstrap=null")
    rerun = metrics(run)["checkpoints/clip_best.pt"]
    assert len(rerun) == 2 and rerun["dummy"] == before and rerun.keys() == after.keys()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("outputs/a", {"outputs/a": "a"}),
        ("a,b/c", {"a": "a", "b/c": "c"}),
        (
            "[outputs/x=1,outputs/y=2]",
            {"outputs/x=1": "x=1", "outputs/y=2": "y=2"},
        ),  # the = keeps Hydra from parsing it as a list
        (["one/a", "two/a", "one/a"], {"one/a": "one/a", "two/a": "two/a"}),
    ],
)
def test_runs_are_headed_by_distinct_names(pattern: str | list[str], names: dict[str, str]) -> None:
    assert expand_runs(pattern) == names


def test_two_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from clipx.tools.score import locked_json\n"
        "for number in range(40):\n"
        "    with locked_json(Path('metrics.json')) as found: found[f'{sys.argv[1]}-{number}'] = number\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, name], cwd=tmp_path) for name in "ab"]
    assert [process.wait() for process in started] == [0, 0]
    assert len(metrics(tmp_path)) == 80


def test_features_are_kept_by_what_weights_and_data_hold(
    run: Path, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = class_folders(tmp_path / "bees/test", each=2)
    class_folders(tmp_path / "bees/train", each=3, shift=2)
    args = (
        "run=outputs/x",
        "evals=[zero_shot,linear_probe,retrieval]",
        *DUMMY,
        "cache=kept",
        "labelled={bees:{folder:bees/test,train:bees/train}}",
        "evals.zero_shot.templates=simple",
    )
    first = evaluate(*args)
    assert len(list((tmp_path / "kept").iterdir())) == 3 and "linear_probe@bees" in first
    with monkeypatch.context() as patch:
        patch.setattr(EvalEncoder, "encode_images", None)  # fails if anything is encoded
        assert evaluate(*args) == first
    size = (root / "bee/0.png").stat().st_size
    changed = picture(200)
    (root / "bee/0.png").write_bytes(changed + bytes(max(0, size - len(changed))))
    evaluate(*args)
    assert len(list((tmp_path / "kept").iterdir())) == 4
    content = checkpoint.read(run / "checkpoints/clip_best.pt")
    content["model_state_dict"]["logit_scale"] += 0.1
    checkpoint.save(run / "checkpoints/clip_best.pt", content)
    evaluate(*args)
    assert len(list((tmp_path / "kept").iterdir())) == 7
    evaluate(*args, "matmul_precision=high", "amp=auto")
    assert len(list((tmp_path / "kept").iterdir())) == 10
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(b"x")
    assert "is corrupt; delete it, and the features will be encoded again" in evaluate(*args)


def test_all_pictures_can_be_scored_and_each_set_of_a_mix_goes_by_its_name(
    run: Path, evaluate: Evaluate, make_shards: Callable[..., Path]
) -> None:
    root = make_shards(20, 10)
    output = evaluate("run=outputs/x", "data=shards", f"data.root={root}", "split=train", "data.val=0", "workers=0")
    assert "retrieval@shards  i2t_r1" in output
    assert evaluate("run=outputs/x", "data=shards", f"data.root={root}", "data.val=0", "workers=0") == (
        "split=val: shards has no validation pictures; split=train scores all, or give data.val=DIR"
    )


def test_data_in_the_current_directory_go_by_its_name(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(20):
        (tmp_path / f"images/{number}.png").write_bytes(picture(number))
    (tmp_path / "captions.txt").write_text("".join(f"{number}.png\tthing {number}\n" for number in range(20)))
    output = evaluate("run=outputs/x", "data=folder", "data.root=.", "data.val=0.5", "workers=0")
    assert f"retrieval@{tmp_path.name}" in output and tmp_path.name in metrics(run)["checkpoints/clip_best.pt"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["run=no", *DUMMY], "run=no: there is no such run, checkpoint or weights; there is outputs/x"),
        ([*DUMMY], "run has no value; add run=..."),
        (["run=outputs/x"], "data has no value, and evals=['retrieval'] score pictures with captions; add data=coco"),
        (["run=outputs/x", "evals=[zero_shot]"], "evals.zero_shot.sets has no value; set labelled data: labelled={"),
        (
            ["run=outputs/x", "evals=[zero_shot]", "labelled={x:{folder:no}}"],
            "evals.zero_shot.sets.x.folder=no has no class directories with pictures",
        ),
        (
            ["run=outputs/x", "evals=[zero_shot]", "labelled={x:{foldr:no}}"],
            "evals.zero_shot.sets.x.foldr: there is no such key; did you mean folder?",
        ),
        (
            ["run=outputs/x", "evals=[zero_shot]", "labelled={x:{folder:no}}", "evals.zero_shot.templates=opnai"],
            "evals.zero_shot.sets.x.folder=no",
        ),
        (["run=outputs/x", "evals=[zeroshot]"], "evals=zeroshot: there is no such option; did you mean zero_shot?"),
        (["run=outputs/x", "bootstrap=0"], "bootstrap=0: should be greater than 0"),
    ],
)
def test_a_mistake_ends_in_one_line(args: list[str], line: str, run: Path, evaluate: Evaluate) -> None:
    assert evaluate(*args).startswith(line)
    assert not (run / "metrics.json").exists()


@pytest.mark.parametrize("obstacle", ["directory", "text", "list", "read-only"])
def test_unwritable_results_are_refused_before_scoring(
    obstacle: str, run: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Validation, "__call__", lambda *_: pytest.fail("scored"))
    if obstacle == "directory":
        (run / "metrics.json").mkdir()
    elif obstacle == "read-only":
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        (run / "metrics.json").write_text({"text": "mine", "list": "[]"}[obstacle])
    message = {
        "directory": "was not written by evaluate (Is a directory); move it away, and evaluate writes a new one",
        "text": "was not written by evaluate (Expecting value",
        "read-only": "cannot be written: Permission denied",
        "list": "was not written by evaluate (it holds a list); move it away, and evaluate writes a new one",
    }
    assert evaluate("run=outputs/x", *DUMMY).startswith(f"outputs/x/metrics.json {message[obstacle]}")


def test_pictures_that_are_left_out_are_listed_once(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "some/images").mkdir(parents=True)
    for number in range(20):
        (tmp_path / f"some/images/{number}.png").write_bytes(picture(number) if number else b"no picture")
    (tmp_path / "some/captions.txt").write_text("".join(f"{number}.png\tthing {number}\n" for number in range(20)))
    for _ in range(2):
        evaluate("run=outputs/x", "data=folder", "data.root=some", "data.val=0", "split=train", "workers=0")
    (line,) = (json.loads(line) for line in (run / "evaluate-skipped.jsonl").read_text().splitlines())
    assert line["set"] == "some" and line["place"].endswith("0.png") and line["weights"].startswith("checkpoints/clip")


def test_training_scores_labelled_data_as_it_goes_and_keeps_the_best_by_them(
    train: Callable[..., None], tmp_path: Path
) -> None:
    class_folders(tmp_path / "a")
    class_shards(tmp_path / "b", [b"0", b"1", b"2", b"3"] * 3)
    class_folders(tmp_path / "learn", shift=2)
    train(
        *FEW,
        "max_steps=4",
        "eval_every=2",
        "name=y",
        "evals=[retrieval,zero_shot,linear_probe]",
        "labelled={a:{folder:a,train:learn},b:{shards:b,train:b}}",
        "evals.zero_shot.templates=simple",
        "evals.linear_probe.sets={a:{folder:a,train:learn}}",
        "best=val/zero_shot@b/mean_per_class",
    )
    tags = summary(tmp_path / "outputs/y")["final"]
    assert {
        "val/retrieval/mean_recall",
        "val/zero_shot@a/top1",
        "val/zero_shot@b/top1",
        "val/linear_probe@a/top1",
    } <= tags.keys()
    assert not [tag for tag in tags if "per_class/" in tag or tag.endswith("_low")]
    best = summary(tmp_path / "outputs/y")["best"]
    assert best["metric"] == "val/zero_shot@b/mean_per_class"
    assert best["value"] >= tags["val/zero_shot@b/mean_per_class"]
    assert (tmp_path / "outputs/y/checkpoints/clip_best.pt").exists()
    events = EventAccumulator(str(tmp_path / "outputs/y"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("val/zero_shot@a/top1")] == [2, 4]
    assert [event.step for event in events.Images("val/zero_shot@a/mistakes")] == [2, 4]


def test_check_looks_at_the_labelled_data(check: Callable[..., tuple[str, int]], tmp_path: Path) -> None:
    root = class_folders(tmp_path / "a")
    (root / "bee/0.png").write_bytes(b"no picture")
    args = (
        "data=dummy",
        "data.samples=40",
        "data.val_samples=20",
        "batch_size=8",
        "model.image.depth=1",
        "evals=[zero_shot]",
        "labelled={a:{folder:a}}",
        "objective=val/zero_shot@a/top1",
    )
    output, code = check(*args)
    assert code == 0 and "12 pictures to validate of zero_shot@a" in output
    assert (
        "1 of the first 32 are skipped, for example bee/0.png: does not decode" in output and "computes" not in output
    )
    assert "no evaluation computes val/zero_shot@c/top1" in check(*args, "best=val/zero_shot@c/top1")[0]


def scores(root: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = CLIP(
        ImageEncoder(size=32, patch=16, width=64, depth=1, heads=1, embed=32),
        TextEncoder(width=64, depth=1, heads=1, embed=32),
    )
    sets = {"a": {"folder": f"{root}/a", "train": f"{root}/learn"}}
    evals = {
        "retrieval": partial(retrieval, bootstrap=20),
        "zero_shot": ZeroShot(sets, "simple"),
        "linear_probe": LinearProbe(sets),
    }
    validation = Validation({"": Dummy(80, 32, 0)}, evals, SimpleTokenizer(), 0, None, Path(root, "kept"))
    return validation(model, 1, SilentLog())


def on_rank(rank: int, world: int, root: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=world)
    torch.save([scores(root), scores(root)], f"{root}/{rank}.pt")  # the second from the cache
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_share_the_work_and_get_what_one_gets(tmp_path: Path) -> None:
    class_folders(tmp_path / "a", each=20)
    class_folders(tmp_path / "learn", each=5, shift=3)
    run_ranks(on_rank, 2, str(tmp_path))
    shutil.rmtree(tmp_path / "kept")
    single = scores(str(tmp_path))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == [single, single]  # bit for bit


@pytest.mark.long
def test_under_torchrun_one_rank_writes_what_one_process_would(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate("run=outputs/x", *DUMMY)
    single = metrics(run)
    (run / "metrics.json").unlink()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "clipx.evaluate",
        "run=outputs/x",
        *DUMMY,
    ]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300).stderr
    assert metrics(run) == single and output.count("mean_recall") == 1


def test_help_needs_no_torch_and_names_the_commands(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    result = subprocess.run(
        [sys.executable, "-m", "clipx.evaluate", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0 and "run=outputs/NAME data=coco" in result.stdout, result.stderr
