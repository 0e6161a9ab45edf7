import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path

import hydra
import open_clip
import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
import torch.distributed
from conftest import ROOT
from peers import SIZES, padded, perturb, real_batch

import clipx
from clipx.config.instantiate import build
from clipx.config.resolve import resolve
from clipx.config.schema import TrainConfig
from clipx.data.images import Normalise
from clipx.loss import clip_loss
from clipx.models.clip import CLIP, clip_small, clip_vit_b32
from clipx.models.packed import EDGES, pack, unpad
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.tokenizer import SimpleTokenizer, Tokens
from clipx.training.compile import CompiledModel, compile_model
from clipx.training.step import PixelModel


@pytest.fixture(scope="module")
def peer() -> torch.nn.Module:
    model = open_clip.create_model("ViT-B-32-quickgelu")
    perturb(model)
    return model


@pytest.fixture(scope="module")
def ours(peer: torch.nn.Module) -> CLIP:
    model = clip_vit_b32()
    model.load_state_dict(peer.state_dict(), strict=True)
    return model


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_models_have_the_parameters_of_their_papers() -> None:
    assert parameters(clip_vit_b32()) == 151_277_313
    assert parameters(clip_small()) == 29_418_625


def zoo() -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / "model").glob("vit_*.yaml"))


@pytest.mark.parametrize("option", zoo())
def test_a_model_of_the_zoo_is_open_clips_of_that_name(option: str) -> None:
    _, size, *rest = re.fullmatch(r"(vit)_([a-z])(\d+)(.*)", option).groups()
    name = "-".join(["ViT", size.upper(), rest[0], *filter(None, rest[1].split("_"))])
    with hydra.initialize_config_module("clipx.conf", version_base="1.3"):
        node = resolve(hydra.compose("train", [f"model={option}", "model.image.act=gelu"]), TrainConfig).model
    with torch.device("meta"):
        ours, theirs = build(node), open_clip.CLIP(**open_clip.get_model_config(name))
    shapes, expected = ({key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs))
    assert shapes == expected and parameters(ours) == parameters(theirs)
    assert f"{parameters(ours):,} parameters" in (ROOT / f"conf/model/{option}.yaml").read_text()
    assert ours.visual.heads == theirs.visual.transformer.resblocks[0].attn.num_heads
    assert ours.text.heads == theirs.transformer.resblocks[0].attn.num_heads
    assert isinstance(theirs.transformer.resblocks[0].mlp.gelu, type(ours.text.transformer.resblocks[0].mlp.gelu))


def test_open_clip_loads_our_weights_strictly(ours: CLIP) -> None:
    other = open_clip.create_model("ViT-B-32-quickgelu")
    other.load_state_dict(ours.state_dict(), strict=True)
    a, b = other.transformer.resblocks[3], ours.text.transformer.resblocks[3]
    assert torch.equal(a.mlp.c_fc.weight, b.mlp.c_fc.weight)


def test_a_state_dict_loads_back_into_a_model_and_into_one_that_holds_it() -> None:
    model, other = tiny(), tiny()
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    holder, second = torch.nn.Sequential(model), torch.nn.Sequential(tiny())
    assert "0.token_embedding.weight" in holder.state_dict()
    second.load_state_dict(holder.state_dict())
    assert torch.equal(second[0].text.text_projection, model.text.text_projection)


def small_pair(registers: int = 0, layer_scale: float | None = None) -> tuple[CLIP, torch.nn.Module]:
    """Our model and open_clip's with the same weights, registers apart."""
    torch.manual_seed(0)
    config = copy.deepcopy(SIZES)
    for part in ("vision_cfg", "text_cfg"):
        config[part] |= {"layers": 2, "ls_init_value": layer_scale}
    theirs = open_clip.CLIP(**config, quick_gelu=True).eval()
    image = ImageEncoder(32, 8, 192, 2, 3, 192, registers=registers, layer_scale=layer_scale)
    model = CLIP(image, TextEncoder(width=128, depth=2, heads=2, embed=192, layer_scale=layer_scale)).eval()
    assert model.state_dict().keys() - theirs.state_dict().keys() == (
        {"visual.register_tokens"} if registers else set()
    )
    perturb(theirs)
    model.load_state_dict({**model.state_dict(), **theirs.state_dict()})
    return model, theirs


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_layer_scale_is_that_of_open_clip_forward_and_backward(grad_checkpoint: bool) -> None:
    ours, theirs = small_pair(layer_scale=0.3)
    ours.set_grad_checkpoint(grad_checkpoint)
    image, tokens = real_batch(32)
    for model, captions in ((ours, tokens), (theirs, padded(tokens))):
        clip_loss(
            model.encode_image(image, True), model.encode_text(captions, True), model.logit_scale.exp()
        ).backward()
    grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = grads[name.removeprefix("text.")].grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4, msg=name)


