"""``python -m clipx.compare``: tables and plots of finished, running and broken runs."""

import csv
import json
import os
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import run_python
from PIL import Image

from clipx.compare import main
from clipx.tools.ablation import gains
from clipx.tools.runs_table import find_runs, table

TAG = "val/retrieval/mean_recall"


def fake_run(root: Path, number: int, value: float | None, state: str = "finished", **keys: object) -> Path:
    """A run directory with a summary and metrics, as written by training."""
    run = root / f"run{number:04d}"
    run.mkdir(parents=True)
    config = {"name": f"run{number}", "model.image.width": 192, "optim.lr": 5e-4, "seed": 0, "choices.model": "tiny"}
    final = {"train/loss": 2.0 + number, "train/samples_per_s": 100.0, **({TAG: value} if value is not None else {})}
    summary = {
        "state": state, "step": 10, "steps": 10, "samples": 160, "seconds": 60.0, "final": final, "objective": TAG,
        "best": {"metric": TAG, "value": value + 0.01, "step": 9} if value is not None else {},
        "config": {**config, **keys},
        "process": {"id": os.getpid(), "host": socket.gethostname(), "since": time.time()},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    rows = [{"step": step, "samples": 16 * step, "seconds": step, TAG: 0.1 * step, "train/loss": 3} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "samp')
    return run


def test_the_table_has_what_differs_and_the_best_first(tmp_path: Path) -> None:
    for number, (lr, width) in enumerate([(1e-4, 64), (5e-4, 64), (1e-4, 128)]):
        fake_run(tmp_path, number, [0.2, 0.5, 0.3][number], **{"optim.lr": lr, "model.image.width": width})
    fake_run(tmp_path, 3, None, "failed")
    rows = table(find_runs([tmp_path]))
    assert [row["run"] for row in rows] == ["run0001", "run0002", "run0000", "run0003"]
    assert list(rows[0]) == [
        "run",
        "state",
        "model.image.width",
        "optim.lr",
        TAG,
        "best",
        "loss",
        "step",
        "samples/s",
        "minutes",
    ]
    assert (rows[0][TAG], rows[0]["best"], rows[0]["optim.lr"], rows[-1]["state"]) == (0.5, 0.51, 5e-4, "failed")


def test_seeds_of_one_setting_are_listed_together(tmp_path: Path) -> None:
    for number, value in enumerate([0.1, 0.2, 0.6, 0.8]):
        fake_run(tmp_path, number, value, **{"optim.lr": 1e-4 if number < 2 else 1e-3, "seed": number % 2})
    best, worst = table(find_runs([tmp_path]))
    assert (best["run"], best["state"], best["optim.lr"]) == ("2 seeds", "2 finished", 1e-3)
    assert str(best[TAG]) == "0.7 ± 0.14" and str(worst[TAG]) == "0.15 ± 0.071" and "seed" not in best


def ablation(root: Path) -> None:
    """Two seeds of a baseline and of two changes, which gain 0.2 and 0.1, and lose 0.1 and 0.3."""
    changes = ({}, {"choices.optim": "lion", "optim.lr": 1e-4, "optim.momentum": 0.9}, {"loss.same": "mask"})
    for number, (name, keys) in enumerate(zip(("baseline", "lion", "mask"), changes, strict=True)):
        for seed, value in enumerate(([0.4, 0.5], [0.6, 0.6], [0.3, 0.2])[number]):
            fake_run(root / name, seed, value, **{"choices.optim": "adamw", "loss.same": "keep", "seed": seed, **keys})


def test_each_change_is_compared_with_a_baseline_seed_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation(tmp_path)
    outs = [tmp_path / "table.md", tmp_path / "gains.png"]
    args = [str(tmp_path), f"--against={tmp_path / 'baseline'}", "--metric=train/loss"]
    monkeypatch.setattr(sys, "argv", ["clipx.compare", *args, *(f"--out={out}" for out in outs)])
    main()
    head, _, *rows = [line.strip("| \n").split(" | ") for line in outs[0].read_text().splitlines()]
    assert head == ["change", "runs", TAG, "gain", "train/loss", "gain in train/loss", "minutes"]
    assert [row[0] for row in rows] == ["optim=lion, optim.lr=0.0001", "baseline", "loss.same=mask"]
    assert [row[3] for row in rows] == ["0.15 ± 0.071", "", "-0.2 ± 0.14"]
    with Image.open(outs[1]) as picture:
        assert picture.size == (1100, 190)
    capsys.readouterr()
    for wrong, message in (
        ([f"--against={tmp_path}"], "expected one run, or the seeds of one setting; these differ in optim"),
        (["--metric=val/retrieval/mean_recal"], f"no run has it; there are {TAG}"),
    ):
        monkeypatch.setattr(sys, "argv", ["clipx.compare", str(tmp_path), *wrong])
        with pytest.raises(SystemExit, match=message):
            main()


def test_a_terminal_shows_the_table_against_a_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation(tmp_path)
    fake_run(tmp_path / "flip", 0, None, "failed", **{"choices.optim": "adamw", "loss.same": "keep", "flip": True})
    monkeypatch.setattr(sys, "argv", ["clipx.compare", str(tmp_path), f"--against={tmp_path / 'baseline'}"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    main()
    shown = capsys.readouterr().out
    for change in ("baseline", "optim=lion", "loss.same=mask", "flip=true", "1 failed"):
        assert change in shown


def test_without_common_seeds_the_means_are_compared(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path, number, value, seed=number) for number, value in enumerate([0.2, 0.4, 0.6])]
    first, *others = find_runs(runs)
    assert gains(others, [first], TAG) == [pytest.approx(0.3)] and gains([first], others, "val/unknown") == []


def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    for number in range(3):
        fake_run(tmp_path, number, 0.1, "running", **{"optim.lr": number})
    dead_pid = next(number for number in range(100_000, 4_000_000) if not psutil.pid_exists(number))
    for number, process in ((1, {"id": dead_pid, "since": time.time()}), (2, {"id": os.getpid(), "since": 5.0})):
        file = tmp_path / f"run{number:04d}/summary.json"
        summary = json.loads(file.read_text())
        file.write_text(json.dumps({**summary, "process": {"host": socket.gethostname(), **process}}))
    assert [run.state for run in find_runs([tmp_path])] == ["running", "killed", "killed"]


BROKEN = {
    "empty": b"",
    "cut": b'{"state": "fini',
    "bytes": b"\xff\xfe\x00",
    "list": b"[1, 2]",
    "foreign": b'{"accuracy": 0.5}',
    "odd": b'{"state": "finished", "final": 3, "best": {}}',
}


def test_a_broken_or_foreign_summary_is_named_and_the_others_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        fake_run(tmp_path / "outputs", number, 0.1 * number, **{"optim.lr": number})
    for name, content in BROKEN.items():
        (tmp_path / "outputs" / name).mkdir()
        (tmp_path / "outputs" / name / "summary.json").write_bytes(content)
    (tmp_path / "outputs/folder/summary.json").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clipx.compare", "outputs", "--out=table.csv", "--out=plot.png"])
    main()
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["run", "run0001", "run0000"]
    damaged = "it is empty or corrupt, not the JSON that a run writes"
    foreign = "it was not written by a run of clipx"
    reasons = {
        "empty": damaged,
        "cut": damaged,
        "bytes": damaged,
        "list": foreign,
        "foreign": foreign,
        "odd": foreign,
        "folder": "it cannot be read: Is a directory",
    }
    assert sorted(captured.err.splitlines()) == sorted(
        f"outputs/{name}/summary.json is left out: {reason}" for name, reason in reasons.items()
    )

    monkeypatch.setattr(sys, "argv", ["clipx.compare", "outputs/foreign"])
    with pytest.raises(SystemExit, match="^outputs/foreign: no runs found"):
        main()
    with (tmp_path / "outputs/run0000/metrics.jsonl").open("w") as file:
        file.write("no json\n")
    monkeypatch.setattr(sys, "argv", ["clipx.compare", "outputs", "--out=plot.png"])
    with pytest.raises(SystemExit, match="^outputs/run0000/metrics.jsonl: line 1 is corrupt; "):
        main()


def test_every_kind_of_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        keys = {"a.width": number, "compile": number > 1, "evals.a.ks": [number]}
        fake_run(tmp_path / "runs", number, 0.1 * number, **{"optim.lr": 10.0**-number}, **keys)
    outs = [tmp_path / f"table{kind}" for kind in (".md", ".csv", ".json", ".png", ".svg")]
    monkeypatch.setattr(sys, "argv", ["clipx.compare", str(tmp_path / "runs"), *(f"--out={out}" for out in outs)])
    main()
    first = outs[0].read_text().splitlines()[2]
    assert first.startswith("| run0002 | finished | 0.01 | 2 | True | [2] | 0.2 | 0.21 | 4 | 10 | 100 | 1 |")
    with outs[1].open() as file:
        assert [float(row[TAG]) for row in csv.DictReader(file)] == [0, 0.1, 0.2]
    assert [row["optim.lr"] for row in json.loads(outs[2].read_text())] == [1, 0.1, 0.01]
    with Image.open(outs[3]) as picture:
        assert picture.size == (1500, 4 * 420)  # two rows of curves and two of the effects of four keys
    none = ([str(tmp_path / "none")], "there is no such run or folder of runs")
    for args, message in (none, ([str(tmp_path), "--out=x.doc"], "ends in .csv")):
        monkeypatch.setattr(sys, "argv", ["clipx.compare", *args])
        with pytest.raises(SystemExit, match=message):
            main()


def test_a_thousand_runs_are_compared_without_torch_or_hydra(tmp_path: Path) -> None:
    for number in range(1000):
        fake_run(tmp_path / "runs", number, number / 1000, **{"optim.lr": number})
    code = (
        "import sys, time; from clipx.compare import main\n"
        "sys.argv = ['x', 'runs']; began = time.perf_counter(); main()\n"
        "assert not {'torch', 'hydra', 'omegaconf', 'matplotlib'} & set(sys.modules)\n"
        "print(time.perf_counter() - began)"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    *lines, seconds = result.stdout.splitlines()
    assert len(lines) == 1001 and lines[1].startswith("run0999") and float(seconds) < 5
