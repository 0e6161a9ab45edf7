"""Mixtures of two weights (WiSE-FT), evaluated and exported."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import command, last_line
from labelled_data import class_folders
from peers import peer, perturb, real_batch

from clipx import load
from clipx.errors import UserError
from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.timm import TimmTower
from clipx.weights.export import write_open_clip
from clipx.weights.mix import mixtures

DUMMY = ("data=dummy", "data.val_samples=20", "workers=0", "device=cpu", "act=quick_gelu")
Command = Callable[..., None]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with start.pt and tuned.pt, weights of one model, and others that do not fit."""
    model = peer()
    torch.save(model.state_dict(), tmp_path / "start.pt")
    with torch.no_grad():
        model.logit_scale.fill_(math.log(50))
    perturb(model)
    torch.save(model.state_dict(), tmp_path / "tuned.pt")
    torch.save(peer(width=128).state_dict(), tmp_path / "narrow.pt")
    return tmp_path


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return command("evaluate", tmp_path, monkeypatch)


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return command("export", tmp_path, monkeypatch)


def states(pair: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(pair / f"{name}.pt") for name in ("start", "tuned")]


def test_the_two_ends_have_the_features_of_the_two_weights_to_the_bit(pair: Path) -> None:
    images, tokens = real_batch(32)
    found = {}
    for alpha, model in mixtures(f"{pair}/tuned.pt", f"{pair}/start.pt", [0, 0.3, 1, 0], act="quick_gelu"):
        with torch.no_grad():
            features = (*model(images, tokens),)
        assert all(map(torch.equal, features, found.get(alpha, features)))
        found[alpha] = features
    for alpha, name in ((0, "start"), (1, "tuned")):
        with torch.no_grad():
            expected = load(pair / f"{name}.pt", act="quick_gelu")[0](images, tokens)
        assert all(map(torch.equal, found[alpha], expected))
    assert not torch.equal(found[0.3][0], found[0][0]) and not torch.equal(found[0.3][0], found[1][0])


def test_weights_and_the_logarithm_of_the_temperature_are_mixed_linearly(pair: Path) -> None:
    start, tuned = states(pair)
    _, model = next(mixtures(f"{pair}/tuned.pt", f"{pair}/start.pt", [0.25], act="quick_gelu"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * tuned[name])
    assert model.logit_scale.item() == pytest.approx(0.75 * start["logit_scale"] + 0.25 * tuned["logit_scale"])


def test_each_alpha_has_a_column_of_the_table_and_its_own_numbers(
    pair: Path, evaluate: Command, capsys: pytest.CaptureFixture
) -> None:
    class_folders(pair / "bees")
    both = ("evals=[retrieval,zero_shot]", "labelled={bees:{folder:bees}}", "evals.zero_shot.templates=simple")
    evaluate("run=tuned.pt", "mix=start.pt", "alphas=[0,0.5,1]", *both, *DUMMY)
    table = capsys.readouterr().err.splitlines()[-40:]
    header = next(line for line in table if line.split() == ["alpha=0", "alpha=0.5", "alpha=1"])
    rows = table[table.index(header) + 1 :]
    assert [row.split()[0] for row in rows if not row.startswith(" ")] == ["retrieval@dummy", "zero_shot@bees"]
    assert not any(" to " in row for row in rows)
    mixed = json.loads((pair / "metrics.json").read_text())
    assert list(mixed) == [f"tuned.pt mix=start.pt alpha={alpha}" for alpha in ("0", "0.5", "1")]
    assert (pair / "tuned-alpha=0.5-zero_shot@bees-mistakes.png").is_file()
    evaluate("run=[start.pt,tuned.pt]", *both, *DUMMY)
    alone = json.loads((pair / "metrics.json").read_text())
    assert alone["start.pt"] == mixed["tuned.pt mix=start.pt alpha=0"]
    assert alone["tuned.pt"] == mixed["tuned.pt mix=start.pt alpha=1"]


def test_a_mixture_is_exported(pair: Path, export: Command) -> None:
    for alpha in (0, 0.5, 1):
        export("run=tuned.pt", "mix=start.pt", f"alpha={alpha}", "to=open_clip", f"out=made{alpha}", "act=quick_gelu")
    start, tuned = states(pair)
    for name, value in load(pair / "made0.5")[0].state_dict().items():
        torch.testing.assert_close(value, (start[name] + tuned[name]) / 2)
    for folder, expected in (("made0", start), ("made1", tuned)):
        assert all(torch.equal(value, expected[name]) for name, value in load(pair / folder)[0].state_dict().items())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["alphas=[0,1]"],
            "alphas=[0.0, 1.0] has no effect without the weights to mix; add mix=WEIGHTS, or leave it out",
        ),
        (["mix=start.pt"], "mix=start.pt needs the share of run in the mixture; add alphas=[0,0.25,0.5,0.75,1]"),
        (
            ["mix=start.pt", "alphas=[]"],
            "mix=start.pt needs the share of run in the mixture; add alphas=[0,0.25,0.5,0.75,1]",
        ),
        (["mix=start.pt", "alphas=[0,1.5]"], "alphas=[0, 1.5]: should be less than or equal to 1"),
        (["mix=start.pt", "alphas=[-0.5]"], "alphas=[-0.5]: should be greater than or equal to 0"),
        (
            ["mix=strat.pt", "alphas=[0.5]"],
            "mix=strat.pt: there is no such run, checkpoint or weights; there are start.pt, tuned.pt, narrow.pt",
        ),
        (
            ["mix=start.pt", "alphas=[0.5]", "run=[tuned.pt,start.pt]"],
            "mix=start.pt mixes one run, but run names 2: tuned.pt, start.pt; give one",
        ),
        (
            ["mix=narrow.pt", "alphas=[0.5]"],
            "mix=narrow.pt does not fit: visual.class_embedding is 128 in the weights and 192 in the model of "
            "run=tuned.pt",
        ),
    ],
)
def test_a_mistake_is_one_line(pair: Path, evaluate: Command, args: list[str], message: str) -> None:
    assert last_line(evaluate, "run=tuned.pt", *DUMMY, *args) == message
    assert not (pair / "metrics.json").exists()


