"""``init_from={image: WEIGHTS}``: one tower, or each, from weights of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from conftest import FEW, lines
from peers import peer, perturb
from safetensors.torch import save_file
from torch import Tensor

from clipx.weights import checkpoint

RUN = (*FEW, "model.text.width=128", "model.text.heads=2", "evals=[]", "max_steps=1", "freeze=[image,text]")


@pytest.fixture(autouse=True)
def weights(tmp_path: Path) -> None:
    model = peer()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    perturb(model)
    (tmp_path / "lr=1").mkdir()
    torch.save(model.state_dict(), tmp_path / "lr=1/v.pt")


def state(tmp_path: Path, name: str = "x") -> dict[str, Tensor]:
    return checkpoint.read(tmp_path / f"outputs/{name}/checkpoints/clip_last.pt")["model_state_dict"]


def origins(tmp_path: Path, train: Callable[..., None], *args: str) -> dict[str, str]:
    """Where the towers and the temperature of a run come from: w.pt, v.pt or the seed."""
    train(*RUN, *args, "name=x", "optim.lr=1e-9")
    train(*RUN, "name=fresh", "optim.lr=1e-9")
    sources = {
        "w": torch.load(tmp_path / "w.pt"),
        "v": torch.load(tmp_path / "lr=1/v.pt"),
        "new": state(tmp_path, "fresh"),
    }
    found = state(tmp_path)
    parts = {
        "image": [name for name in found if name.startswith("visual.")],
        "text": [name for name in found if not name.startswith("visual.") and name != "logit_scale"],
    }
    assert torch.equal(found["logit_scale"], sources["new"]["logit_scale"])
    return {
        part: source
        for part, names in parts.items()
        for source, own in sources.items()
        if all(torch.equal(found[name], own[name]) for name in names)
    }


@pytest.mark.parametrize(
    ("args", "expected", "log"),
    [
        (["init_from={image:w.pt}"], {"image": "w", "text": "new"}, "from w.pt (image tower)"),
        (["init_from={ text: w.pt }"], {"image": "new", "text": "w"}, "from w.pt (text tower)"),
        (["init_from.image=w.pt"], {"image": "w", "text": "new"}, "from w.pt (image tower)"),
        (
            ["init_from={image:w.pt,text:lr=1/v.pt}"],
            {"image": "w", "text": "v"},
            "from w.pt (image tower); from lr=1/v.pt (text tower)",
        ),
        (
            ["init_from.image=w.pt", "init_from.text=lr=1/v.pt"],
            {"image": "w", "text": "v"},
            "from w.pt (image tower); from lr=1/v.pt (text tower)",
        ),
    ],
)
def test_a_tower_starts_from_its_weights_and_the_rest_is_new(
    train: Callable[..., None], tmp_path: Path, args: list[str], expected: dict[str, str], log: str
) -> None:
    assert origins(tmp_path, train, *args) == expected
    assert f"weights   {log}\n" in (tmp_path / "outputs/x/train.log").read_text()


def test_a_run_is_named_after_the_weights_of_a_tower_as_after_any_key(
    train: Callable[..., None], tmp_path: Path
) -> None:
    train(*RUN, "init_from.image=w.pt")
    (directory,) = (tmp_path / "outputs").iterdir()
    assert ",init_from.image=w.pt," in directory.name and "+" not in directory.name


def test_pretrained_weights_serve_the_tower_that_is_not_named(train: Callable[..., None], tmp_path: Path) -> None:
    trunk = timm.create_model("test_vit")
    trunk_file = tmp_path / "trunk.safetensors"
    save_file(trunk.state_dict(), trunk_file)
    text = [arg for arg in RUN if not arg.startswith("model.image.")]
    run = [
        *text, "model=timm_b16", "model.image.name=test_vit", "model.image.embed=192",
        "model.image.pretrained=trunk.safetensors",
    ]  # fmt: skip
    train(*run, "init_from={text:w.pt}", "name=x")
    log = (tmp_path / "outputs/x/train.log").read_text()
    assert "weights   of the image tower from trunk.safetensors; from w.pt (text tower)\n" in log
    found, given = state(tmp_path), torch.load(tmp_path / "w.pt")
    assert torch.equal(found["text_projection"], given["text_projection"])
    assert torch.equal(found["visual.trunk.cls_token"], trunk.state_dict()["cls_token"])
    trunk_file.unlink()
    train(*run, "init_from={image:outputs/x}", "name=y")  # does not read the file
    assert torch.equal(state(tmp_path, "y")["visual.trunk.cls_token"], trunk.state_dict()["cls_token"])


def test_the_other_tower_may_have_another_size(train: Callable[..., None], tmp_path: Path) -> None:
    small = ["model.text.width=32", "model.text.heads=1", "model.text.context=40", "model.image.size=48"]
    train(*RUN, *small, "init_from={image:w.pt}", "name=x")
    found, given = state(tmp_path), torch.load(tmp_path / "w.pt")
    assert torch.equal(found["visual.proj"], given["visual.proj"]) and found["text_projection"].shape == (32, 192)
    log = (tmp_path / "outputs/x/train.log").read_text()
    assert "from w.pt (image tower); position embeddings of pictures resized from 4 x 4 to 6 x 6 patches\n" in log


def test_a_resumed_run_reads_its_own_checkpoint_and_the_weights_are_part_of_its_meaning(
    train: Callable[..., None], fails: Callable[..., str], tmp_path: Path
) -> None:
    args = [*RUN, "max_steps=2", "name=x"]
    train(*args, "init_from={image:w.pt}", "stop_at=1")
    (tmp_path / "w.pt").unlink()
    train(*args, "init_from.image=w.pt")
    assert [row["step"] for row in lines(tmp_path / "outputs/x") if "train/loss" in row] == [1, 2]
    assert "init_from.image: 'w.pt' -> 'lr=1/v.pt'" in fails(*args, "init_from={image:lr=1/v.pt}")
    assert "init_from.image: 'w.pt' -> None" in fails(*args)
    assert "init_from: None -> 'lr=1/v.pt'" in fails(*args, "init_from=lr=1/v.pt")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["init_from={image:none.pt}"],
            "init_from.image=none.pt: there is no such run, checkpoint or weights; there is w.pt",
        ),
        (["init_from={vision:w.pt}"], "init_from={'vision': 'w.pt'}: should be a valid string or 'image' or 'text'"),
        (
            ["init_from={image:w.pt}", "model.image.embed=64"],
            "init_from.image=w.pt does not fit: visual.proj is 192 x 192 in the weights and 192 x 64 in the model; "
            "model.image.embed=192 fits",
        ),
        (
            ["init_from={text:w.pt}", "model.image.embed=64"],
            "init_from.text=w.pt does not fit: text_projection is 128 x 192 in the weights and 128 x 64 in the model; "
            "model.image.embed=192 fits",
        ),
        (
            ["init_from={image:w.pt,text:small.pt}"],
            "init_from.image=w.pt has an embedding of 192 numbers and init_from.text=small.pt one of 64, but the "
            "towers share one space; leave one out",
        ),
    ],
)
def test_a_mistake_names_the_key(fails: Callable[..., str], tmp_path: Path, args: list[str], message: str) -> None:
    if "small.pt" in message:
        torch.save(
            {**peer().state_dict(), "visual.proj": torch.ones(192, 64), "text_projection": torch.ones(128, 64)},
            "small.pt",
        )
    assert fails(*RUN, *args, "name=x") == message
    assert not (tmp_path / "outputs").exists()


def test_check_reports_it(check: Callable[..., tuple[str, int]]) -> None:
    output, code = check(*RUN, "init_from={image:w.pt}", "name=x")
    assert "from w.pt (image tower)" in output and code == 0
    output, code = check(*RUN, "init_from={image:w.pt}", "model.image.embed=64", "name=x")
    assert "WRONG run       init_from.image=w.pt does not fit" in output and code == 1
