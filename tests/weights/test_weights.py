"""Loading, fine-tuning and freezing the weights of other projects, compared with open_clip and transformers."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from conftest import FEW, merge_args, run_ranks
from gradients import CPU, Double, assert_close, chunks_of
from open_clip.model import resize_pos_embed
from peers import PIXELS, SIZES, padded, peer, perturb, real_batch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from clipx import load
from clipx.data.emoji import open_emoji
from clipx.data.images import decode
from clipx.loss import clip_loss
from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.training.batch import split_micro_batches
from clipx.training.compile import CompiledModel
from clipx.training.loop import gradient_norms
from clipx.training.step import backward
from clipx.weights import checkpoint
from clipx.weights.archive import CheckpointError
from clipx.weights.convert import model_node, to_hugging_face
from clipx.weights.load import initialise

ONE_STEP = (
    *FEW,
    "model.text.width=128",
    "model.text.heads=2",
    "evals=[]",
    "max_steps=1",
    "optim.lr=0.01",
    "sched.warmup=0",
    "name=x",
)


def assert_same_features(path: object, other: nn.Module, act: str | None = None, size: int = 32) -> CLIP:
    model, transform, tokenizer = load(path, act=act)
    image, tokens = real_batch(size)
    with torch.no_grad():
        for ours, theirs in (
            (model.encode_image(image), other.encode_image(image)),
            (model.encode_text(tokens), other.encode_text(padded(tokens))),
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert model.visual.size == size and tokenizer.context == 77 and not model.training
    return model


class Holder(nn.Module):
    """A scriptable module whose children give the parameters their names."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return x


def openai_archive(state: dict[str, Tensor], path: Path) -> Path:
    """A file like OpenAI's: fp16, TorchScript, with three additional keys."""
    root = Holder()
    for name, value in state.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Holder())
            module = module._modules[parent]
        module.register_parameter(last, nn.Parameter(value.half()))
    for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49_408)):
        root.register_buffer(name, torch.tensor(number))
    torch.jit.script(root).save(path)
    return path


def open_clip_directory(path: Path, model: nn.Module, quick_gelu: bool = True, **change: object) -> Path:
    path.mkdir()
    config, pixels = {**SIZES, "quick_gelu": quick_gelu, **change.pop("config", {})}, {**PIXELS, **change}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    save_file(dict(model.state_dict()), path / "open_clip_model.safetensors")
    return path


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["bare", "wrapped", "safetensors", "custom text", "half"])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_state_dict_of_open_clip_is_the_same_model(tmp_path: Path, kind: str, act: str) -> None:
    model, path = peer(act == "quick_gelu", custom=kind == "custom text"), tmp_path / "weights.pt"
    if kind == "half":
        model = model.half().float()
    state = dict(model.state_dict())
    if kind == "safetensors":
        save_file(state, path := path.with_suffix(".safetensors"))
    elif kind == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        torch.save({name: value.half() for name, value in state.items()} if kind == "half" else state, path)
    loaded = assert_same_features(path, model, act).state_dict()
    assert all(torch.equal(loaded[name.removeprefix("text.")], value) for name, value in state.items())