def test_weights_of_other_settings_are_refused(pair: Path, evaluate: Command, export: Command) -> None:
    export("run=start.pt", "to=open_clip", "out=oc", "act=quick_gelu")
    config = (pair / "oc/open_clip_config.json").read_text()
    (pair / "oc/open_clip_config.json").write_text(config.replace('"quick_gelu": true', '"quick_gelu": false'))
    message = last_line(export, "run=tuned.pt", "mix=oc", "alpha=0.5", "to=open_clip", "out=new", "act=quick_gelu")
    assert message == "act=quick_gelu, but oc was trained with act=gelu; leave act out"
    export("run=tuned.pt", "to=open_clip", "out=tuned", "act=quick_gelu")
    message = last_line(export, "run=tuned", "mix=oc", "alpha=0.5", "to=open_clip", "out=new")
    assert message == "mix=oc does not fit: model.image.act is gelu in the weights and quick_gelu in run=tuned"


def save_timm(directory: Path, name: str, drop_path: float | None = None) -> CLIP:
    """Write a model with a tower of timm in open_clip's layout."""
    tower = TimmTower(name, embed=16, size=32, drop_path=drop_path)
    model = CLIP(tower, TextEncoder(width=32, depth=1, heads=1, embed=16))
    directory.mkdir()
    write_open_clip(model, directory)
    return model.eval()


def test_towers_of_timm_are_mixed_if_they_are_one_model(tmp_path: Path) -> None:
    start = save_timm(tmp_path / "start", "vit_tiny_patch16_224")
    tuned = save_timm(tmp_path / "tuned", "vit_tiny_patch16_224", drop_path=0.1)  # matters only in training
    other = save_timm(tmp_path / "other", "deit_tiny_patch16_224")
    alphas = [0, 0.5, 1]
    mixed = {
        alpha: model.state_dict()["visual.head.proj.weight"].clone()
        for alpha, model in mixtures(f"{tmp_path}/tuned", f"{tmp_path}/start", alphas)
    }
    ends = [model.state_dict()["visual.head.proj.weight"] for model in (start, tuned)]
    assert torch.equal(mixed[0], ends[0]) and torch.equal(mixed[1], ends[1])
    torch.testing.assert_close(mixed[0.5], sum(ends) / 2)
    assert {*start.state_dict()} == {*other.state_dict()}
    with pytest.raises(UserError) as error:
        next(mixtures(f"{tmp_path}/tuned", f"{tmp_path}/other", alphas))
    assert str(error.value) == (
        f"mix={tmp_path}/other does not fit: model.image.name is deit_tiny_patch16_224 in the weights and "
        f"vit_tiny_patch16_224 in run={tmp_path}/tuned"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["alpha=0.5"], "alpha=0.5 has no effect without the weights to mix; add mix=WEIGHTS, or leave it out"),
        (["mix=start.pt"], "mix=start.pt needs the share of run in the mixture; add alpha=0.5"),
        (["mix=start.pt", "alpha=2"], "alpha=2: should be less than or equal to 1"),
    ],
)
def test_an_export_needs_both_keys(pair: Path, export: Command, args: list[str], message: str) -> None:
    assert last_line(export, "run=tuned.pt", "to=hf", "out=new", *args) == message
    assert not (pair / "new").exists()
