"""What only a GPU can show; skipped without one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FEW, assert_same_state, lines
from gradients import CPU, chunks_of
from torch import Tensor

from clipx.loss import clip_loss
from clipx.models import kernels
from clipx.models.clip import CLIP
from clipx.models.packed import EDGES, grid_edges, pack, unpad
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.optim import adamw
from clipx.tokenizer import SimpleTokenizer
from clipx.training.batch import split_micro_batches
from clipx.training.loop import State, StepOutput, step_optimizer
from clipx.training.memory import OutOfMemory, explain_oom
from clipx.training.reading import BadStep, Reading
from clipx.training.step import MicroBatchEncoder, PixelModel, backward

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")
HALF = [torch.bfloat16, torch.float16]
TOKENS = SimpleTokenizer()(["a cat", "a cat on a mat", "one dog " * 12, "x", "the long tail of a " * 30])


def model(device: torch.device) -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        ImageEncoder(size=64, patch=32, width=128, depth=2, heads=2, embed=32),
        TextEncoder(width=128, depth=2, heads=2, embed=32),
    ).to(device)


def assert_finite_gradients(y: Tensor, *inputs: Tensor) -> None:
    y.backward(torch.ones_like(y))
    assert y.isfinite().all() and all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("heat", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("kind", ["full", "causal", "one query", "one masked query"])
def test_attention_has_finite_gradients(kind: str, heat: float, dtype: torch.dtype) -> None:
    shape = (5, 2, 50, 64)
    k, v = (torch.randn(shape, device=CUDA, dtype=dtype, requires_grad=True) for _ in range(2))
    q = (heat * torch.randn(5, 2, 1 if "query" in kind else 50, 64, device=CUDA)).to(dtype).requires_grad_()
    seen = torch.arange(50, device=CUDA) < torch.tensor([1, 2, 17, 49, 50], device=CUDA).view(5, 1, 1, 1)
    masked = seen if "masked" in kind else None
    assert_finite_gradients(kernels.attention(q, k, v, causal=kind == "causal", seen=masked), q, k, v)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("heat", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_without_grids_has_finite_gradients(causal: bool, heat: float, dtype: torch.dtype) -> None:
    if not kernels.has_varlen(CUDA, dtype):
        pytest.skip("this torch has no such kernel")
    offsets = torch.tensor([0, 2, 5, 82], dtype=torch.int32, device=CUDA)
    one_each = torch.arange(4, dtype=torch.int32, device=CUDA)
    k, v = (torch.randn(82, 2, 64, device=CUDA, dtype=dtype, requires_grad=True) for _ in range(2))
    q = (heat * torch.randn(82 if causal else 3, 2, 64, device=CUDA)).to(dtype).requires_grad_()
    y = kernels.varlen_attention(q, k, v, offsets if causal else one_each, offsets, 128, causal)
    assert_finite_gradients(y, q, k, v)


@pytest.mark.parametrize("amp", [*HALF, None])
@pytest.mark.parametrize("micro", [None, 24])
@pytest.mark.parametrize("same", ["keep", "mask"])
def test_a_step_and_the_copies_for_its_log_do_not_wait_for_the_gpu(
    same: str, micro: int | None, amp: torch.dtype | None
) -> None:
    clip = model(CUDA)
    state = State(clip, adamw(clip), torch.amp.GradScaler("cuda", 2.0**10 if amp is torch.float16 else 1.0))
    encoder, chunks = MicroBatchEncoder(PixelModel(clip), CUDA, amp), chunks_of(64, micro)

    def train() -> Reading:
        parts = split_micro_batches(chunks, micro, grid_edges(CUDA, amp))
        batch = backward(encoder, lambda *features: clip_loss(*features, same), parts, state.scaler)
        norms = step_optimizer(state, 1.0, amp)
        output = StepOutput(*batch, *norms, 1e-4, 0.0, 0, 64, [])
        return Reading.start(state, [(BadStep(1, 0, 1e-4), norms.model.isfinite())], output)

    train()  # creates the optimiser's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        reading = train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reading.wait()
    assert reading.output is not None and reading.output.image.device == CPU
    assert reading.finite.tolist() == [True] and reading.output.loss.isfinite()


def features_and_gradient(device: torch.device, edges: object, amp: torch.dtype | None) -> list[Tensor]:
    clip, images = model(device), torch.linspace(-1, 1, 5 * 3 * 64 * 64).view(5, 3, 64, 64).sin()
    captions = TOKENS.to(device) if edges == "padded" else pack(unpad(TOKENS), edges).to(device)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        image, text, scale = clip(images.to(device), captions)
    clip_loss(image, text, scale).backward()
    trained = [p.grad for p in clip.parameters() if p.ndim]  # the temperature's is a small difference of large sums
    return [x.detach().double().cpu() for x in (image, text, *trained)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), (a.shape, (a - b).norm() / b.norm())


@pytest.mark.parametrize("edges", [EDGES, (), "padded"])
def test_a_gpu_gives_the_features_and_gradients_of_a_cpu(edges: object) -> None:
    assert_near(
        features_and_gradient(CUDA, edges, None), features_and_gradient(CPU, EDGES, None), 1e-2
    )  # TF32 in cuDNN


def test_captions_without_grids_give_the_features_and_gradients_of_those_in_grids() -> None:
    if not kernels.has_varlen(CUDA, torch.bfloat16):
        pytest.skip("this torch has no such kernel")
    expected = features_and_gradient(CUDA, EDGES, torch.bfloat16)
    assert_near(features_and_gradient(CUDA, None, torch.bfloat16), expected, 0.1)
    assert F.cosine_similarity(features_and_gradient(CUDA, None, torch.bfloat16)[1], expected[1]).min() > 0.999


def test_a_deterministic_run_resumes_bit_for_bit(train: Callable[..., None], tmp_path: Path) -> None:
    words = (*FEW, "device=cuda", "deterministic=true", "max_steps=8", "eval_every=null", "evals=[]")
    train(*words, "name=whole")
    train(*words, "name=parts", "stop_at=3")
    train(*words, "name=parts")
    assert_same_state(tmp_path / "outputs/whole", tmp_path / "outputs/parts")
    steps, losses = ([row[tag] for row in lines(tmp_path / "outputs/parts")] for tag in ("step", "train/loss"))
    assert steps == list(range(1, 9)) and losses == [row["train/loss"] for row in lines(tmp_path / "outputs/whole")]


def test_a_batch_that_does_not_fit_names_a_micro_batch_that_may() -> None:
    total = torch.cuda.get_device_properties(CUDA).total_memory
    with pytest.raises(OutOfMemory, match="micro_batch_size=128"), explain_oom(256, CUDA):
        torch.empty(2 * total, dtype=torch.uint8, device=CUDA)
