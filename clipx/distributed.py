"""Several processes as one: who is who, gathers and sums.  In a process alone nothing happens."""

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if world() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """(b, ...) of each rank -> (world b, ...) on all, rank after rank.  No gradient passes."""
    if world() == 1:
        return x
    gathered = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(gathered, x.contiguous())
    return torch.cat(gathered)


def all_sum(x: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """The largest of all ranks, in place."""
    if world() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x
