"""Every implementation of attention and patch embedding equals the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clipx.models import kernels
from clipx.models.numerics import numerics

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)


@pytest.fixture(params=[False, True], ids=["torch", "products"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether to use plain matrix products, as on a CPU where these are faster, in every precision."""
    monkeypatch.setattr(kernels, "in_tiles", lambda x: request.param)
    return request.param


def results(f: object, *inputs: Tensor) -> list[Tensor]:
    """The output of a function and the gradients of its inputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = f(*inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return [y.detach(), *(x.grad for x in inputs)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@PRECISIONS
@pytest.mark.parametrize("kind", ["full", "causal", "one query"])
def test_attention_is_softmax_of_the_products(products: bool, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 3, 2, 7, 16, dtype=torch.float64).unbind()
    q = torch.randn(3, 2, 1 if kind == "one query" else 7, 16, dtype=torch.float64)
    visible = torch.arange(7) < torch.tensor([1, 4, 7]).view(3, 1, 1, 1) if kind == "one query" else None
    hidden = ~torch.ones(7, 7, dtype=torch.bool).tril() if kind == "causal" else torch.tensor(False)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("bhmd,bhld->bhml", q, k) / 4
        weights = logits.masked_fill(hidden if visible is None else ~visible, -1e9).softmax(-1)
        return torch.einsum("bhml,bhld->bhmd", weights, v)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v, causal=kind == "causal", seen=visible)

    actual = results(ours, *(x.to(dtype) for x in (q, k, v)))
    assert_close(actual, [x.to(dtype) for x in results(formula, q, k, v)], tolerance)


@PRECISIONS
def test_patches_are_those_of_the_convolution(products: bool, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    image, weight = torch.randn(2, 3, 24, 24, dtype=torch.float64), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    expected = results(lambda x, w: F.conv2d(x, w, stride=8).flatten(2).transpose(1, 2), image, weight)
    actual = results(kernels.embed_patches, image.to(dtype), weight.to(dtype))
    assert_close(actual, [x.to(dtype) for x in expected], tolerance)


def test_products_are_for_bf16_on_a_cpu_with_amx_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_amx", lambda: True)
    assert kernels.in_tiles(torch.zeros(1, dtype=torch.bfloat16))
    assert not kernels.in_tiles(torch.zeros(1))
    assert not kernels.in_tiles(torch.zeros(1, dtype=torch.bfloat16, device="meta"))
    monkeypatch.setattr(kernels, "has_amx", lambda: False)
    assert not kernels.in_tiles(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_attention_on_cuda_is_made_of_products(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: calls.append(q) or q)
    monkeypatch.setattr(kernels, "HAS_VARLEN", True)
    with numerics("highest", deterministic), FakeTensorMode():  # CUDA tensors without storage
        qkv = torch.empty(3, 2, 2, 5, 16, device="cuda", dtype=torch.bfloat16)
        assert kernels.attention(*qkv).shape == (2, 2, 5, 16)
        assert kernels.has_varlen(qkv.device, qkv.dtype) != deterministic
    assert bool(calls) != deterministic


def test_under_autocast_both_ways_use_its_precision(products: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.embed_patches(torch.zeros(1, 3, 8, 8), torch.zeros(5, 3, 4, 4)).dtype == torch.bfloat16
        qkv = torch.zeros(3, 1, 1, 4, 8, dtype=torch.bfloat16)
        assert kernels.attention(*qkv).dtype == torch.bfloat16
