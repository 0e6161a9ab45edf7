"""A training run: build its parts, restore the state, train, report."""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from logging.handlers import MemoryHandler
from pathlib import Path

import yaml

from clipx import distributed
from clipx.config.instantiate import build
from clipx.config.meaning import flatten
from clipx.config.schema import TrainConfig
from clipx.data.readers import Chunk
from clipx.data.sample import Data
from clipx.data.tar.headers import DataError
from clipx.devices import autocast_dtype, limit_threads, select_amp, select_device, select_workers
from clipx.distributed.signals import Signals
from clipx.distributed.watchdog import Watchdog
from clipx.duration import Every
from clipx.errors import Interrupted, UserError
from clipx.evals.validation import Validation
from clipx.track import Tracker, hparams_row
from clipx.training.callbacks import Callbacks, Diverged, Intervals
from clipx.training.direction import mode_of
from clipx.training.existing_run import check_directory
from clipx.training.frozen import FrozenTowers, in_turn
from clipx.training.header import header_lines, lost_samples
from clipx.training.health import HealthMonitor
from clipx.training.lock import directory_lock
from clipx.training.logs import RunLog, SilentLog, buffered_logs, missing_message
from clipx.training.loop import State, fit
from clipx.training.memory import keep_freed_memory
from clipx.training.parts import (
    RunParts,
    build_forward,
    identify,
    initial_state,
    initial_weights,
    open_frozen,
    train_batches,
)
from clipx.training.resume import restore
from clipx.training.summary import read_summary
from clipx.training.teacher import TeacherTowers, load_teacher, open_teacher
from clipx.weights.checkpoint import AsyncSaver

logger = logging.getLogger("clipx")

MAX_LISTED = 3  # samples listed in an error message
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def run(config: TrainConfig, directory: Path) -> float | None:
    """Train from scratch, or resume the run in ``directory``; in one process or as one of several ranks.

    Returns:
        The last value of ``objective``, or None.

    Raises:
        UserError: the user can fix it; the files in ``directory`` are unchanged.
        Interrupted: a signal ended the run, after a checkpoint was saved.
    """
    check_directory(directory)
    try:
        with Signals() as signals, buffered_logs() as early, distributed.process_group() as watchdog:
            signals.report_errors = watchdog is not None
            value = run_on_rank(config, directory, signals, watchdog, early)
    except OSError as error:
        if error.errno == errno.ENOENT and not directory.is_dir():
            raise UserError(missing_message(directory)) from error
        if error.errno not in WRITE_ERRORS:
            raise
        raise UserError(
            f"{error.filename or directory}: {error.strerror}; fix this, then rerun the same command to "
            "resume from the last checkpoint"
        ) from error
    if signals.received:
        raise Interrupted(config.signal_exit_code)
    return value


def run_on_rank(
    config: TrainConfig, directory: Path, signals: Signals, watchdog: Watchdog | None, early: MemoryHandler
) -> float | None:
    """Run on this rank; rank 0 returns the objective."""
    distributed.local_batch_size(config.batch_size)
    limit_threads()
    device = select_device(config.device)
    workers, config = select_workers(config.workers, device), replace(config, amp=select_amp(config.amp, device))
    trackers: list[Tracker] = [*build(config.track, "track", config.trust).values()]
    teacher = load_teacher(config, device)
    with distributed.rank0_first(watchdog):
        data: Data = build(config.data, "data", config.trust)
        evals = build(config.evals, "evals", config.trust)
    plan = data.plan(config.seed)
    identity = identify(config, data, plan, teacher)
    parts = RunParts(config, directory, device, workers, data, plan, evals, trackers, identity, teacher, early)
    left_out: list[range] = []
    with locked_by_rank0(directory):
        while isinstance(result := train(parts, signals, left_out), Diverged):
            left_out.append(range(result.first.position, result.end))
            distributed.barrier()  # until rank 0 has finished writing checkpoints
            logger.warning("%s; going back to the last checkpoint and skipping the samples of these steps", result)
    return result


def train(parts: RunParts, signals: Signals, left_out: Sequence[range]) -> float | None | Diverged:
    """Train from the last checkpoint to the end of the run, or until ``stop_at`` or a signal.

    Args:
        parts: of the run.
        signals: requests to stop.
        left_out: positions to skip.

    Returns:
        The objective, on rank 0; or why the run has to go back to its last checkpoint.
    """
    config, directory = parts.config, parts.directory
    state, length = initial_state(config, parts.device, parts.teacher), parts.identity.steps
    found = restore(state, config, directory, parts.identity)
    origin = "" if found else initial_weights(state.model, config)
    logged = state.samples if found else -1  # a new run drops all earlier logs
    if state.step >= length:
        check_effect(state, directory)
        logger.info("%s is finished (%d steps); nothing is changed. name=... starts another run", directory, state.step)
        return known_objective(parts, state)
    state.leave_out(left_out)
    keep_freed_memory()
    frozen = open_frozen(parts, state.model)
    teacher = open_teacher(config, parts.data, parts.teacher, autocast_dtype(config.amp), parts.epochs)
    batches = train_batches(parts, state, frozen, teacher)
    lr_multiplier = build(config.sched, "sched", config.trust)(length)
    last_is_good = found == directory / "checkpoints" / "clip_last.pt"

    with (
        open_log(parts, state, logged) as log,
        AsyncSaver(directory / "checkpoints", asdict(parts.identity), last_is_good) as saver,
    ):
        for line in header_lines(parts, state, origin, frozen, teacher):
            logger.info(line)
        if found is None:
            log.skipped(lost_samples(parts.data))
        callbacks = build_callbacks(parts, state, log, saver, signals)
        signals.deferred = True
        if diverged := train_steps(parts, state, batches, lr_multiplier, callbacks, frozen, teacher):
            return diverged
        if signals.received:
            logger.warning("%s: checkpoint saved, stopping", signals.received)
        log.finish("finished" if state.step >= length else "stopped")
        return log.objective