def test_registers_are_further_tokens_of_open_clips_transformer() -> None:
    ours, theirs = small_pair(registers=3, layer_scale=0.3)
    image, _ = real_batch(32)
    vision = theirs.visual
    with torch.no_grad():
        x = vision.conv1(image).flatten(2).mT
        x = torch.cat([vision.class_embedding.expand(len(x), 1, -1), x], dim=1) + vision.positional_embedding
        registers = ours.visual.register_tokens.expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # as in DINOv2; attention does not know the order
        expected = vision.ln_post(vision.transformer(vision.ln_pre(x)))[:, 0] @ vision.proj
        torch.testing.assert_close(ours.encode_image(image), expected, atol=1e-5, rtol=1e-5)
    assert any(p is ours.visual.register_tokens for p in ours.visual.stages()[0])


def test_features_equal_those_of_open_clip(ours: CLIP, peer: torch.nn.Module) -> None:
    image, tokens = real_batch(224)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(image), peer.encode_image(image), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.encode_text(tokens), peer.encode_text(padded(tokens)), atol=1e-5, rtol=1e-5)
        unit, expected = ours.encode_text(tokens, True), peer.encode_text(padded(tokens), True)
        torch.testing.assert_close(unit, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(torch.float32, 1e-4, marks=pytest.mark.long), (torch.float64, 1e-10)],
)
def test_loss_and_gradients_equal_those_of_open_clip(
    ours: CLIP, peer: torch.nn.Module, dtype: torch.dtype, tolerance: float
) -> None:
    image, tokens = real_batch(224)
    a, b = copy.deepcopy(ours).to(dtype), copy.deepcopy(peer).to(dtype)
    loss = clip_loss(*a(image.to(dtype), tokens))
    features = b(image.to(dtype), padded(tokens))
    expected = open_clip.ClipLoss()(features[0], features[1], features[2])
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    loss.backward()
    expected.backward()
    theirs = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        expected = theirs[name.removeprefix("text.")].grad
        error = (parameter.grad - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < tolerance, (name, error)


def tiny(context: int = 77) -> CLIP:
    return CLIP(
        ImageEncoder(size=32, patch=8, width=64, depth=2, heads=1, embed=32),
        TextEncoder(context=context, width=64, depth=2, heads=1, embed=32),
    )


def test_text_features_do_not_depend_on_the_padding() -> None:
    model = tiny()
    tokens = SimpleTokenizer()(["a guide dog", "a much longer caption about a guide dog and its work"])
    with torch.no_grad():
        untrimmed, trimmed = model.encode_text(tokens), model.encode_text(tokens[:, :14])
    torch.testing.assert_close(untrimmed, trimmed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("edges", [EDGES, (), (8, 9, 12)])
def test_packed_captions_give_the_features_and_gradients_of_open_clips_padded_ones(
    ours: CLIP, peer: torch.nn.Module, edges: tuple[int, ...]
) -> None:
    caption = "a long caption about a guide dog and all of its work in the streets of a town on a day in may"
    captions = [caption[:length] for length in (1, 101, 6, 40, 1, 20, 99, 8)]
    tokens = SimpleTokenizer()([*captions, caption * 5])
    lengths = tokens.argmax(dim=-1) + 1
    packed = pack(unpad(tokens), edges)
    assert len(packed.ids) == lengths.sum() and lengths.max() == 77
    gradients = []
    for model, inputs in ((ours, packed), (peer, tokens)):
        features = torch.nn.functional.normalize(model.encode_text(inputs), dim=-1)
        model.zero_grad()
        (features * torch.arange(512)).sum().backward()
        gradients.append((features.detach(), model))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], atol=1e-5, rtol=0)
    theirs = dict(peer.named_parameters())
    for name, parameter in ours.text.named_parameters():
        expected = theirs[name].grad
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name
    ours.zero_grad()
    peer.zero_grad()


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ddp", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_model_is_compiled_once_for_thirty_numbers_of_tokens(ddp: bool, one_rank: None) -> None:
    """Uses a backend that does not compile, as only the number of graphs matters."""
    torch._dynamo.reset()
    model = tiny()
    whole = PixelModel(model)
    compiled = CompiledModel(whole, 1.0)
    compiled.model = torch.compile(whole, backend="aot_eager")
    forward = torch.nn.parallel.DistributedDataParallel(compiled) if ddp else compiled
    image = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    torch._dynamo.utils.counters.clear()
    for length in range(4, 77, 5 if ddp else 2):
        lengths = torch.tensor([4, length, 6, 7])
        captions = pack(Tokens(torch.arange(1, 1 + lengths.sum()), lengths), ())
        features = forward(image, captions)[:3]
        for one, other in zip(features, model(Normalise(model.visual.preprocessing)(image), captions), strict=True):
            torch.testing.assert_close(one, other)
        sum(x.sum() for x in features).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_where_nothing_compiles_the_model_trains_as_it_is_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/no/compiler"))
    monkeypatch.setattr(torch._inductor.config, "fx_graph_cache", False)
    torch._dynamo.reset()
    model = tiny()
    with caplog.at_level("WARNING", "clipx"):
        assert compile_model(model) is model
    assert "compile=true: the model is not compiled (InvalidCxxCompiler: No working C++ compiler" in caplog.text


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    image, tokens = real_batch(32)
    model = tiny()
    clip_loss(*model(image, tokens)).backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpoint(True)
    clip_loss(*model(image, tokens)).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))


