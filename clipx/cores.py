"""Cores that this process may use, given CPU affinity, CPU quotas and joblib."""

import math
import os
from collections.abc import Iterator
from multiprocessing import get_start_method
from pathlib import Path

OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def one_of_several_jobs() -> bool:
    """Whether joblib runs this process as one of several parallel jobs of a sweep."""
    return get_start_method(allow_none=True) == "loky"


def available_cores() -> int:
    """Number of cores that this process may use; parallel jobs get the threads that joblib assigns."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min([cores, *(max(1, math.ceil(quota)) for quota in quotas())])
    return min(cores, int(os.environ.get("OMP_NUM_THREADS", cores))) if one_of_several_jobs() else cores


def quotas() -> Iterator[float]:
    """CPU quotas, in cores, of this process's control groups and their parents; cgroup v1 and v2.

    In a container the path may be the host's and exist only in part: missing directories are skipped.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:             # not Linux
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