def train_steps(
    parts: RunParts,
    state: State,
    batches: Iterator[list[Chunk]],
    lr_multiplier: Callable[[int], float],
    callbacks: Callbacks,
    frozen: FrozenTowers | None,
    teacher: TeacherTowers | None,
) -> Diverged | None:
    """Train until the run or this process ends.

    Returns:
        Why the run has to go back to its last checkpoint, or None.

    Raises:
        UserError: it has gone back too often, the data cannot be read, or most steps had no effect.
    """
    config, length = parts.config, parts.identity.steps
    try:
        fit(
            state=state,
            forward=build_forward(config, state, frozen.names if frozen else ()),
            loss_fn=build(config.loss, "loss", config.trust),
            batches=batches,
            micro_batch_size=config.micro_batch_size,
            should_stop=lambda step: step >= length or callbacks.stopping,
            lr_multiplier=lr_multiplier,
            amp=autocast_dtype(config.amp),
            clip_norm=config.clip_norm,
            callbacks=callbacks,
            encode_frozen=in_turn(frozen, teacher),
            patch_dropout=parts.patch_dropout,
        )
        complete = state.step >= length
        callbacks.finish(state, complete)
        if complete:
            check_effect(state, parts.directory)
    except Diverged as diverged:
        if len(state.left_out) >= config.max_rollbacks:
            raise UserError(divergence_message(diverged, parts)) from diverged
        return diverged.with_traceback(None)  # the traceback would keep this state in memory
    except DataError:
        saved = callbacks.rescue(state)
        if not (saved and callbacks.signals.received):  # the signal may have ended the workers too
            raise
    return None


def locked_by_rank0(directory: Path) -> AbstractContextManager[None]:
    """Keep other processes from training in the directory; rank 0 holds the lock for all ranks."""
    return nullcontext() if distributed.rank() else directory_lock(directory)


def open_log(parts: RunParts, state: State, samples: int) -> RunLog | SilentLog:
    """The log that rank 0 writes; drops what was logged after ``samples``."""
    if distributed.rank():
        return SilentLog()
    whole = asdict(parts.config)
    text = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    (parts.directory / "config.yaml").write_text(text, encoding="utf-8")
    process = {"id": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    config = flatten(whole)
    mode = mode_of(parts.config.objective, parts.config.mode)
    about = {"objective": parts.config.objective, "mode": mode, "process": process, "config": config}
    row = hparams_row(config, parts.config.choices, parts.config.varied)
    steps, seconds, epoch = parts.identity.steps, state.seconds, parts.plan.samples
    return RunLog(
        parts.directory, parts.trackers, whole, about, row, steps, state.step, samples, seconds, epoch, parts.early
    )


def build_callbacks(
    parts: RunParts, state: State, log: RunLog | SilentLog, saver: AsyncSaver, signals: Signals
) -> Callbacks:
    """The callbacks that run after every step."""
    config, data = parts.config, parts.data
    every = partial(Every, steps=parts.identity.steps, epoch=parts.plan.samples / config.batch_size)
    keys = ("log_every", "eval_every", "save_every", "keep_every", "stop_at")
    intervals = Intervals(*(every(getattr(config, key)) for key in keys))
    tokenizer = state.model.text.tokenizer
    return Callbacks(
        run_log=log,
        intervals=intervals,
        validation=Validation(
            data.vals, parts.evals, tokenizer, parts.workers, autocast_dtype(config.amp), with_loss=True
        ),
        saver=saver,
        best=config.best,
        mode=mode_of(config.best, config.mode),
        bad_limit=data.bad_limit - sum(data.lost.values()),
        max_bad_steps=config.max_bad_steps,
        signals=signals,
        monitor=HealthMonitor(config.batch_size),
        stopping=intervals.stop.over(state.step),
    )


def check_effect(state: State, directory: Path) -> None:
    """
    Raises:
        UserError: most steps of the run had no effect.
    """
    if 2 * state.bad_steps > state.step:
        raise UserError(
            f"{directory}: {state.bad_steps:,} of {state.step:,} steps had no effect because their gradient was not "
            "finite: the model has hardly trained. The usual remedies are a lower optim.lr, a longer sched.warmup, "
            "clip_norm=1.0, or amp=bf16 in place of fp16; name=... starts another run"
        )


def known_objective(parts: RunParts, state: State) -> float | None:
    """The objective of a finished run, on rank 0; a summary.json that is missing is written again."""
    if distributed.rank():
        return None
    if summary := read_summary(parts.directory):
        return summary["final"].get(parts.config.objective)
    with open_log(parts, state, state.samples) as log:
        log.best(state.best, state.step)
        log.finish("finished")
        return log.objective


def divergence_message(diverged: Diverged, parts: RunParts) -> str:
    """The error for a run that diverged too often."""
    first, size = diverged.first, parts.config.batch_size
    positions = range(first.position, first.position + min(size, MAX_LISTED))
    keys = ", ".join(parts.data.train.locate(parts.plan[position].sample) for position in positions)
    norms = ", ".join(f"{value:.4g} of the {tower} tower" for tower, value in diverged.norms.items())
    return (
        f"{diverged}, and max_rollbacks={parts.config.max_rollbacks} is used up. That step: samples {keys} and "
        f"{size - len(positions):,} more, learning rate {first.lr:.3g}, logit scale {diverged.scale:.4g}; norms of the "
        f"weights {norms}. The last good checkpoint is kept. A lower optim.lr, a longer sched.warmup, clip_norm=1.0 or "
        "amp=bf16 in place of fp16 are the usual remedies"
    )
