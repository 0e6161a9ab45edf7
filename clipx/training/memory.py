"""The memory of a run: what it took at most, what does not fit, what is better kept."""

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clipx.errors import UserError

TRIM, MAP = -1, -3          # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
MOST = 2**31 - 1            # bytes


class DoesNotFit(UserError):
    """There is not enough memory."""


@contextmanager
def fits(samples: int, device: torch.device) -> Iterator[None]:
    """Tell how many samples to try where so many do not fit.

    Raises:
        DoesNotFit: they do not.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise DoesNotFit(
            f"{samples:,} samples at once do not fit into the memory of {device}; the gradient is the same with "
            f"micro_batch_size={max(1, samples // 2)}, and with grad_checkpoint=true"
        ) from error


def peaks(device: torch.device) -> dict[str, float]:
    """The most memory so far, 1e9 bytes, by tag: of this process, and of tensors on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"train/host_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device.type == "cuda":
        found["train/device_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def peak(device: torch.device) -> float:
    """The most memory so far where it counts, 1e9 bytes: of tensors on a GPU, else of this process."""
    found = peaks(device)
    return found.get("train/device_memory_gb", found["train/host_memory_gb"])


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next step.

    It would give large blocks back to the system, and to take them again costs a page fault for every 4 kB: a
    twentieth of a step of ViT-B/32 on two cores.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(MAP, MOST)
        library.mallopt(TRIM, MOST)
