"""Settings of torch, for the whole process: precision of float32 products, operations that repeat to the bit."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TextIO

import torch

logger = logging.getLogger("clipx")

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def numerics(matmul_precision: Literal["highest", "high"], deterministic: bool) -> Iterator[None]:
    """Change the settings within the block, which has to be entered before CUDA starts.

    Args:
        matmul_precision: of float32 products and convolutions on a GPU: float32, or TensorFloat32 for ``high``.
        deterministic: use operations that repeat to the bit where torch has them, and log those that do not.
    """
    with float32_products(matmul_precision), deterministic_operations() if deterministic else nullcontext():
        yield


@contextmanager
def float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    # torch.compile reads these two settings, and raises if the newer fp32_precision contradicts them
    cudnn = torch.backends.cudnn
    with warnings.catch_warnings():  # torch 2.9 deprecates them, in one warning a process; later versions do not
        warnings.simplefilter("ignore")
        matmul, convolution = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32 = precision == "high"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = convolution


@contextmanager
def deterministic_operations() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    former, workspace = (cudnn.deterministic, cudnn.benchmark), os.environ.get(WORKSPACE)
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False  # writes to every new tensor
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = True, False
    os.environ.setdefault(WORKSPACE, ":4096:8")
    try:
        with nondeterminism_logged():
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = former
        memory.fill_uninitialized_memory = filled
        if workspace is None:
            del os.environ[WORKSPACE]


@contextmanager
def nondeterminism_logged() -> Iterator[None]:
    """Log each of torch's warnings about an operation that is not deterministic, once."""
    logged: set[str] = set()

    def log(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message).partition(" (Triggered internally")[0]
        if "determinis" not in text:
            show(message, category, filename, lineno, file, line)
        elif text not in logged:
            logged.add(text)
            logger.warning("deterministic=true: %s", text)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", "(?s).*determinis", UserWarning)
        show, warnings.showwarning = warnings.showwarning, log
        yield
