"""LoRA on one model: what is trained, what state dicts hold, and every way to compute the gradient."""

import copy
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import run_ranks
from gradients import CPU, Double, assert_close, chunks_of
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipx.errors import UserError
from clipx.loss import clip_loss
from clipx.models.clip import CLIP
from clipx.models.lora import adapter_state, add_adapters, load_adapter_state
from clipx.models.packed import pack
from clipx.models.text import TextEncoder
from clipx.models.timm import TimmTower
from clipx.models.tower import ImageTower
from clipx.models.vision import ImageEncoder
from clipx.optim import adamw, tower_scales
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import Tokens
from clipx.training.batch import split_micro_batches
from clipx.training.compile import CompiledModel
from clipx.training.step import backward

MATRICES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TOKENS = torch.tensor([[49406, 320, 1125, 49407], [49406, 1125, 49407, 0]])


def plain_model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        ImageEncoder(size=64, patch=32, width=64, depth=2, heads=1, embed=32),
        TextEncoder(width=64, depth=2, heads=1, embed=32),
    )


def adapted_model(moved: bool = True, weights: list[str] | None = None) -> CLIP:
    """Adapters of rank 4 on both towers, as training might have moved them."""
    model = plain_model()
    add_adapters(model.towers, 4, weights=weights)
    if moved:
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                nn.init.normal_(parameter, std=0.1)
    return model


def features(model: CLIP) -> list[Tensor]:
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [model.encode_image(image), model.encode_text(TOKENS)]


def merged(model: CLIP) -> CLIP:
    """A plain model with the weights that a checkpoint holds."""
    plain = plain_model()
    plain.load_state_dict(model.state_dict())
    return plain


