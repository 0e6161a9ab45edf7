"""Every way to compute the gradient of a batch gives the same result."""

import inspect
import json
import resource
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_python, run_ranks
from gradients import CPU, Double, assert_close, chunks_of
from torch import Tensor, nn

from clipx.data.dummy import open_dummy
from clipx.evals.encoder import EvalEncoder
from clipx.loss import clip_loss, sigmoid_loss
from clipx.models import kernels, packed
from clipx.models.clip import CLIP
from clipx.models.packed import EDGES, Packed, grid_edges
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.tokenizer import SimpleTokenizer
from clipx.training.batch import split_micro_batches
from clipx.training.loop import gradient_norms
from clipx.training.step import Features, MicroBatchEncoder, PixelModel, backward


def model(dtype: torch.dtype = torch.float64, bias: float | None = None) -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        ImageEncoder(size=64, patch=32, width=64, depth=2, heads=1, embed=32),
        TextEncoder(width=64, depth=2, heads=1, embed=32),
        bias=bias,
    ).to(dtype)


def gradient(
    clip: CLIP, batch: int, micro: int | None, edges: Sequence[int] | None = EDGES
) -> tuple[Tensor, list[Tensor]]:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parts = split_micro_batches(chunks_of(batch, micro), micro, edges)
    loss = backward(Double(clip, CPU, None), clip_loss, parts, scaler).loss
    gradients = [p.grad for p in clip.parameters()]
    clip.zero_grad()
    return loss, gradients


@pytest.mark.parametrize("micro", [32, 100, 300])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro: int) -> None:
    clip = model()
    loss, full_grads = gradient(clip, 512, None)
    same_loss, parts = gradient(clip, 512, micro)
    assert same_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert_close(parts, full_grads)
    assert len(full_grads) == len([*clip.parameters()])  # including the temperature
    assert all(grad.any() for grad in full_grads)


def test_captions_in_one_grid_give_the_same_gradient() -> None:
    clip = model()
    assert_close(gradient(clip, 64, 24, edges=())[1], gradient(clip, 64, None)[1])


def row_by_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    max_q: int,
    max_k: int,
    window_size: tuple[int, int],
) -> Tensor:
    """What torch's CUDA kernel computes, according to its documentation."""
    assert q_offsets.dtype == k_offsets.dtype == torch.int32 and q_offsets[-1] == len(q) and k_offsets[-1] == len(k)
    assert max_q >= q_offsets.diff().max() and max_k >= k_offsets.diff().max()
    rows = zip(
        *(x.split(offsets.diff().tolist()) for x, offsets in ((q, q_offsets), (k, k_offsets), (v, k_offsets))),
        strict=True,
    )
    causal = {(-1, 0): True, (-1, -1): False}[window_size]
    by_head = ([x.transpose(0, 1)[None] for x in row] for row in rows)  # (1, H, L, D/H) each
    return torch.cat([F.scaled_dot_product_attention(*x, is_causal=causal)[0].transpose(0, 1) for x in by_head])


def test_captions_without_grids_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = model()
    expected = gradient(clip, 64, None)
    monkeypatch.setattr(kernels, "varlen_attn", row_by_row, raising=False)  # absent from torch 2.9 and 2.10
    loss, grads = gradient(clip, 64, 24, edges=None)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-12)
    assert_close(grads, expected[1])


def test_evaluation_needs_no_grids_where_training_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    val = open_dummy(samples=8, val_samples=20, size=64).vals[""]
    encoder = EvalEncoder(model(torch.float32), SimpleTokenizer())
    expected = encoder.encode_pairs(val), encoder.encode_texts(["a cat", "a cat on a mat"])
    calls = []
    monkeypatch.setattr(packed, "has_varlen", lambda *_: True)
    monkeypatch.setattr(kernels, "varlen_attn", lambda *x, **y: calls.append(x) or row_by_row(*x, **y), raising=False)
    found = encoder.encode_pairs(val), encoder.encode_texts(["a cat", "a cat on a mat"])
    torch.testing.assert_close((found[0].texts, found[1]), (expected[0].texts, expected[1]))
    assert len(calls) == 4  # two blocks, twice


