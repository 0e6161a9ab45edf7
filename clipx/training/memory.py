"""Memory: peak usage, the optimiser's share, out-of-memory errors, malloc settings."""

import copy
import ctypes
import platform
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from clipx.errors import UserError

TRIM, MAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
MAX_THRESHOLD = 2**31 - 1  # bytes


class OutOfMemory(UserError):
    """There is not enough memory."""


@contextmanager
def explain_oom(samples: int, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error into one that suggests a micro-batch size.

    Raises:
        OutOfMemory: ``samples`` do not fit.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{samples:,} samples at once do not fit in the memory of {device}; set "
            f"micro_batch_size={max(1, samples // 2)} or grad_checkpoint=true, which give the same gradient"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch says that there is not enough memory, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def peak_memory_by_tag(device: torch.device) -> dict[str, float]:
    """Peak memory so far, by tag, in 1e9 bytes: of this process, and of tensors on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"train/host_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device.type == "cuda":
        found["train/device_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def peak_memory(device: torch.device) -> float:
    """Peak memory so far, in 1e9 bytes: of tensors on a GPU, else of this process."""
    found = peak_memory_by_tag(device)
    return found.get("train/device_memory_gb", found["train/host_memory_gb"])


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that are not frozen."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def describe_trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """How many parameters are trained, and the memory that the optimiser takes for them."""
    total, trained = 0, 0
    for p in model.parameters():
        total, trained = total + p.numel(), trained + p.requires_grad * p.numel()
    kept = format_bytes(moment_bytes(optimizer))
    return f"{trained:,} of {total:,} parameters ({100 * trained / total:.3g}%); the optimiser keeps {kept}"


def format_bytes(count: float) -> str:
    return tqdm.format_sizeof(count, "B")


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an optimiser keeps, found by a step of a copy on one parameter of each group."""
    groups = [group["params"] for group in optimizer.param_groups]
    smallest = [min(group, key=lambda p: (-min(p.ndim, 2), p.numel())) for group in groups if group]
    probes = {id(p): nn.Parameter(torch.zeros_like(p)) for p in smallest}
    for probe in probes.values():
        probe.grad = torch.zeros_like(probe)
    kept = {id(p): p for group in groups for p in group}  # not copied
    made = {probes[id(p)]: copy.deepcopy(optimizer.state[p]) for p in smallest if p in optimizer.state}
    copied = copy.deepcopy(optimizer, {**kept, **probes, id(optimizer.state): defaultdict(dict, made)})
    for group in copied.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in kept]
    copied.step()
    return sum(
        p.nbytes * sum(getattr(value, "shape", None) == probe.shape for value in copied.state[probe].values())
        for group, probe in zip(filter(None, groups), probes.values(), strict=True)
        for p in group
    )


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the next step.

    By default it returns large blocks to the system, and reallocating them costs a page fault for every 4 kB: 5% of a
    step of ViT-B/32 on two cores.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(MAP, MAX_THRESHOLD)
        library.mallopt(TRIM, MAX_THRESHOLD)