def test_training_starts_from_the_weights() -> None:
    plain, model = plain_model(), adapted_model(moved=False)
    assert all(torch.equal(a, b) for a, b in zip(features(plain), features(model), strict=True))
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_state_dict_holds_plain_merged_matrices_with_the_same_features() -> None:
    plain, model = plain_model(), adapted_model()
    states = plain.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed == {name for name in states[0] if name.endswith(MATRICES)} and len(changed) == 16
    assert not any(parametrize.is_parametrized(module) for module in merged(model).modules())
    for one, other in zip(features(model), features(merged(model)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(features(model), features(plain), strict=True))


def test_loading_plain_weights_gives_their_features_and_the_adapters_state_the_rest() -> None:
    model, other = adapted_model(), adapted_model()
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(features(model), features(other), strict=True))
    load_adapter_state(other, adapter_state(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert adapter_state(plain_model()) == {}


def test_a_copy_of_the_model_has_adapters_of_its_own() -> None:
    model, expected = adapted_model(), features(adapted_model())
    twin = copy.deepcopy(model)
    twin.load_state_dict(plain_model().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(features(model), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(features(twin), features(plain_model()), strict=True))


def test_adapters_and_temperature_are_trained_and_the_optimiser_finds_them() -> None:
    model = adapted_model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"logit_scale", *(name for name, _ in model.named_parameters() if name.endswith((".A", ".B")))}
    optimizer = adamw(model, weight_decay=0.3, layer_decay=0.5)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    rates = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert decays == {id(named[name]): 0.0 if name == "logit_scale" else 0.3 for name in trained}
    first, second = (f"visual.transformer.resblocks.{n}.mlp.c_fc.parametrizations.weight.0.A" for n in (0, 1))
    assert rates[id(named[first])] == rates[id(named[second])] / 2 == 5e-4 / 4


def test_names_choose_the_matrices() -> None:
    def chosen(*weights: str) -> set[str]:
        names = adapter_state(adapted_model(weights=list(weights)))
        return {name.removesuffix(".original") for name in names if name.endswith(".original")}

    assert {name.rpartition(".parametrizations.")[0].rpartition(".")[2] for name in chosen("attn")} == {
        "attn",
        "out_proj",
    }
    assert len(chosen("attn")) == len(chosen("mlp")) == 8 and len(chosen("mlp.c_fc")) == len(chosen("c_fc.weight")) == 4
    assert len(chosen("resblocks.1")) == 8 and len(chosen("attn", "mlp")) == 16


class OtherTower(ImageTower):
    """A tower as other projects build them, with a projection that is new."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing, self.width, self.embed = Preprocessing(64), 24, 32
        self.stem = nn.Linear(3 * 32 * 32, 24)
        self.block = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, 32)

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        return chain(self.stem.parameters(), self.block.parameters())

    def features(self, image: Tensor) -> Tensor:
        rows = image.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = self.stem(rows)
        return self.block(x, x, x, need_weights=False)[0].mean(1)

    def project(self, features: Tensor) -> Tensor:
        return self.head(features)


def test_a_tower_of_timm_is_adapted_by_stages() -> None:
    tower = TimmTower("test_vit", embed=24)
    plain = tower.state_dict().keys()
    add_adapters({"image": tower}, 4, weights=["attn.qkv", "mlp"])
    names = {name for name in adapter_state(tower) if name.endswith(".original")}
    assert {name.split(".parametrizations.")[0].rpartition(".")[2] for name in names} == {"qkv", "fc1", "fc2"}
    assert tower.head.proj.weight.requires_grad and not tower.trunk.patch_embed.proj.weight.requires_grad
    model = nn.Module()
    model.visual = tower
    scales = tower_scales(model, "visual", 1.0, 0.5)
    assert scales.keys() == {*tower.parameters()} and len({*scales.values()}) == len(tower.stages())
    assert tower.state_dict().keys() == plain


def test_a_tower_of_another_project_is_adapted_and_its_new_projection_is_trained() -> None:
    tower = OtherTower()
    state = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    add_adapters({"image": tower}, 4)
    image = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.1)
    tower(image).square().sum().backward()
    optimizer.step()
    after = tower.state_dict()
    assert after.keys() == state.keys()
    changed = {name for name in state if not torch.equal(state[name], after[name])}
    assert changed == {"stem.weight", "block.in_proj_weight", "block.out_proj.weight", "head.weight", "head.bias"}
    plain = OtherTower()
    plain.load_state_dict(after)
    torch.testing.assert_close(plain(image), tower(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("towers", "rank", "weights", "message"),
    [
        (
            ["image", "text"],
            4,
            ["attn", "qkv"],
            "lora.weights: no matrix has qkv in its name; there are attn.in_proj_weight, attn.out_proj.weight, "
            "mlp.c_fc.weight, mlp.c_proj.weight",
        ),
        (
            ["image"],
            65,
            None,
            "lora.rank=65 is more than a side of transformer.resblocks.0.attn.in_proj_weight, 192 x 64; "
            "give at most 64",
        ),
        (
            ["other", "text"],
            4,
            ["mlp"],
            "lora.towers: the other tower has no matrix to adapt with lora.weights=['mlp']; there are stem.weight, "
            "block.in_proj_weight, block.out_proj.weight",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    towers: list[str], rank: int, weights: list[str] | None, message: str
) -> None:
    known = {**plain_model().towers, "other": OtherTower()}
    with pytest.raises(UserError) as raised:
        add_adapters({name: known[name] for name in towers}, rank, weights=weights)
    assert str(raised.value) == message


# ---------------------------------------------------------------- gradients


def gradients(forward: nn.Module, clip: CLIP, micro: int | None, rank: int = 0, world: int = 1) -> list[Tensor]:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    micro_batches = split_micro_batches(chunks_of(64, micro, rank, world), micro)
    backward(Double(forward, CPU, None), clip_loss, micro_batches, scaler)
    grads = [p.grad.clone() for p in clip.parameters() if p.grad is not None]
    clip.zero_grad()
    return grads


def test_the_gradient_is_that_of_the_merged_matrix_by_the_chain_rule() -> None:
    model = adapted_model().double()
    plain = merged(model).double()
    for one in (model, plain):
        micro_batches = split_micro_batches(chunks_of(64, None), None)
        backward(Double(one, CPU, None), clip_loss, micro_batches, torch.amp.GradScaler("cpu", enabled=False))
    for tower in ("visual", "text"):
        for name in MATRICES:
            path, _, attribute = f"{tower}.transformer.resblocks.1.{name}".rpartition(".")
            whole = getattr(plain.get_submodule(path), attribute).grad  # (O, I)
            adapter = model.get_submodule(f"{path}.parametrizations.{attribute}.0")
            expected = [4 * adapter.B.T @ whole, 4 * whole @ adapter.A.T]  # alpha / rank is 4
            assert_close([adapter.A.grad, adapter.B.grad], expected, 1e-5)  # merged in float32
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("micro", [24, 64])
@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_and_recomputed_blocks_give_the_gradient_of_the_whole_batch(micro: int, recompute: bool) -> None:
    model = adapted_model().double()
    expected = gradients(model, model, None)
    model.set_grad_checkpoint(recompute)
    assert len(expected) == 33
    assert_close(gradients(model, model, micro), expected)


def ranks_gradients(rank: int, world: int, store: str, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = adapted_model().double()
    forward = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    torch.save([gradients(forward, model, micro, rank, world) for micro in (None, 12)], f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_gradient_of_one(tmp_path: Path) -> None:
    run_ranks(ranks_gradients, 2, str(tmp_path / "store"), str(tmp_path))
    model = adapted_model().double()
    expected = gradients(model, model, None)
    for rank in range(2):
        for actual in torch.load(tmp_path / f"{rank}.pt"):
            assert_close(actual, expected)


def test_autocast_computes_with_the_matrix_that_is_saved() -> None:
    model = adapted_model()
    plain = merged(model)
    for one in (model, plain):
        one.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(features(model), features(plain), strict=True))


def test_an_adapted_model_is_compiled_once_for_all_numbers_of_tokens() -> None:
    """Uses a backend that does not compile, as only the number of graphs matters."""
    torch._dynamo.reset()
    model = adapted_model()
    compiled = CompiledModel(model, 0.0)
    compiled.model = torch.compile(model, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for length in range(4, 77, 12):
        lengths = torch.tensor([4, length, 6, 7])
        captions = pack(Tokens(torch.arange(1, 1 + lengths.sum()), lengths), ())
        images = torch.randn(4, 3, 64, 64)
        found = compiled(images, captions)
        for one, other in zip(found, model(images, captions), strict=True):
            torch.testing.assert_close(one, other)
        sum(x.sum() for x in found).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
