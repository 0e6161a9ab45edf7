"""From the plan to chunks: workers read, decode and tokenise; their number changes nothing in what they deliver."""

import gc
import itertools
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import active_children, get_all_start_methods
from multiprocessing.connection import wait
from threading import Thread, current_thread, main_thread

import torch
from torch.utils.data import DataLoader, get_worker_info

from clipx.data.readers import Chunk, Reader, TrainReader
from clipx.data.remote.prefetch import Prefetcher
from clipx.data.shards import remote_parts
from clipx.data.tar.headers import DataError
from clipx.errors import UserError

MAX_CHUNK = 256         # samples that pass from a worker at once
CHUNKS = 3                  # of each worker at once: two wait, as DataLoader prefetches them, and one is used
TRIES = 64                  # bad samples in a row for one position before the run ends


def load_chunks(
    reader: Reader, ranges: Iterable[range], workers: int, pin: bool, fill: bool = True
) -> Iterator[Chunk]:
    """The chunks of some ranges, in their order; of training, remote shards are copied ahead of them.

    Args:
        reader: makes a chunk of a range.
        ranges: may be endless.
        workers: processes that read ahead; 0 reads in this one.
        pin: put the chunks into page-locked memory, for copies that overlap.
        fill: whether this process copies remote shards; of those that share a cache, one does.

    Raises:
        UserError: the data cannot be read, or a worker was killed.
    """
    ranges = iter(ranges)
    first = next(ranges, range(0))
    loader = DataLoader(
        reader, batch_size=None, sampler=itertools.chain([first] if first else [], ranges), num_workers=workers,
        collate_fn=identity, pin_memory=pin, worker_init_fn=settle,
        multiprocessing_context=get_all_start_methods()[0] if workers else None,    # the system's, not joblib's
        generator=torch.Generator(),        # the default one would advance torch's global random state
    )
    watched: list[int] = []
    try:
        with make_prefetcher(reader, first, fill) as ahead:
            before = signal.getsignal(signal.SIGCHLD)
            others = active_children()
            chunks = iter(loader)
            watched = [child.sentinel for child in active_children() if child not in others]
            if current_thread() is main_thread():   # torch's handler would tell of a killed worker inside a step
                signal.signal(signal.SIGCHLD, before)
            ahead.start()
            for chunk in chunks:
                if isinstance(chunk, UserError):
                    raise chunk
                ahead.position = chunk.position
                yield chunk
    except (RuntimeError, OSError, EOFError) as error:      # a dead worker's pipes and sockets break as they like
        if not watched or not wait(watched, timeout=1):
            raise
        raise DataError(
            f"one of the workers={workers} processes that read data was killed, most likely for want of memory; fewer "
            "workers need less, and the same command goes on from the last checkpoint"
        ) from error
    finally:
        chunk = chunks = None       # an error holds this frame: without this the workers wait for the garbage collector


def settle(_worker: int) -> None:
    """Make at once what a worker keeps for ever, and hide it from the garbage collector: a twentieth of its time."""
    if hasattr(signal, "sigwaitinfo"):          # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
        Thread(target=exit_with_run, daemon=True).start()
    get_worker_info().dataset.tokenizer("")
    gc.freeze()


def exit_with_run() -> None:
    """End at the run's word alone: schedulers and terminals signal all processes, and the run has a last step to do."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def make_prefetcher(reader: Reader, first: range, fill: bool) -> Prefetcher:
    """What copies the remote shards of training, from the first range on."""
    parts = list(remote_parts(reader.source)) if isinstance(reader, TrainReader) else []
    remotes = {
        start + number: part.remote(number) for start, part in parts for number in part.catalogue.urls
        if part.sizes[number]
    }
    plan = reader.plan if parts else None
    reach = max(plan.window, 2 * len(first)) if parts else 0
    return Prefetcher([part.cache for _, part in parts], remotes, plan, first.start, reach, fill)


def identity(chunk: Chunk) -> Chunk:
    return chunk


def train_ranges(
    position: int, batch_size: int, micro_batch_size: int | None = None, rank: int = 0, world: int = 1,
    left_out: Sequence[Sequence[int]] = (),
) -> Iterator[range]:
    """The positions that one rank reads, chunk by chunk, without end.

    Args:
        position: of the first sample of the next global batch.
        batch_size: samples of a global batch; ``world`` divides it.
        micro_batch_size: samples that go forward at once; no chunk reaches across the end of so many.
        rank: of this process.
        world: how many processes share a batch.
        left_out: positions, from and to, that no batch begins at.
    """
    share = batch_size // world
    while True:
        start = skip_left_out(position, left_out) + rank * share
        for micro in split_range(range(start, start + share), micro_batch_size or share):
            yield from split_range(micro)
        position = skip_left_out(position, left_out) + batch_size


def skip_left_out(position: int, left_out: Sequence[Sequence[int]]) -> int:
    """Where a batch begins that would begin at a position, but for what is left out."""
    for start, end in sorted(left_out):
        if start <= position < end:
            position = end
    return position


def split_range(positions: range, size: int = MAX_CHUNK) -> Iterator[range]:
    """A range in pieces, of a chunk's size."""
    for start in range(positions.start, positions.stop, size):
        yield range(start, min(start + size, positions.stop))


def group_steps(chunks: Iterator[Chunk], share: int) -> Iterator[list[Chunk]]:
    """Chunks gathered into steps of ``share`` samples."""
    while True:
        step = [next(chunks)]
        while sum(map(len, step)) < share:
            step.append(next(chunks))
        yield step
