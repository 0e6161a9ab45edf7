"""Trackers: each has the numbers of metrics.jsonl, once, also after a resume; one of your own is a class."""

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import FEW, last_line, lines, summary
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from clipx.config.meaning import differences, is_neutral, with_defaults
from clipx.track import TrackedRun
from clipx.track.csv import CsvTable
from clipx.track.wandb import WandB
from clipx.training import logs

Train = Callable[..., None]

SHORT = (*FEW, "max_steps=6", "eval_every=3", "save_every=2")
BLOCK = 2**15  # bytes of a block of a .wandb file


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # a run never imports it
    monkeypatch.delattr("matplotlib.pyplot", raising=False)
    yield
    wandb.teardown()


def wandb_records(path: Path) -> Iterator[Record]:
    """Read a .wandb file: after 7 bytes, the log format of LevelDB."""
    data, place, whole = path.read_bytes(), 7, b""
    while place < len(data):
        if BLOCK - place % BLOCK < 7:  # padding
            place += BLOCK - place % BLOCK
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + size > len(data):  # still being written
            return
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def finished_records(path: Path) -> list[Record]:
    """The records of a .wandb file, once W&B's own process has written the last one."""
    for _ in range(200):
        records = list(wandb_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def wandb_rows(run: Path) -> list[dict[str, float]]:
    """The history of the only file of an offline run, without what W&B adds."""
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for record in finished_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def csv_rows(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def by_step(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Join the rows of a step, as W&B does."""
    steps: dict[float, dict[str, float]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    return list(steps.values())


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def progress(self: logs.RunLog, at: int, _numbers: dict) -> None:
        if at == step:
            raise OSError("the disk is gone")

    monkeypatch.setattr(logs.RunLog, "progress", progress)


@pytest.mark.pictures
def test_every_tracker_has_every_number_once_though_the_run_was_interrupted(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, run = (*SHORT, "track=[tensorboard,csv,wandb]", "name=x"), tmp_path / "outputs/x"
    with monkeypatch.context() as broken:
        interrupt_at(5, broken)
        with pytest.raises(OSError, match="the disk is gone"):
            train(*args)
    assert [row["step"] for row in lines(run)][-1] == [row["step"] for row in csv_rows(run)][-1] == 5
    assert [row["step"] for row in wandb_rows(run)][-1] == 5
    train(*args)
    rows = lines(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6] and len(rows[0]) > 15
    assert csv_rows(run) == rows
    found = wandb_rows(run)
    pictures = ("val/nearest_captions/", "val/similarity/")
    numbers = [{key: row[key] for key in row if not key.startswith(pictures)} for row in found]
    assert numbers == by_step(rows)
    assert found[-1]["val/similarity/_type"] == "image-file" and len(list(run.glob("wandb/offline-run-*"))) == 1
    events = EventAccumulator(str(run)).Reload()
    for tag in ("train/loss", "val/loss", "val/retrieval/mean_recall"):
        written = {row["step"]: row[tag] for row in rows if tag in row}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(written)
        assert len(events.Scalars(tag)) == len(written)


def test_a_run_may_resume_with_other_trackers_which_get_all_earlier_numbers(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "outputs/x"
    train(*SHORT, "track=[]", "name=x", "stop_at=3")
    assert not list(run.glob("events*")) and len(lines(run)) == 4 and summary(run)["state"] == "stopped"
    train(*SHORT, "track=[csv]", "name=x")
    assert csv_rows(run) == lines(run) and summary(run)["state"] == "finished" and not list(run.glob("events*"))
    assert str(run.relative_to(tmp_path) / "metrics.csv") in (run / "train.log").read_text()
    assert "tensorboard" not in (run / "train.log").read_text()


def test_the_jobs_of_a_sweep_have_a_run_each_in_one_group(train: Train, tmp_path: Path) -> None:
    train("-m", *FEW, "max_steps=2", "evals=[]", "track=[wandb]", "track.wandb.tags=[a,b]", "name=s", "seed=0,1")
    ids = set()
    for seed in (0, 1):
        run = tmp_path / f"outputs/sweeps/s/seed={seed}"
        assert wandb_rows(run) == by_step(lines(run))
        (path,) = run.glob("wandb/offline-run-*/*.wandb")
        (about,) = [record.run for record in finished_records(path) if record.WhichOneof("record_type") == "run"][:1]
        assert (about.display_name, about.run_group, [*about.tags]) == (f"seed={seed}", "s", ["a", "b"])
        config = {update.key: update.value_json for update in about.config.update}
        assert config["seed"] == str(seed) and json.loads(config["model"])["image"]["depth"] == 1
        ids.add(about.run_id)
    assert len(ids) == 2


def test_a_table_gets_a_column_when_a_tag_is_new(tmp_path: Path) -> None:
    table, first = CsvTable(), {"step": 1, "samples": 8, "epoch": 0.5, "seconds": 1.5}
    for rows in ([first], [first, {**first, "step": 2, "val/a,b": 0.1}]):
        table.start(TrackedRun(tmp_path, {}, {}, None, len(rows), rows))
        table.log({**first, "step": 3, "train/loss": 1 / 3})
        table.log({**first, "step": 4, "train/loss": 2.0})
        table.close("running")
        assert csv_rows(tmp_path) == [*rows, *table.rows[-2:]]


@pytest.mark.parametrize("folder", [False, True])
def test_a_missing_wandb_is_one_line_before_training(
    folder: bool, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = type("Spec", (), {"origin": None})() if folder else None
    monkeypatch.setattr("clipx.track.wandb.find_spec", lambda _: spec)
    assert last_line(train, *FEW, "track=[wandb]", "name=x") == (
        'track=[wandb] needs wandb, which is not installed; pip install "clipx[wandb]"'
    )
    assert not (tmp_path / "outputs/x/train.log").exists()


def test_whoever_is_not_logged_in_reads_how_before_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    message = last_line(train, *FEW, "track=[csv,wandb]", "track.wandb.mode=online", "name=x")
    assert message.startswith("track=[wandb]: ") and message.endswith("or set track.wandb.mode=offline")
    assert not (tmp_path / "outputs/x/metrics.jsonl").exists()


def test_wandb_goes_on_under_one_id_and_repeats_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    calls: list[dict] = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **args: calls.append(args) or init(**args))
    tracker = WandB()
    for step in (0, 2):  # the second after step 2 of a run that had logged three
        tracker.start(
            TrackedRun(tmp_path, {}, {}, None, step, [{"step": one, "a/b": one} for one in range(1, step + 1)])
        )
        for one in (step + 1, step + 2, step + 3):
            tracker.log({"step": one, "a/b": one})
        tracker.close("running")
        time.sleep(1)  # W&B names a directory by the second
    assert [row["a/b"] for row in wandb_rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert len({args["id"] for args in calls}) == 1 and {args["resume"] for args in calls} == {"allow"}
    assert wandb.run is None


def test_configs_from_before_there_were_trackers_mean_the_same_run() -> None:
    node = {"_target_": "clipx.track.tensorboard.TensorBoard"}
    assert with_defaults({"seed": 0})["track"] == with_defaults({"seed": 0}, "check")["track"] == {"tensorboard": node}
    assert with_defaults({"track": {}})["track"] == {}
    old = yaml.safe_load("{seed: 0, trust: []}")
    new = {
        **with_defaults(old),
        "best": "val/retrieval/mean_recall",
        "track": {"csv": {"_target_": "clipx.track.csv.CsvTable"}},
    }
    assert differences(old, new) == {}
    assert is_neutral("track") and is_neutral("track.wandb.project") and not is_neutral("tracks")


def test_nothing_is_imported_for_trackers_that_are_not_chosen(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    for name in ("clipx.track.tensorboard", "clipx.track.wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    train(*FEW, "max_steps=1", "evals=[]", "track=[csv]")
