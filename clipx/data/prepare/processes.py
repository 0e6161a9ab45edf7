"""Run tasks in worker processes that end on Ctrl-C, on an error, and with their parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from clipx.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Generator[Result, None, None]:
    """Yield the results of tasks as they complete; closing the generator ends running tasks.

    Args:
        function: of a task; both picklable.
        tasks: in order of submission.
        workers: processes; 0 works in this process.

    Raises:
        UserError: a worker was killed.
    """
    if workers == 0 or not tasks:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=end_with_parent) as pool:
        try:
            for future in as_completed(submit(pool, function, tasks)):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely because memory ran out; rerun the same command with fewer "
                "workers (workers=N) to resume"
            ) from error
        except BaseException:  # Ctrl-C and GeneratorExit, too: do not wait for running tasks
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def submit(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Sequence[Task]
) -> list[Future[Result]]:
    """Submit tasks to a pool whose workers inherit that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return [pool.submit(function, task) for task in tasks]
    finally:
        signal.signal(signal.SIGINT, before)


def end_with_parent() -> None:
    """Initialise a worker: exit when the parent does, as a pool's workers would wait forever."""
    threading.Thread(target=watch_parent, daemon=True).start()


def watch_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
