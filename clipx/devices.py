"""Device, precision, cores and data workers of this rank; torch is imported on use, as ``--help`` does without."""

import math
import os
from collections.abc import Iterator
from functools import cache
from multiprocessing import get_start_method
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clipx.errors import UserError

if TYPE_CHECKING:
    import torch

Amp = Literal["none", "bf16", "fp16"]

MAX_WORKERS = 8  # for ``workers=auto`` on a CPU
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
PROCESSOR = Path("/proc/cpuinfo")


def one_of_several_jobs() -> bool:
    """Whether joblib runs this process as one of several parallel jobs of a sweep."""
    return get_start_method(allow_none=True) == "loky"


def available_cores() -> int:
    """Number of cores that this process may use; parallel jobs get the threads that joblib assigns."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min([cores, *(max(1, math.ceil(quota)) for quota in quotas())])
    return min(cores, int(os.environ.get("OMP_NUM_THREADS", cores))) if one_of_several_jobs() else cores


@cache
def has_amx() -> bool:
    """Whether the processor multiplies bf16 matrices in tiles (AMX of Intel's Xeons); known on Linux only."""
    try:
        return "amx_bf16" in PROCESSOR.read_text().split()
    except OSError:
        return False


def quotas() -> Iterator[float]:
    """CPU quotas, in cores, of this process's control groups and their parents; cgroup v1 and v2.

    In a container the path may be the host's and exist only in part: missing directories are skipped.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = GROUPS / "cpu" if controllers else GROUPS
        group = top / path.lstrip("/")
        for directory in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            yield from quota_of(directory)


def quota_of(group: Path) -> Iterator[float]:
    """The quota of one control group, if it has one: ``cpu.max`` (v2) or the two files of v1."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return
    if quota not in ("max", "-1"):
        yield int(quota) / int(period)


def limit_threads() -> None:
    """Limit torch to the available cores, as it ignores quotas; OMP_NUM_THREADS takes precedence."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def select_workers(workers: str | int, device: "torch.device") -> int:
    """Number of data workers for this rank.

    ``auto`` leaves two of its cores free if a GPU trains.  If they train themselves, it is half of them, at most
    ``MAX_WORKERS``.
    """
    from clipx.distributed import local_world_size

    if workers != "auto":
        return int(workers)
    cores = available_cores() // local_world_size()
    return max(1, min(MAX_WORKERS, cores // 2) if device.type == "cpu" else cores - 2)


def select_device(name: str) -> "torch.device":
    """The device called ``name``; ``auto`` is the first accelerator (one for each local rank), else the CPU.

    Raises:
        UserError: the device does not exist, or there are fewer GPUs than local ranks.
    """
    import torch

    from clipx.distributed import local_world_size

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    ranks = local_world_size()
    if name == "cuda" and ranks > (gpus := torch.cuda.device_count()) > 0:
        raise UserError(f"{ranks} processes on a machine with {gpus} GPUs; start torchrun with --nproc-per-node {gpus}")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} cannot be used ({reason}); device=auto uses what is available") from error


def select_amp(amp: Amp | Literal["auto"], device: "torch.device") -> Amp:
    """The precision called ``amp``; ``auto`` is bf16 if the devices of all ranks have units for it, else none."""
    import torch

    from clipx.distributed import gather

    if amp != "auto":
        return amp
    return "bf16" if all(gather(torch.tensor([int(has_bf16(device))])).tolist()) else "none"


def has_bf16(device: "torch.device") -> bool:
    """Whether a device has units for bf16: a GPU that does not emulate it, or a CPU with AMX."""
    import torch

    if device.type != "cuda":
        return device.type == "cpu" and has_amx()
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def autocast_dtype(amp: str) -> "torch.dtype | None":
    """autocast's dtype for a precision of ``select_amp``; None computes in float32."""
    import torch

    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