def rename(state: dict[str, Tensor], prefix: str, inside: str = "") -> dict[str, Tensor]:
    return {prefix + name.replace(".attn.", f".attn.{inside}"): value for name, value in state.items()}


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], dict[str, object]]] = {
    "Lightning": lambda state: {"state_dict": rename(state, "model."), "epoch": 3, "loops": {}},
    "FSDP": lambda state: rename(state, "_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
    "checkpointed blocks": lambda state: rename(state, "", "_checkpoint_wrapped_module."),
    "DDP around compile": lambda state: {"model": rename(state, "module._orig_mod.")},
    "DeepSpeed": lambda state: {"module": rename(state, "module.")},
    "a tutorial": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 3},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3), **rename(state, "module.")},
    "an average next to the weights": lambda state: {"ema_state_dict": rename(state, "", "x."), "state_dict": state},
    "one value of one dimension": lambda state: {**state, "logit_scale": state["logit_scale"][None]},
    "custom text": lambda state: {
        "model": {
            f"model.{'' if name.startswith(('visual', 'logit')) else 'text.'}{name}": state[name] for name in state
        }
    },
    "Hugging Face": lambda state: {"state_dict": rename(to_hugging_face(state), "clip.")},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_a_trainer_wraps_around_weights_is_dropped(tmp_path: Path, wrapper: str) -> None:
    state = peer().state_dict()
    torch.save(WRAPPERS[wrapper](dict(state)), tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", act="quick_gelu")[0].state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_an_average_is_used_and_named_where_there_is_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = peer().state_dict()
    torch.save({"ema_state_dict": rename(state, "module.")}, tmp_path / "w.pt")
    with caplog.at_level("INFO", "clipx"):
        loaded = load(tmp_path / "w.pt", act="quick_gelu")[0].state_dict()
    assert torch.equal(loaded["visual.proj"], state["visual.proj"])
    assert "w.pt has only a moving average of the weights, ema_state_dict, which is used" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ours", [True, False])
def test_weights_that_are_not_finite_are_refused_by_the_name_of_the_tensor(
    tmp_path: Path, value: float, ours: bool
) -> None:
    state = {name: tensor.clone() for name, tensor in peer().state_dict().items()}
    state["visual.proj"][1, 2:4] = value
    model = {"model": {"_target_": "clipx.models.clip.CLIP"}}
    content = {"model_state_dict": state, "config": model} if ours else state
    (checkpoint.save if ours else lambda path, content: torch.save(content, path))(tmp_path / "w.pt", content)
    with pytest.raises(CheckpointError, match=r"w\.pt: 2 of the 36,864 values of visual\.proj are NaN or infinite"):
        load(tmp_path / "w.pt", act="quick_gelu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_openais_archive_is_read_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peer().half().float()
    path = openai_archive(model.state_dict(), tmp_path / "ViT.pt")
    scripted = torch.jit.load(path).state_dict()
    assert scripted["visual.proj"].dtype == torch.float16 and "input_resolution" in scripted
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("its code was loaded"))
    actual = assert_same_features(path, model).state_dict()
    assert all(torch.equal(actual[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_directory_of_hugging_face_is_the_same_model(tmp_path: Path, act: str) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "hidden_act": act,
        },
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "hidden_act": act,
        },
        projection_dim=96,
    )
    other = transformers.CLIPModel(config).eval()
    perturb(other)
    other.save_pretrained(tmp_path / "hf")
    model, _, _ = load(tmp_path / "hf")
    assert model_node(model)["image"]["heads"] == 2 and model_node(model)["text"]["heads"] == 4
    image, tokens = real_batch(64)
    with torch.no_grad():
        output = other(input_ids=tokens, pixel_values=image)
        torch.testing.assert_close(model.encode_image(image, True), output.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_text(tokens, True), output.text_embeds, atol=1e-5, rtol=0)
        assert model.logit_scale == other.logit_scale


def test_a_directory_of_open_clip_says_its_heads_and_its_activation(tmp_path: Path) -> None:
    model = peer(False, head_width=32)
    vision = {"vision_cfg": {**SIZES["vision_cfg"], "head_width": 32}}
    loaded = assert_same_features(open_clip_directory(tmp_path / "oc", model, False, config=vision), model)
    assert loaded.visual.heads == 6 and loaded.text.act == "gelu"


def test_what_open_clip_has_cached_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, home = peer(), tmp_path / ".cache" / "clip"
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, quick in (("tiny-quickgelu", True), ("tiny", False)):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**SIZES, "quick_gelu": quick})
        monkeypatch.setitem(
            open_clip.pretrained._PRETRAINED,
            name,
            {"openai": open_clip.pretrained._pcfg(url="https://host/tiny.pt", quick_gelu=True)},
        )
    with pytest.raises(CheckpointError, match=r"is not on this machine; python -c \"import open_clip; .* downloads it"):
        load("open_clip:tiny-quickgelu/openai")
    home.mkdir(parents=True)
    torch.save(model.state_dict(), home / "tiny.pt")
    assert_same_features("open_clip:tiny-quickgelu/openai", model)
    with pytest.raises(CheckpointError, match="another activation than tiny; use open_clip:tiny-quickgelu/openai"):
        load("open_clip:tiny/openai")
    with pytest.raises(CheckpointError, match="open_clip:tiny/none: open_clip has no such weights; tiny: openai"):
        load("open_clip:tiny/none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": None}, "w.pt does not say its activation; add act=quick_gelu for OpenAI's weights"),
        ({"drop": "visual.proj"}, "w.pt holds another kind of model than CLIP with a Vision Transformer: 'visual.p"),
        ({"drop": "ln_final.bias"}, "w.pt does not fit: ln_final.bias is missing in the weights and 128 in the model"),
        ({"add": {"logit_sum": torch.ones(())}}, "logit_sum is one number in the weights and missing in the model"),
        ({"add": {"epoch": 3}}, "w.pt holds no state dict: expected names and tensors, or these under state_dict"),
        ({"add": {"x": argparse.Namespace()}}, "w.pt is not a checkpoint of tensors alone: it holds objects (arg"),
        ({"file": b"PK\3\4"}, "w.pt is not a checkpoint: it is cut short, or another kind of file"),
        ({"path": "no.pt"}, "no.pt: there is no such checkpoint"),
        ({"path": "."}, "clip_last.pt: there is no such checkpoint"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {**peer().state_dict(), **change.get("add", {})}
    state.pop(change.get("drop"), None)
    torch.save(state, "w.pt")
    if "file" in change:
        Path("w.pt").write_bytes(change["file"])
    with pytest.raises(CheckpointError) as error:
        load(change.get("path", "w.pt"), act=change.get("act", "quick_gelu"))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"config": {"vision_cfg": {**SIZES["vision_cfg"], "pool_type": "avg"}}}, "vision_cfg.pool_type='avg' is not "),
        ({"config": {"text_cfg": {**SIZES["text_cfg"], "no_causal_mask": True}}}, "text_cfg.no_causal_mask=True is n"),
        ({"config": {"vision_cfg": {**SIZES["vision_cfg"], "head_width": 400}}}, "model.image.heads=0 does not"),
        ({"config": {"text_cfg": {**SIZES["text_cfg"], "heads": 3}}}, "model.text.heads=3 does not divide width=12"),
        (
            {"interpolation": "lanczos"},
            "interpolation=lanczos; clipx supports bicubic and bilinear",
        ),
        (
            {"resize_mode": "squash"},
            "prepared with resize_mode=squash; clipx supports shortest",
        ),
    ],
)
def test_another_architecture_of_open_clip_is_refused(tmp_path: Path, config: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(open_clip_directory(tmp_path / "oc", peer(), **config))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": {"hidden_act": "silu"}}, "vision_config has hidden_act='silu' and layer_norm_eps=1e-05"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "text_config has hidden_act='quick_gelu' and layer_norm_eps=1e-06"),
        ({"text_config": {"eos_token_id": 7}}, "text_config.eos_token_id=7; clipx reads a caption's feature"),
        ({"pixels": {"resample": 1}}, "was trained on pictures prepared with interpolation=lanczos"),
        ({"drop": "text_model.encoder.layers.0.self_attn.k_proj.bias"}, "there is no k_proj or v_proj"),
        ({"add": "vision_model.head.attention.in_proj_bias"}, "vision_model.head.attention.in_proj_bias is not"),
        ({"config": "{"}, "config.json cannot be read: Expecting property name"),
    ],
)
def test_another_architecture_of_hugging_face_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    state = to_hugging_face(peer().state_dict())
    state.pop(change.get("drop"), None)
    state |= {change["add"]: torch.ones(3)} if "add" in change else {}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(change.get("config", json.dumps(change)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(change.get("pixels", {})))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("open_clip_config.json", {}, "model_cfg: field required"),
        ("open_clip_config.json", [], "its content: input should be a valid dictionary"),
        ("open_clip_config.json", {"model_cfg": {"text_cfg": {}}}, "model_cfg.vision_cfg: field required"),
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": 3, "text_cfg": {}}},
         "model_cfg.vision_cfg: input should be a valid dictionary"),
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"head_width": 0}, "text_cfg": {}}},
         "model_cfg.vision_cfg.head_width: input should be greater than 0"),
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": {}, "text_cfg": {"heads": "8"}}},
         "model_cfg.text_cfg.heads: input should be a valid integer"),
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {"mean": "x"}},
         "preprocess_cfg.mean"),
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {"std": [1, 1]}},
         "preprocess_cfg.std"),
        ("config.json", {"vision_config": "x"}, "vision_config: input should be a valid dictionary"),
        ("config.json", {"text_config": {"hidden_act": ["gelu"]}}, "text_config.hidden_act: input should be a valid s"),
        ("preprocessor_config.json", {"image_mean": {"r": 1}}, "image_mean"),
    ],
)  # fmt: skip
def test_a_config_of_another_project_that_is_odd_is_one_line(
    tmp_path: Path, file: str, content: object, message: str
) -> None:
    state = dict(peer().state_dict())
    save_file(state, tmp_path / "open_clip_model.safetensors")
    save_file(to_hugging_face(state), tmp_path / "model.safetensors")
    if file != "open_clip_config.json":
        (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert message in str(error.value) and file in str(error.value) and "\n" not in str(error.value)


HALF = [0.5, 0.5, 0.5]


def test_pictures_are_prepared_as_those_that_the_weights_were_trained_on(tmp_path: Path) -> None:
    directory = open_clip_directory(tmp_path / "oc", peer(), mean=HALF, std=0.25, interpolation="bilinear")
    save_file(to_hugging_face(peer().state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    keys = {"image_mean": HALF, "image_std": [0.25] * 3, "resample": Image.Resampling.BILINEAR}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(keys))
    picture = decode(open_emoji().train.read(0).picture)
    expected = open_clip.image_transform(32, is_train=False, mean=HALF, std=[0.25] * 3, interpolation="bilinear")
    for path in (directory, tmp_path):
        model, transform, _ = load(path)
        assert model.visual.preprocessing == (32, tuple(HALF), (0.25,) * 3, "bilinear")
        torch.testing.assert_close(transform(picture), expected(picture))


def test_a_run_and_its_weights_have_to_prepare_pictures_alike(
    train: Callable[..., None], fails: Callable[..., str], tmp_path: Path
) -> None:
    open_clip_directory(tmp_path / "oc", peer(), mean=HALF)
    fix = "model.image.mean=[0.5,0.5,0.5]"
    assert f"was trained with other settings of the same shapes; {fix} fits" in fails(*ONE_STEP, "init_from=oc")
    train(*ONE_STEP, "init_from=oc", fix)
    assert load(tmp_path / "outputs/x")[0].visual.preprocessing.mean == tuple(HALF)


def test_an_activation_that_contradicts_the_weights_is_an_error(tmp_path: Path) -> None:
    path = open_clip_directory(tmp_path / "oc", peer())
    with pytest.raises(CheckpointError, match="^act=gelu, but .*oc was trained with act=quick_gelu"):
        load(path, act="gelu")


# ---------------------------------------------------------------- fine-tuning


def trained(tmp_path: Path) -> dict[str, object]:
    return checkpoint.read(tmp_path / "outputs/x/checkpoints/clip_last.pt")


@pytest.mark.parametrize("freeze", ["[image]", "[text]", "[image,text]"])
def test_a_run_starts_from_weights_and_leaves_frozen_towers_as_they_are(
    train: Callable[..., None], tmp_path: Path, freeze: str
) -> None:
    model = peer()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    train(*ONE_STEP, "init_from=w.pt", f"freeze={freeze}", "micro_batch_size=6", "clip_norm=1.0")
    saved, moved = trained(tmp_path), set()
    for name, value in model.state_dict().items():
        if not torch.equal(saved["model_state_dict"][name], value):
            moved.add("image" if name.startswith("visual.") else "scale" if name == "logit_scale" else "text")
    assert moved == {"image", "text", "scale"} - set(freeze.strip("[]").split(","))
    num_trained = sum(len(group["params"]) for group in saved["optimizer"]["param_groups"])
    assert len(saved["optimizer"]["state"]) == num_trained < len(model.state_dict())
    assert "weights   from w.pt" in (tmp_path / "outputs/x/train.log").read_text()


def test_with_a_low_rate_a_tower_moves_less(train: Callable[..., None], tmp_path: Path) -> None:
    model = peer()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    train(*ONE_STEP, "init_from=w.pt", "optim.image_lr_scale=0.01", "optim.weight_decay=0")
    weights = trained(tmp_path)["model_state_dict"]
    moved = {
        name: (weights[name] - model.state_dict()[name]).abs().max().item()
        for name in ("visual.proj", "text_projection")
    }
    assert moved["visual.proj"] == pytest.approx(0.01 * moved["text_projection"], rel=0.05)


def test_on_resume_the_checkpoint_wins_over_init_from(
    train: Callable[..., None], fails: Callable[..., str], tmp_path: Path
) -> None:
    torch.save(peer().state_dict(), tmp_path / "w.pt")
    args = [*(arg for arg in ONE_STEP if not arg.startswith("max_steps")), "max_steps=3", "init_from=w.pt"]
    train(*args, "stop_at=1")
    before = trained(tmp_path)
    (tmp_path / "w.pt").unlink()
    train(*args)
    assert before["step"] == 1 and trained(tmp_path)["step"] == 3
    assert fails(*args[:-1], "init_from=null").partition("(")[2].startswith("init_from: 'w.pt' -> None)")
    assert fails(*args, "name=y").startswith("init_from=w.pt: there is no such run, checkpoint or weights")


def test_a_run_starts_from_another_run(train: Callable[..., None], tmp_path: Path) -> None:
    train(*ONE_STEP)
    before = trained(tmp_path)["model_state_dict"]
    train(*ONE_STEP, "init_from=outputs/x", "name=y", "freeze=[image,text]")
    after = checkpoint.read(tmp_path / "outputs/y/checkpoints/clip_last.pt")["model_state_dict"]
    assert all(torch.equal(after[name], before[name]) for name in before if name != "logit_scale")


def test_a_checkpoint_that_leaves_defaults_out_has_those_of_the_towers(tmp_path: Path) -> None:
    towers = {
        "image": {"_target_": "clipx.models.vision.ImageEncoder", "depth": 1},
        "text": {"_target_": "clipx.models.text.TextEncoder", "depth": 1, "width": 768},
    }
    model = CLIP(ImageEncoder(depth=1), TextEncoder(depth=1, width=768))
    checkpoint.save(
        tmp_path / "x.pt",
        {"model_state_dict": model.state_dict(), "config": {"model": {"_target_": "clipx.models.clip.CLIP", **towers}}},
    )
    assert model_node(load(tmp_path / "x.pt")[0]) == model_node(model)


@pytest.mark.parametrize("size", [16, 64])
def test_position_embeddings_are_resized_as_open_clip_does(
    train: Callable[..., None], tmp_path: Path, size: int
) -> None:
    model = peer()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    train(*ONE_STEP, "init_from=w.pt", "freeze=[image,text]", f"model.image.size={size}", "model.text.context=40")
    weights, expected = trained(tmp_path)["model_state_dict"], dict(model.state_dict())
    resize_pos_embed(expected, peer(image_size=size))
    assert torch.equal(weights["visual.positional_embedding"], expected["visual.positional_embedding"])
    assert torch.equal(weights["positional_embedding"], expected["positional_embedding"][:40])
    log = (tmp_path / "outputs/x/train.log").read_text()
    assert f"from w.pt; position embeddings of pictures resized from 4 x 4 to {size // 8} x {size // 8} patches" in log
    assert "position embeddings of captions truncated from 77 to 40 tokens" in log


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["init_from=w.pt", "model.image.patch=16"],
            "init_from=w.pt does not fit: visual.conv1.weight is 192 x 3 x 8 x 8 in the weights and 192 x 3 x 16 x 16 "
            "in the model; model.image.patch=8 fits",
        ),
        (
            ["init_from=w.pt", "model.text.depth=2"],
            "init_from=w.pt does not fit: transformer.resblocks.1.ln_1.weight is missing in the weights and 128 in "
            "the model; model.text.depth=1 fits",
        ),
        (
            ["init_from=w.pt", "model.image.registers=4"],
            "init_from=w.pt does not fit: visual.register_tokens is missing in the weights and 4 x 192 in the model; "
            "model.image.registers=0 fits",
        ),
        (
            ["init_from=oc", "model.image.layer_scale=0.1"],
            "init_from=oc does not fit: visual.transformer.resblocks.0.ls_1.gamma is missing in the weights and 192 in "
            "the model; model.image.layer_scale=null fits",
        ),
        (
            ["init_from=oc", "model.image.act=gelu"],
            "init_from=oc was trained with other settings of the same shapes; model.image.act=quick_gelu "
            "model.text.act=quick_gelu fits",
        ),
        (
            ["init_from=oc", "model.image.heads=6"],
            "init_from=oc was trained with other settings of the same shapes; model.image.heads=3 fits",
        ),
        (
            ["init_from=nan.pt"],
            "nan.pt: 1 of the 1 values of logit_scale are NaN or infinite; use a checkpoint from before the training "
            "diverged",
        ),
        (
            ["init_from=none.pt"],
            "init_from=none.pt: there is no such run, checkpoint or weights; there are nan.pt, w.pt",
        ),
        (["freeze=[vision]"], "freeze=['vision']: should be 'image' or 'text'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_a_remedy(
    fails: Callable[..., str], tmp_path: Path, args: list[str], message: str
) -> None:
    torch.save(peer().state_dict(), tmp_path / "w.pt")
    torch.save({**peer().state_dict(), "logit_scale": torch.tensor(float("nan"))}, tmp_path / "nan.pt")
    open_clip_directory(tmp_path / "oc", peer())
    assert fails(*ONE_STEP, *args) == message
    assert not (tmp_path / "outputs").exists()


def test_a_run_starts_from_gains_whatever_they_began_with(train: Callable[..., None], tmp_path: Path) -> None:
    train(*ONE_STEP, "model.image.layer_scale=0.2", "name=x")
    train(*ONE_STEP, "model.image.layer_scale=0.1", "name=y", "init_from=outputs/x", "optim.lr=0")
    one, two = (load(tmp_path / "outputs" / name)[0].state_dict() for name in "xy")
    assert torch.equal(
        one["visual.transformer.resblocks.0.ls_1.gamma"], two["visual.transformer.resblocks.0.ls_1.gamma"]
    )


def test_check_reports_weights_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from clipx.check import main

    monkeypatch.chdir(tmp_path)
    torch.save(peer().state_dict(), "w.pt")
    monkeypatch.setattr("sys.argv", ["clipx.check", *merge_args(*ONE_STEP), "init_from=w.pt", "model.image.patch=16"])
    with pytest.raises(SystemExit):
        main()
    assert "WRONG run       init_from=w.pt does not fit" in capsys.readouterr().err


# ---------------------------------------------------------------- frozen towers


def frozen(*towers: str) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(
        ImageEncoder(size=64, patch=32, width=64, depth=2, heads=1, embed=32),
        TextEncoder(width=64, depth=2, heads=1, embed=32),
    ).double()
    for tower in towers:
        getattr(model, {"image": "visual", "text": "text"}[tower]).requires_grad_(False)
    return model


def gradients(forward: nn.Module, clip: CLIP, micro: int | None, rank: int = 0, world: int = 1) -> list[Tensor | None]:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    micro_batches = split_micro_batches(chunks_of(64, micro, rank, world), micro)
    backward(Double(forward, CPU, None), clip_loss, micro_batches, scaler)
    grads = [p.grad for p in clip.parameters()]
    clip.zero_grad()
    return grads


TOWERS = [("image",), ("text",), ("image", "text")]


def assert_frozen(actual: list[Tensor | None], expected: list[Tensor], clip: CLIP) -> None:
    pairs = [*zip(actual, expected, clip.parameters(), strict=True)]
    assert all((gradient is None) != p.requires_grad for gradient, _, p in pairs)
    assert_close(*zip(*[(gradient, full) for gradient, full, _ in pairs if gradient is not None], strict=True))


@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("micro", [None, 24])
def test_what_is_not_frozen_has_the_gradient_that_it_would_have(towers: tuple[str, ...], micro: int | None) -> None:
    plain, clip = frozen(), frozen(*towers)
    assert_frozen(gradients(clip, clip, micro), gradients(plain, plain, None), clip)


def test_the_norm_of_a_frozen_tower_is_0() -> None:
    clip = frozen("image")
    clip_loss(*clip(torch.randn(4, 3, 64, 64).double(), torch.arange(32).view(4, 8))).backward()
    (image, text), total = gradient_norms(clip, nn.Module())
    assert image == 0 < text < total


def ranks_gradients(rank: int, world: int, store: str, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = {}
    for towers in TOWERS:
        clip = frozen(*towers)
        forward = nn.parallel.DistributedDataParallel(clip, gradient_as_bucket_view=True)
        for micro in (None, 12):
            results[towers, micro] = [
                None if g is None else g.clone() for g in gradients(forward, clip, micro, rank, world)
            ]
    torch.save(results, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_with_a_frozen_tower_have_the_gradient_of_one(tmp_path: Path) -> None:
    run_ranks(ranks_gradients, 2, str(tmp_path / "store"), str(tmp_path))
    plain = frozen()
    expected = gradients(plain, plain, None)
    for rank in range(2):
        for (towers, _), actual in torch.load(tmp_path / f"{rank}.pt").items():
            assert_frozen(actual, expected, frozen(*towers))


def test_a_frozen_tower_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    clip = frozen("image")
    plain = gradients(clip, clip, None)
    monkeypatch.setattr(torch, "compile", lambda model, compiled=torch.compile: compiled(model, backend="aot_eager"))
    assert_frozen(gradients(CompiledModel(clip, 0.0), clip, None), plain, clip)


# ---------------------------------------------------------------- full size


@pytest.mark.long
def test_vit_b32_of_open_clip_is_fine_tuned_with_a_locked_image_tower(
    train: Callable[..., None], tmp_path: Path
) -> None:
    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = assert_same_features(tmp_path / "w.pt", model, "quick_gelu", 224)
    other = clip = CLIP(ImageEncoder(), TextEncoder())
    initialise(other, str(tmp_path / "w.pt"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), clip.parameters(), strict=True))
    train(
        "model=vit_b32",
        "experiment=smoke",
        "init_from=w.pt",
        "freeze=[image]",
        "batch_size=8",
        "workers=0",
        "evals=[]",
        "max_steps=1",
        "optim.lr=0.01",
        "sched.warmup=0",
        "name=x",
        "data.samples=40",
    )
    after = trained(tmp_path)["model_state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(after[name], value) == name.startswith("visual."), name
