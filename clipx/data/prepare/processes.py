"""Tasks over processes that end when they should: on Ctrl-C, on an error, and with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from clipx.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """The results of some tasks, as they come; close it (``contextlib.closing``) and what still runs is ended.

    Args:
        function: of a task; both can be pickled.
        tasks: in the order in which they are begun.
        workers: processes; 0 works in this one.

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
                "a worker process was killed, which is what happens when memory runs out; the same words go on, with "
                "workers=N for fewer"
            ) from error
        except BaseException:       # Ctrl-C and GeneratorExit too: nobody waits for what has been begun
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def submit(pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Sequence[Task]) -> list:
    """Give the tasks to a pool whose workers leave Ctrl-C to this process: they inherit what is ignored now."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return [pool.submit(function, task) for task in tasks]
    finally:
        signal.signal(signal.SIGINT, before)


def end_with_parent() -> None:
    """In a worker: end when the parent has ended, however it did; a pool's workers would wait for ever."""
    threading.Thread(target=watch_parent, daemon=True).start()


def watch_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
