import importlib.util
import itertools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, once
from hydra import compose, initialize_config_module

from clipx import measure
from clipx.bench import tell_bound
from clipx.config import Train, resolve

FEW = ("data=dummy", "data.samples=80", "data.val_samples=4", "batch_size=16", "workers=1", "rounds=1", "steps=2",
       "model.image.depth=1", "model.text.depth=1")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    from clipx.bench import main

    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["clipx.bench", *once(*words)])
        main()

    return run


def config_of(*words: str) -> Train:
    with initialize_config_module("clipx.conf", version_base="1.3"):
        return resolve(compose("train", list(words)))


def test_a_step_is_measured_beside_open_clips(
    bench: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(*FEW, "parts=[step]", "vs=open_clip", "json=found.json", "trace=true", "micro_batch_size=8", "name=x")
    found = json.loads((tmp_path / "found.json").read_text())["step"]
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert all(found["shares"][part] > 0 for part in ("wait", "image tower", "text tower", "loss", "backward"))
    ours, theirs = (found["rounds"][side][0]["samples_per_s"] for side in ("clipx", "open_clip"))
    assert found["ratio_samples_per_s"] == pytest.approx(ours / theirs) and found["memory"] > 0
    assert list((tmp_path / "outputs/x/trace").glob("*.pt.trace.json"))
    told = capsys.readouterr().err
    assert "samples/s on batches in memory, peak" in told and "GFLOP a sample" in told and "bound     " in told


def test_each_part_of_each_step_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [word for word in FEW if not word.startswith(("rounds", "steps"))]
    steps = measure.Steps(config_of(*few, "workers=0"))
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=itertools.count().__next__))  # a second a look
    shares = steps.shares(3)
    assert shares.pop("backward") == pytest.approx(2 / 8)           # before the loss and behind it
    assert list(shares.values()) == pytest.approx([1 / 8] * 6)


def test_flops_are_those_of_the_matrix_products(bench: Callable[..., None], tmp_path: Path) -> None:
    bench(*FEW, "parts=[step]", "json=found.json")
    found = json.loads((tmp_path / "found.json").read_text())["step"]
    # the class token's query and MLP, keys and values of all; forward once, back twice (the first product once)
    D, L = 192, 17
    image = 2 * (3 * 64 * D * (L - 1) + 2 * D * D * L + 10 * D * D + D * D)
    assert 2 * image < found["flops_per_sample"] < 3 * image * 1.5


def test_the_loader_is_measured_alone(bench: Callable[..., None], tmp_path: Path) -> None:
    bench(*FEW[:5], "rounds=2", "seconds=0.2", "parts=[loader]", "json=found.json", "data.samples=300")
    found = json.loads((tmp_path / "found.json").read_text())["loader"]
    assert set(found["stages"]) == {"bytes", "read", "decode", "augment", "tokenise", "collate"}
    assert len(found["rounds"]["clipx"]) == 2 and found["rounds"]["clipx"][0]["pictures_per_s"] > 0


def test_what_the_peer_cannot_read_is_told(bench: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match=r"vs=open_clip reads shards; give data=shards .*, or parts=\[step\]"):
        bench(*FEW, "parts=[loader]", "vs=open_clip", "seconds=0.1", "data.samples=300")


@pytest.mark.parametrize(
    ("shares", "loader", "told"),
    [
        ({"wait": 0.38, "optimiser": 0.1}, 50.0, "loader-bound: the device waits 38% of the time; workers=5 would do"),
        ({"wait": 0.38, "optimiser": 0.1}, 10.0, "workers=21 would do, but there are 8 cores: pack the pictures small"),
        ({"wait": 0.01, "optimiser": 0.4}, 50.0, "optimiser-bound: it takes 40 % of the time; a larger batch_size"),
        ({"wait": 0.01, "optimiser": 0.1}, 50.0, "compute-bound; try compile=true"),
    ],
)
def test_what_bounds_a_run_is_told_with_the_remedy(
    shares: dict[str, float], loader: float, told: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clipx.cores.usable_cores", lambda: 8)
    found = {
        "step": {"shares": shares, "rounds": {"clipx": [{"samples_per_s": 200.0}]}},
        "loader": {"rounds": {"clipx": [{"pictures_per_s": loader}]}},
    }
    with caplog.at_level(logging.INFO, "clipx"):
        tell_bound(config_of("workers=1", "device=cpu"), found)
    assert told in caplog.text


def test_fifty_losses_are_those_of_open_clip() -> None:
    """The same weights at the start, the same batches, learning rate 5e-4."""
    spec = importlib.util.spec_from_file_location("curves", ROOT / "experiments/speed/curves.py")
    curves = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(curves)
    ours, theirs = curves.losses(config_of("batch_size=32", "workers=0", "optim.lr=5e-4"), 50)
    assert ours[-1] < ours[0] - 0.05          # it does learn
    assert max(abs(a - b) for a, b in zip(ours[:10], theirs[:10], strict=True)) < 1e-4
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-2
