"""Device, precision and number of data workers of this rank."""

import torch

from clipx import distributed
from clipx.cores import available_cores
from clipx.errors import UserError

MAX_WORKERS = 8                 # for ``workers=auto``
PRECISIONS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}      # autocast's dtype for each ``amp``


def select_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first accelerator (one for each local rank), else the CPU.

    Raises:
        UserError: the device does not exist, or there are fewer GPUs than local ranks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    ranks = distributed.local_world_size()
    if name == "cuda" and ranks > (gpus := torch.cuda.device_count()) > 0:
        raise UserError(f"{ranks} processes on a machine with {gpus} GPUs; start torchrun with --nproc-per-node {gpus}")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} cannot be used ({reason}); device=auto uses what is available") from error


def select_workers(workers: str | int) -> int:
    """Number of data workers for this rank; ``auto`` is half of its share of the cores, at most ``MAX_WORKERS``."""
    if workers != "auto":
        return int(workers)
    return min(MAX_WORKERS, max(1, available_cores() // distributed.local_world_size() // 2))