def test_features_are_float32_under_autocast_and_float64_in_float64() -> None:
    image, tokens = real_batch(32)
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(part.dtype == torch.float32 for part in model(image, tokens))
    assert model.double().encode_image(image.double()).dtype == torch.float64


def test_initial_weights_have_the_statistics_of_openai() -> None:
    torch.manual_seed(0)
    model = clip_vit_b32()
    text, visual, width = model.text, model.visual, 512
    block = text.transformer.resblocks[5]
    branch = width**-0.5 * (2 * 12) ** -0.5
    for weight, std in (
        (text.token_embedding.weight, 0.02),
        (text.positional_embedding, 0.01),
        (text.text_projection, width**-0.5),
        (block.attn.in_proj_weight, width**-0.5),
        (block.attn.out_proj.weight, branch),
        (block.mlp.c_fc.weight, (2 * width) ** -0.5),
        (block.mlp.c_proj.weight, branch),
        (visual.positional_embedding, 768**-0.5),
        (visual.proj, 768**-0.5),
        (visual.transformer.resblocks[0].attn.in_proj_weight, math.sqrt(2 / (768 + 3 * 768))),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weight.mean().item()) < 0.01 * std * 10
    attention = visual.transformer.resblocks[0].attn
    assert not attention.in_proj_bias.any() and not attention.out_proj.bias.any()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_the_scale_stays_between_1_and_100() -> None:
    model = tiny()
    for value, expected in ((9.0, 100.0), (-2.0, 1.0)):
        model.logit_scale.data.fill_(value)
        model.clamp_scale()
        assert model.logit_scale.exp().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ImageEncoder(size=30, patch=8), "patch=8 does not divide size=30"),
        (lambda: ImageEncoder(width=64, heads=5), "heads=5 does not divide width=64"),
        (lambda: TextEncoder(vocab=49_407), "vocab=49407 is too small: the tokenizer has 49,408 token ids"),
        (
            lambda: CLIP(ImageEncoder(depth=1), TextEncoder(depth=1, embed=64)),
            "text.embed=64: should be 512 as image.embed",
        ),
    ],
)
def test_a_shape_that_cannot_be_is_named(wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_the_public_names_exist() -> None:
    assert clipx.CLIP is CLIP and clipx.clip_small is clip_small
    for name in clipx.__all__:
        assert getattr(clipx, name).__doc__
    with pytest.raises(AttributeError, match="clipx.*'clap'"):
        _ = clipx.clap


def test_the_temperature_stays_in_its_range_and_can_be_fixed() -> None:
    towers = (
        ImageEncoder(size=32, patch=16, width=64, depth=1, heads=1, embed=8),
        TextEncoder(width=64, depth=1, heads=1, embed=8),
    )
    clip = CLIP(*towers, temperature=0.1, temperature_range=(0.05, 0.2))
    for scale, expected in ((1000.0, 20.0), (0.1, 5.0), (7.0, 7.0)):
        clip.logit_scale.data.fill_(math.log(scale))
        clip.clamp_scale()
        assert clip.logit_scale.exp().item() == pytest.approx(expected)
    assert not CLIP(*towers, learn_temperature=False).logit_scale.requires_grad
    with pytest.raises(ValueError, match=r"temperature=0.5 is not in temperature_range=\[0.05, 0.2\]"):
        CLIP(*towers, temperature=0.5, temperature_range=(0.05, 0.2))