def test_captions_need_no_grids_on_cuda_in_half_precision() -> None:
    cuda = torch.device("cuda")
    if kernels.HAS_VARLEN:
        assert grid_edges(cuda, torch.bfloat16, True) is grid_edges(cuda, torch.float16, False) is None
        assert inspect.signature(kernels.varlen_attn).parameters.keys() >= {"max_q", "max_k", "window_size"}
    assert grid_edges(cuda, None, True) == () and grid_edges(cuda, None, False) == EDGES
    assert grid_edges(CPU, torch.bfloat16, True) == () and grid_edges(CPU, torch.bfloat16, False) == EDGES


def test_images_are_not_copied_before_the_device() -> None:
    chunks = chunks_of(300, None)
    (single,), (one, rest) = split_micro_batches(chunks, None), split_micro_batches(chunks, 256)
    assert [x.data_ptr() for x in single.images] == [chunk.images.data_ptr() for chunk in chunks]
    encoder = MicroBatchEncoder(PixelModel(model()), CPU, None)
    assert encoder.to_device(one)[0].data_ptr() == chunks[0].images.data_ptr()
    assert torch.equal(encoder.to_device(single)[0], torch.cat([chunk.images for chunk in chunks]))
    assert (len(single), len(one), len(rest)) == (300, 256, 44)


def test_what_dropout_draws_in_the_first_pass_it_draws_in_the_second() -> None:
    clip = model()
    for tower in (clip.visual, clip.text):
        mlp = tower.transformer.resblocks[0].mlp
        mlp.gelu = nn.Sequential(mlp.gelu, nn.Dropout(0.3))
    scaler, encoder = torch.amp.GradScaler("cpu", enabled=False), Double(clip, CPU, None)
    parts = split_micro_batches(chunks_of(64, 16), 16)
    torch.manual_seed(3)
    backward(encoder, clip_loss, parts, scaler)
    after = torch.get_rng_state()
    grads = [p.grad for p in clip.parameters()]
    clip.zero_grad()
    torch.manual_seed(3)  # the same random draws, in a single pass
    images, texts, scales, *_ = zip(*[encoder(part) for part in parts], strict=True)
    clip_loss(torch.cat(images), torch.cat(texts), scales[0]).backward()
    assert_close(grads, [p.grad for p in clip.parameters()])
    assert torch.equal(after, torch.get_rng_state())


def test_the_same_under_autocast_and_a_scaler() -> None:
    clip, gradients = model(torch.float32), []
    for micro in (None, 16):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        micro_batches = split_micro_batches(chunks_of(64, micro), micro)
        backward(MicroBatchEncoder(PixelModel(clip), CPU, torch.bfloat16), clip_loss, micro_batches, scaler)
        gradients.append([p.grad for p in clip.parameters()])
        clip.zero_grad()
    assert_close(gradients[1], gradients[0], 0.03)  # bfloat16 has eight bits of precision


