import importlib
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, command, merge_args, run_python
from hydra import compose, initialize_config_module

from clipx.config.resolve import resolve
from clipx.config.schema import TrainConfig
from clipx.tools import measure
from clipx.tools.bench import report_bound

FEW = (
    "data=dummy",
    "data.samples=80",
    "data.val_samples=4",
    "batch_size=16",
    "workers=1",
    "rounds=1",
    "steps=2",
    "model.image.depth=1",
    "model.text.depth=1",
)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return command("bench", tmp_path, monkeypatch)


def compose_config(*overrides: str) -> TrainConfig:
    with initialize_config_module("clipx.conf", version_base="1.3"):
        return resolve(compose("train", list(overrides)), TrainConfig)


def test_a_step_is_measured(bench: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(*FEW, "parts=[step]", "json=found.json", "trace=true", "micro_batch_size=8", "name=x", "amp=auto")
    report = json.loads((tmp_path / "found.json").read_text())["step"]
    assert sum(report["shares"].values()) == pytest.approx(1)
    assert all(report["shares"][part] > 0 for part in ("wait", "image tower", "text tower", "loss", "backward"))
    assert report["rounds"][0]["samples_per_s"] > 0 and report["memory_gb"] > 0
    assert json.loads((tmp_path / "outputs/x/trace.json").read_text())["traceEvents"]
    shares = list(report["operations"].values())
    assert len(shares) == 10 and sorted(shares, reverse=True) == shares and 0.3 < sum(shares) <= 1
    log = capsys.readouterr().err
    assert "samples/s on batches in memory, peak" in log and "GFLOP per sample" in log and "bound     " in log


@pytest.mark.long
def test_a_step_is_measured_beside_open_clips(tmp_path: Path) -> None:
    script = ROOT / "experiments/speed/against_open_clip.py"
    args = merge_args(*FEW, "parts=[step]", "json=found.json", "micro_batch_size=8")
    result = run_python(str(script), *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "found.json").read_text())["step"]
    ours, theirs = (report["rounds"][side][0]["samples_per_s"] for side in ("clipx", "open_clip"))
    assert report["ratio_samples_per_s"] == pytest.approx(ours / theirs) and report["memory"] > 0

    result = run_python(str(script), *merge_args(*FEW, "parts=[loader]", "seconds=0.1"), cwd=tmp_path)
    assert result.returncode == 1 and "open_clip reads shards; give data=shards data.root=DIR" in result.stderr


def test_each_part_of_each_step_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    args = [arg for arg in FEW if not arg.startswith(("rounds", "steps"))]
    steps = measure.StepBenchmark(compose_config(*args, "workers=0"))
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=itertools.count().__next__))  # 1 s a call
    shares = steps.shares(3)
    assert shares.pop("backward") == pytest.approx(2 / 8)  # its two parts: before and after the loss
    assert list(shares.values()) == pytest.approx([1 / 8] * 6)


def test_flops_are_those_of_the_matrix_products(bench: Callable[..., None], tmp_path: Path) -> None:
    bench(*FEW, "parts=[step]", "json=found.json")
    report = json.loads((tmp_path / "found.json").read_text())["step"]
    # the block: query and MLP of the class token only, keys and values of all tokens;
    # backward costs twice the forward, except for the patch embedding, whose input needs no gradient
    D, L = 192, 17
    image = 2 * (3 * 64 * D * (L - 1) + 2 * D * D * L + 10 * D * D + D * D)
    assert 2 * image < report["flops_per_sample"] < 3 * image * 1.5


def test_the_loader_is_measured_alone(bench: Callable[..., None], tmp_path: Path) -> None:
    bench(*FEW[:5], "rounds=2", "seconds=0.2", "parts=[loader]", "json=found.json", "data.samples=300")
    report = json.loads((tmp_path / "found.json").read_text())["loader"]
    assert set(report["stages"]) == {"bytes", "read", "decode", "augment", "tokenise", "collate"}
    assert len(report["rounds"]) == 2 and report["rounds"][0]["pictures_per_s"] > 0


@pytest.mark.parametrize(
    ("shares", "loader", "message"),
    [
        ({"wait": 0.38, "optimiser": 0.1}, 50.0, "loader-bound: the device waits 38% of the time; use workers=5"),
        ({"wait": 0.38, "optimiser": 0.1}, 10.0, "it would take workers=21, more than the 8 cores: make the pictures"),
        ({"wait": 0.01, "optimiser": 0.4}, 50.0, "optimiser-bound: it takes 40 % of the time; a larger batch_size"),
        ({"wait": 0.01, "optimiser": 0.1}, 50.0, "compute-bound; try compile=true"),
    ],
)
def test_the_bottleneck_is_named_with_a_remedy(
    shares: dict[str, float],
    loader: float,
    message: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clipx.tools.bench.available_cores", lambda: 8)
    report = {
        "step": {"shares": shares, "rounds": [{"samples_per_s": 200.0}]},
        "loader": {"rounds": [{"pictures_per_s": loader}]},
    }
    with caplog.at_level(logging.INFO, "clipx"):
        report_bound(compose_config("workers=1", "device=cpu"), report)
    assert message in caplog.text


@pytest.mark.long
def test_fifty_losses_are_those_of_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same initial weights, same batches, learning rate 5e-4."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments/speed"))
    curves = importlib.import_module("curves")
    ours, theirs = curves.losses(compose_config("batch_size=32", "workers=0", "optim.lr=5e-4"), 50)
    assert ours[-1] < ours[0] - 0.05  # the model does learn
    assert max(abs(a - b) for a, b in zip(ours[:10], theirs[:10], strict=True)) < 1e-4
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-2
