"""The loader: workers turn ranges of the plan into chunks, the same for any number of workers."""

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
from clipx.data.remote.prefetch import Prefetcher, remotes_of
from clipx.data.tar.headers import DataError
from clipx.errors import UserError

MAX_CHUNK = 256  # samples per chunk


def load_chunks(reader: Reader, ranges: Iterable[range], workers: int, pin: bool, fill: bool = True) -> Iterator[Chunk]:
    """Yield the chunks of ``ranges`` in order; for training, remote shards are prefetched.

    Args:
        reader: maps a range to a chunk.
        ranges: positions of each chunk; may be endless.
        workers: processes that read ahead; 0 reads in this process.
        pin: copy chunks to page-locked memory, so that transfers overlap.
        fill: whether this process copies remote shards; one per cache does.

    Raises:
        UserError: the data cannot be read, or a worker was killed.
    """
    ranges = iter(ranges)
    first = next(ranges, range(0))
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=itertools.chain([first] if first else [], ranges),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=init_worker,
        multiprocessing_context=get_all_start_methods()[0] if workers else None,  # the system's default, not joblib's
        generator=torch.Generator(),  # the default one would advance torch's global random state
    )
    watched: list[int] = []
    chunks: Iterator[Chunk | UserError] | None
    chunk: Chunk | UserError | None
    try:
        with make_prefetcher(reader, first, fill) as ahead:
            before = signal.getsignal(signal.SIGCHLD)
            others = active_children()
            chunks = iter(loader)
            watched = [child.sentinel for child in active_children() if child not in others]
            if current_thread() is main_thread():  # torch's handler would raise in the middle of a step
                signal.signal(signal.SIGCHLD, before)
            ahead.start()
            for chunk in chunks:
                if isinstance(chunk, UserError):
                    raise chunk
                ahead.position = chunk.position
                yield chunk
    except (RuntimeError, OSError, EOFError) as error:  # a dead worker shows in many ways
        if not watched or not wait(watched, timeout=1):
            raise
        raise killed(workers) from error
    finally:
        chunk = chunks = None  # a traceback keeps this frame alive, and with it the workers


def killed(workers: int) -> DataError:
    """Say that a worker was killed."""
    return DataError(
        f"one of the workers={workers} processes that read data was killed, most likely because memory ran out; "
        "set fewer workers and rerun the command to resume from the last checkpoint"
    )


def init_worker(_worker: int) -> None:
    """Block signals that are meant for the run, and freeze long-lived objects, which saves 5% of a worker's time."""
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
        Thread(target=exit_with_run, daemon=True).start()
    worker = get_worker_info()
    assert worker is not None and isinstance(worker.dataset, Reader)
    worker.dataset.tokenizer("")
    gc.freeze()


def exit_with_run() -> None:
    """Exit when the run sends SIGTERM; schedulers signal all processes while the run still needs its workers."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def make_prefetcher(reader: Reader, first: range, fill: bool) -> Prefetcher:
    """Return the prefetcher of the remote training shards, starting at the range ``first``."""
    if not isinstance(reader, TrainReader):
        return Prefetcher({}, None, first.start, 0, fill)
    reach = max(reader.plan.window, 2 * len(first))
    return Prefetcher(remotes_of(reader.source), reader.plan, first.start, reach, fill)


def train_ranges(
    position: int,
    batch_size: int,
    micro_batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    left_out: Sequence[range] = (),
) -> Iterator[range]:
    """Yield the positions that one rank reads, chunk by chunk, endlessly.

    Args:
        position: start of the next global batch.
        batch_size: global batch size; divisible by ``world``.
        micro_batch_size: samples per forward pass; chunks do not cross its boundaries.
        rank: of this process.
        world: number of processes.
        left_out: positions at which no batch starts, in ascending order.
    """
    share = batch_size // world
    while True:
        start = skip_left_out(position, left_out) + rank * share
        for micro in split_range(range(start, start + share), micro_batch_size or share):
            yield from split_range(micro)
        position = skip_left_out(position, left_out) + batch_size


def skip_left_out(position: int, left_out: Sequence[range]) -> int:
    """Move a batch's start past the positions that are left out."""
    for positions in left_out:
        if position in positions:
            position = positions.stop
    return position


def split_range(positions: range, size: int = MAX_CHUNK) -> Iterator[range]:
    """Split a range into ranges of at most ``size``."""
    for start in range(positions.start, positions.stop, size):
        yield range(start, min(start + size, positions.stop))


def group_steps(chunks: Iterator[Chunk], share: int) -> Iterator[list[Chunk]]:
    """Group chunks into steps of ``share`` samples."""
    while True:
        step = [next(chunks)]
        while sum(map(len, step)) < share:
            step.append(next(chunks))
        yield step