def test_ids_of_all_parts_reach_the_loss() -> None:
    clip, received_ids = model(), []

    def loss_fn(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        received_ids.append(ids)
        return clip_loss(image, text, scale, ids, "mask")

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    backward(Double(clip, CPU, None), loss_fn, split_micro_batches(chunks_of(40, 16), 16), scaler)
    assert torch.equal(received_ids[0], torch.cat([chunk.ids for chunk in chunks_of(40, None)]))


def test_a_loss_without_temperature_leaves_it_alone() -> None:
    clip, scaler = model(), torch.amp.GradScaler("cpu", enabled=False)
    parts = split_micro_batches(chunks_of(32, 16), 16)
    backward(Double(clip, CPU, None), lambda image, text, _scale, _ids: (image - text).square().sum(), parts, scaler)
    assert clip.logit_scale.grad == 0 and clip.visual.conv1.weight.grad.any()


@pytest.mark.parametrize("tower", ["image", "text", True])
def test_each_tower_can_be_checkpointed_alone(tower: str | bool) -> None:
    clip = model()
    _, plain = gradient(clip, 16, None)
    clip.set_grad_checkpoint(tower)
    assert clip.visual.transformer.grad_checkpoint is (tower != "text")
    assert clip.text.transformer.grad_checkpoint is (tower != "image")
    assert all(torch.equal(a, b) for a, b in zip(gradient(clip, 16, None)[1], plain, strict=True))


LOSSES = {
    "keep": clip_loss,
    "mask": partial(clip_loss, same="mask"),
    "positive": partial(clip_loss, same="positive"),
    "smoothed": partial(clip_loss, same="mask", label_smoothing=0.1),
    "sigmoid": sigmoid_loss,
    "sigmoid positive": partial(sigmoid_loss, same="positive"),
}


class WithBias(nn.Module):
    """A model that also returns the bias of its logits."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, captions: Packed) -> Features:
        return Features(*self.clip(images, captions), self.clip.logit_bias)


def gradient_of(
    loss_fn: Callable[..., Tensor], micro: int | None, rank: int = 0, world: int = 1
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradient of a batch of 64, on one rank."""
    takes_bias = "bias" in inspect.signature(loss_fn).parameters
    clip = model(bias=-3.0 if takes_bias else None)
    forward: nn.Module = WithBias(clip)
    if world > 1:
        forward = nn.parallel.DistributedDataParallel(forward)
    parts, scaler = split_micro_batches(chunks_of(64, micro, rank, world), micro), torch.amp.GradScaler(enabled=False)
    loss = backward(Double(forward, CPU, None), loss_fn, parts, scaler).loss
    return loss, [p.grad for p in clip.parameters()]


def ranks_gradient(rank: int, world: int, store: str, path: str) -> None:
    """Loss and gradient of every loss on one rank, also with two micro-batches."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = {
        (name, micro): gradient_of(loss_fn, micro, rank, world)
        for name, loss_fn in LOSSES.items()
        for micro in (None, 8)
    }
    torch.save(results, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_loss_and_the_gradient_of_one(world: int, tmp_path: Path) -> None:
    run_ranks(ranks_gradient, world, str(tmp_path / "store"), str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, loss_fn in LOSSES.items():
        loss, full_grads = gradient_of(loss_fn, None)
        for actual in found:
            for micro in (None, 8):
                assert actual[name, micro][0].item() == pytest.approx(loss.item(), rel=1e-12), (name, micro)
                assert_close(actual[name, micro][1], full_grads)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_the_gradient_of_the_whole_batch_in_micro_batches(name: str) -> None:
    loss, full_grads = gradient_of(LOSSES[name], None)
    same_loss, parts = gradient_of(LOSSES[name], 24)
    assert same_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert_close(parts, full_grads)
    assert all(grad.any() for grad in full_grads)


def test_the_norm_of_the_gradient_counts_the_temperature_and_the_bias() -> None:
    clip = model(bias=-3.0)
    (part,), scaler = split_micro_batches(chunks_of(16, None), None), torch.amp.GradScaler(enabled=False)
    backward(Double(WithBias(clip), CPU, None), sigmoid_loss, [part], scaler)
    expected = nn.utils.get_total_norm([p.grad for p in clip.parameters()])
    torch.testing.assert_close(gradient_norms(clip, nn.Module()).model, expected)
    assert clip.logit_bias.grad.abs() > 1e-3 * expected  # it makes a difference


@pytest.mark.long
def test_a_batch_that_does_not_fit_names_a_micro_batch_that_may(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch; torch.set_num_threads(1)\n"
        "from clipx.train import main; import clipx.training.run, psutil\n"
        "resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 1_400_000_000,) * 2)\n"
        "sys.argv = ['clipx.train', *sys.argv[1:]]; main()"
    )
    args = [
        "experiment=smoke", "model.image.size=96", "batch_size=512", "workers=0", "evals=[]", "max_steps=1", "name=x",
    ]  # fmt: skip
    result = run_python("-c", code, *args, cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1] == (
        "512 samples at once do not fit in the memory of cpu; set micro_batch_size=256 or grad_checkpoint=true, which "
        "give the same gradient"
    )
    result = run_python("-c", code, *args, "micro_batch_size=16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_run_in_micro_batches_is_the_same_run(train: Callable[..., None], tmp_path: Path) -> None:
    args = ["experiment=smoke", "batch_size=48", "workers=0", "evals=[]", "log_every=1", "data.samples=200", "name=x"]
    train(*args, "max_steps=6", "stop_at=3", "micro_batch_size=20")
    train(*args, "max_steps=6", "micro_batch_size=48", "grad_checkpoint=text")  # resumes, as neither changes the run
    train(*args[:-1], "max_steps=6", "name=whole")
    logs = [(tmp_path / f"outputs/{name}/metrics.jsonl").read_text().splitlines() for name in ("x", "whole")]
    losses = [[json.loads(line)["train/loss"] for line in log] for log in logs]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert json.loads(logs[1][-1])["train/host_memory_gb"] * 1e9 == pytest.approx(peak, rel=0.1)
