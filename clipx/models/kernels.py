"""Attention and patch embedding, each by the fastest way that is right for device and precision."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipx.devices import has_amx

HAS_VARLEN = torch.__version__ >= "2.11"  # a TorchVersion, compared by number; 2.10 has no window_size
if HAS_VARLEN:
    from torch.nn.attention.varlen import varlen_attn

# without cuDNN's, whose backward pass was seen to give NaN for a single query and for masked rows
# (NVIDIA/cudnn-frontend issue 1072, pytorch issue 196678)
CUDA_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, seen: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention. (B, H, M, D/H), twice (B, H, L, D/H) -> (B, H, M, D/H).

    Args:
        causal: hide later tokens; needs M = L.
        seen: (B, 1, 1, L) bool, the tokens to attend to; None for all.
    """
    in_grid = causal or seen is not None
    if in_tiles(q) and in_grid:  # captions: oneDNN would compile a product for every size of a grid, 1.5 ms each
        exact = torch.promote_types(q.dtype, torch.float32)
        rows = F.scaled_dot_product_attention(q.to(exact), k.to(exact), v.to(exact), attn_mask=seen, is_causal=causal)
        return rows.to(v.dtype)
    if in_tiles(q) or (q.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return plain_attention(q, k, v, causal, seen)
    with sdpa_kernel(CUDA_KERNELS) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal)


def has_varlen(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether ``varlen_attention`` is right for a device and a precision."""
    half = dtype in (torch.bfloat16, torch.float16)
    return HAS_VARLEN and device.type == "cuda" and half and not torch.are_deterministic_algorithms_enabled()


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, longest: int, causal: bool = False
) -> Tensor:
    """Attention within each of B rows that lie one after the other. (M, H, D/H), twice (T, H, D/H) -> (M, H, D/H).

    Args:
        q_offsets: (B+1,) int32, where the queries of each row start, and M.
        k_offsets: (B+1,) int32, where its keys start, and T.
        longest: a bound for the tokens of a row.
        causal: hide later tokens; needs as many queries as keys.
    """
    queries = longest if causal else 1
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        rows = varlen_attn(q, k, v, q_offsets, k_offsets, queries, longest, window_size=(-1, 0 if causal else -1))
    assert isinstance(rows, Tensor)  # a tuple if asked for more
    return rows


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, seen: Tensor | None) -> Tensor:
    """``attention`` written out; with AMX six times as fast in bf16 as torch's kernel, backward pass included.

    On CUDA it repeats to the bit: the backward passes of torch's kernels do only where nondeterminism is an error.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, M, L)
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return weights.to(v.dtype) @ v


def embed_patches(image: Tensor, weight: Tensor) -> Tensor:
    """Convolution whose stride is its kernel size: (B, C, S, S), (D, C, P, P) -> (B, (S/P)^2, D), row by row."""
    autocast = torch.is_autocast_enabled(image.device.type)
    image = image.to(torch.get_autocast_dtype(image.device.type)) if autocast else image
    if not in_tiles(image):
        return F.conv2d(image, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    patch = weight.shape[-1]
    rows = image.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, S/P, P, S/P, P)
    patches = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, (S/P)^2, C P P)
    return F.linear(patches, weight.flatten(1))


def in_tiles(x: Tensor) -> bool:
    """Whether the CPU multiplies such matrices in tiles: plain products then beat specialised kernels."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and amx()


@torch.compiler.assume_constant_result  # a compiler need not look inside
def amx() -> bool:
    return has_amx()
