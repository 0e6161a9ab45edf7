"""Ranks, collectives and turns.  No-op in a single process."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from clipx.distributed.watchdog import Watchdog, meet
from clipx.errors import UserError

Item = TypeVar("Item")

RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # environment variables needed besides WORLD_SIZE


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank() -> int:
    """Rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def process_group() -> Iterator[Watchdog | None]:
    """Join the process group of torchrun, or of submitit on Slurm: Gloo for CPU tensors, NCCL for CUDA tensors.

    Raises:
        UserError: another rank is lost or has failed, or environment variables are missing.
    """
    export_submitit()
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    if ranks == 1:
        yield None
        return
    if missing := [name for name in RENDEZVOUS if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE={ranks} is set without {', '.join(missing)}; start several processes with "
            f"torchrun --nproc-per-node {ranks} -m clipx.train ..., or unset WORLD_SIZE to train in one"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    store, own, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(meet(store, own, ranks), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=own, world_size=ranks)
    try:
        with Watchdog(store.clone(), own, ranks) as watchdog:
            yield watchdog
            dist.barrier()  # no rank leaves while another may need it
    finally:
        dist.destroy_process_group()  # the next job of a sweep creates its own


def export_submitit() -> None:
    """In a submitit task, set the environment variables that torchrun would set."""
    if "SUBMITIT_EXECUTOR" in os.environ and "WORLD_SIZE" not in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


@contextmanager
def rank0_first(watchdog: Watchdog | None) -> Iterator[None]:
    """Run the block on rank 0 first, then on one rank of each other machine, then on the others: it creates files."""
    if watchdog is None:
        yield
        return
    machine = rank() // local_world_size()
    if rank():
        watchdog.wait_for(f"machine {machine if local_rank() else 0}")
    yield
    if local_rank() == 0:
        watchdog.announce(f"machine {machine}")


def local_batch_size(batch_size: int) -> int:
    """Samples of a batch per rank.

    Raises:
        UserError: the batch does not divide among the ranks.
    """
    ranks = world_size()
    if batch_size % ranks:
        near = sorted({max(1, batch_size // ranks) * ranks, -(-batch_size // ranks) * ranks})
        raise UserError(
            f"batch_size={batch_size} does not divide among {ranks} ranks; "
            f"{' and '.join(map(str, near))} {'do' if len(near) > 1 else 'does'}"
        )
    return batch_size // ranks


def local_slice(items: Sequence[Item]) -> Sequence[Item]:
    """This rank's contiguous slice of ``items``."""
    return items[len(items) * rank() // world_size() : len(items) * (rank() + 1) // world_size()]


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def gather(x: Tensor) -> Tensor:
    """(b, ...) on each rank -> (world_size b, ...) on all, in rank order.  Without gradient."""
    if world_size() == 1:
        return x
    gathered = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(gathered, x.contiguous())
    return torch.cat(gathered)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Like ``gather``, with gradient: each rank's rows get the sum of the gradients of all ranks."""
    return x if world_size() == 1 else torch.cat(all_gather(x.contiguous()))


def gather_rows(x: Tensor) -> Tensor:
    """(b, ...) on each rank, b may differ -> (sum of b, ...) on all, in rank order."""
    if world_size() == 1:
        return x
    rows = gather(torch.tensor([len(x)])).tolist()
    padded = torch.cat([x, x.new_empty(max(rows) - len(x), *x.shape[1:])])
    return torch.cat([block[:count] for block, count in zip(gather(padded[None]), rows, strict=True)])


def gather_lists(items: list[Item]) -> list[Item]:
    """Concatenate the lists of all ranks, in rank order; items are plain values."""
    if world_size() == 1:
        return items
    gathered: list[list[Item]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, items)
    return [item for items in gathered for item in items]


def all_sum(x: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Maximum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


class SharedFlags:
    """Flags that any rank may raise; all ranks see them at the same call, with several ranks one call later.

    Never waits for the device, and for the network only if it takes longer than the time between two calls.
    """

    def __init__(self) -> None:
        self.flags = torch.zeros(0, dtype=torch.int32)
        self.work: dist.Work | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        if world_size() == 1:
            return list(flags)
        if self.work:
            self.work.wait()
        seen = self.flags.bool().tolist() or [False] * len(flags)
        self.flags = torch.tensor(flags, dtype=torch.int32)
        self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, async_op=True)
        return seen
