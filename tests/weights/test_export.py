"""``python -m clipx.export``: round trips through other projects, compared with their own implementations."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from conftest import FEW, command, last_line
from peers import PIXELS, peer, real_batch
from safetensors.torch import load_file

from clipx import load
from clipx.data.emoji import open_emoji
from clipx.data.images import decode
from clipx.models.clip import CLIP
from clipx.weights.convert import model_node

Export = Callable[..., None]


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """``python -m clipx.export ARGUMENTS`` in this process, from an empty directory."""
    return command("export", tmp_path, monkeypatch)


@pytest.fixture
def export_error(export: Export, tmp_path: Path) -> Callable[..., str]:
    """Runs an export that must fail without leaving files, and returns its one-line error message."""

    def run(*args: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        message = last_line(export, *args)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(peer(False).state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


def assert_same(one: CLIP, other: CLIP) -> None:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert model_node(one) == model_node(other)


def test_a_run_goes_to_open_clip_and_back_to_the_bit(
    train: Callable[..., None], export: Export, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(*FEW, "evals=[]", "max_steps=1", "name=x")
    export("run=outputs/x", "to=open_clip", "out=made/oc")
    assert sorted(path.name for path in (tmp_path / "made").rglob("*")) == [
        "oc",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert 'open it with open_clip.create_model_and_transforms("local-dir:made/oc")' in caplog.text
    ours, transform, _ = load("outputs/x")
    assert_same(load("made/oc")[0], ours)
    model, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/made/oc")
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in model.state_dict().items())
    picture = decode(open_emoji().train.read(3).picture)
    torch.testing.assert_close(transform(picture), theirs(picture), atol=1e-6, rtol=0)
    image, _ = real_batch(32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode_image(image), ours.encode_image(image), atol=1e-5, rtol=1e-5)


def test_layer_scale_goes_to_open_clip_and_back_and_registers_stay_here(
    train: Callable[..., None], export: Export, export_error: Callable[..., str], tmp_path: Path
) -> None:
    args = (*FEW, "evals=[]", "max_steps=1", "model.text.layer_scale=0.1")
    train(*args, "model.image.layer_scale=0.2", "name=x")
    export("run=outputs/x", "to=open_clip", "out=oc")
    assert_same(load(tmp_path / "outputs/x")[0], load(tmp_path / "oc")[0])
    other = "to=hf: transformers' CLIPModel has nothing like model.image.layer_scale=0.2"
    assert export_error("run=outputs/x", "to=hf", "out=hf") == other
    train(*args, "model.image.registers=2", "name=y")
    assert load(tmp_path / "outputs/y")[0].visual.register_tokens.shape == (2, 192)
    other = "open_clip has no registers; this model has model.image.registers=2"
    assert export_error("run=outputs/y", "to=open_clip", "out=hf") == other


def test_the_bias_of_a_run_with_the_sigmoid_loss_goes_to_open_clip_and_back(
    train: Callable[..., None],
    export: Export,
    fails: Callable[..., str],
    export_error: Callable[..., str],
    tmp_path: Path,
) -> None:
    train(*FEW, "evals=[]", "max_steps=2", "name=x", "loss=sigmoid", "optim.lr=1e-2")
    export("run=outputs/x", "to=open_clip", "out=oc")
    ours, _, _ = load("outputs/x")
    assert_same(load("oc")[0], ours)
    assert ours.logit_bias.item() != -10.0 and ours.logit_bias.item() == pytest.approx(-10, abs=0.1)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/oc")
    assert torch.equal(model.logit_bias, ours.logit_bias)
    train(*FEW, "evals=[]", "max_steps=1", "name=y", "loss=sigmoid", "init_from=oc", "optim.lr=1e-12")
    assert load("outputs/y")[0].logit_bias.item() == pytest.approx(ours.logit_bias.item())
    message = fails(*FEW, "init_from=oc", "name=z")
    assert message.startswith("init_from=oc does not fit: logit_bias is one number in the weights and missing in the")
    assert message.endswith(f"; model.bias={ours.logit_bias.item():.4g} fits")
    assert "transformers' CLIPModel has no bias of the logits" in export_error("run=outputs/x", "to=hf", "out=hf")


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_weights_go_to_hugging_face_and_back_to_the_bit(
    export: Export, weights: Path, tmp_path: Path, act: str
) -> None:
    export("run=w.pt", f"act={act}", "to=hf", "out=hf")
    ours, transform, tokenizer = load("w.pt", act=act)
    assert_same(load("hf")[0], ours)
    model = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "hf")
    captions = ["A guide dog, isn't it?", "two  raccoons\n& 3 palm trees", "naïve café 导盲犬 🐕", "x" * 400, ""]
    pictures = [decode(open_emoji().train.read(number).picture) for number in range(len(captions))]
    inputs = processor(text=captions, images=pictures, return_tensors="pt", padding="max_length", truncation=True)
    ends = tokenizer(captions).argmax(-1)
    for ids, expected, end in zip(inputs["input_ids"], tokenizer(captions), ends, strict=True):
        assert torch.equal(ids[: end + 1], expected[: end + 1])
    pixels = torch.stack([transform(picture) for picture in pictures])
    assert (inputs["pixel_values"] - pixels).abs().max() < 3 / 255 / min(PIXELS["std"])
    with torch.no_grad():
        output = model(**{**inputs, "pixel_values": pixels})
        torch.testing.assert_close(output.image_embeds, ours.encode_image(pixels, True), atol=1e-5, rtol=0)
        torch.testing.assert_close(output.text_embeds, ours.encode_text(tokenizer(captions), True), atol=1e-5, rtol=0)
    assert (tmp_path / "hf/model.safetensors").stat().st_mode & 0o044  # readable by other users, like the other files


def test_hugging_faces_own_directory_comes_back_with_the_tensors_that_it_had(export: Export, tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 32,
            "patch_size": 16,
        },
        projection_dim=32,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "theirs")
    export("run=theirs", "to=open_clip", "out=oc")
    export("run=oc", "to=hf", "out=hf")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "hf"))
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["to=onnx", "run=w.pt", "out=new"], "to='onnx': should be 'open_clip' or 'hf'"),
        (["to=hf", "out=new"], "run has no value; add run=..."),
        (["to=hf", "run=w.pt", "out=w.pt"], "out=w.pt already exists; name a new directory"),
        (["to=hf", "run=w.pt", "out=w.pt/new", "act=gelu"], "out=w.pt/new cannot be written: File exists"),
        (["to=hf", "run=none", "out=new"], "run=none: there is no such run, checkpoint or weights; there is w.pt"),
        (
            ["to=hf", "run=w.pt", "out=new"],
            "w.pt does not say its activation; add act=quick_gelu for OpenAI's weights "
            "and open_clip's -quickgelu models, act=gelu for open_clip's others",
        ),
        (["too=hf", "run=w.pt", "out=new"], "too: there is no such key; did you mean to?"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    export_error: Callable[..., str], weights: Path, args: list[str], message: str
) -> None:
    assert export_error(*args) == message


def test_what_a_format_cannot_say_is_refused(
    export_error: Callable[..., str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, *rest = load(weights, act="gelu")
    model.text.act = "quick_gelu"
    monkeypatch.setattr("clipx.weights.load.load", lambda *_, **__: (model, *rest))
    message = export_error("run=w.pt", "to=open_clip", "out=new")
    assert message == (
        "open_clip has one activation for both towers; this model has model.image.act=gelu and "
        "model.text.act=quick_gelu"
    )
    model.text.token_embedding.weight = torch.nn.Parameter(torch.zeros(100, 128))
    message = export_error("run=w.pt", "to=hf", "out=new")
    assert message.startswith("model.text.vocab=100 is not that of the tokenizer, 49,408; to=open_clip")


@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_an_export_that_computes_something_else_is_not_made(
    export_error: Callable[..., str], weights: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    def wrong_activation(path: Path, content: dict) -> None:
        text = json.dumps(content).replace('"quick_gelu": false', '"quick_gelu": true')
        path.write_text(text.replace('"hidden_act": "gelu"', '"hidden_act": "quick_gelu"'))

    monkeypatch.setattr("clipx.weights.export.write_json", wrong_activation)
    message = export_error("run=w.pt", f"to={to}", "out=new", "act=gelu")
    assert message.startswith("the features of pictures differ by ") and message.endswith("; nothing is exported")


def test_a_missing_package_is_named(
    export_error: Callable[..., str], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    message = export_error("run=w.pt", "to=hf", "out=new", "act=gelu")
    assert message == 'to=hf needs transformers; install it with: pip install "clipx[hf]"'


@pytest.mark.long
@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_vit_b32_of_open_clip_goes_there_and_back(export: Export, tmp_path: Path, to: str) -> None:
    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), tmp_path / "w.pt")
    export("run=w.pt", "act=quick_gelu", f"to={to}", "out=new")
    assert_same(load("new")[0], load("w.pt", act="quick_gelu")[0])
