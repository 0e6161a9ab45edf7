"""Callbacks after each step: log, evaluate, save, and stop."""

import logging
import math
import time
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from clipx.data.tar.headers import DataError
from clipx.distributed import SharedFlags, gather_lists, rank, world_size
from clipx.distributed.signals import Signals
from clipx.duration import Every
from clipx.errors import UserError
from clipx.evals.validation import Validation
from clipx.training.direction import Mode, is_better
from clipx.training.health import HealthMonitor, health_metrics, weight_norms
from clipx.training.logs import RunLog, SilentLog
from clipx.training.loop import State, StepOutput
from clipx.training.memory import peak_memory_by_tag
from clipx.training.reading import BadStep, Reading, runs_ahead
from clipx.weights.checkpoint import AsyncSaver

logger = logging.getLogger("clipx")

MAX_UNCHECKED = 100  # steps between two checks for infinite gradients


class Diverged(UserError):
    """Too many steps in a row had an infinite or NaN gradient.

    Args:
        first: of these steps.
        end: position after the last of them.
        steps: how many.
        scale: inverse temperature.
        norms: weight norm of each tower.
    """

    def __init__(self, first: BadStep, end: int, steps: int, scale: float, norms: dict[str, float]):
        super().__init__(first, end, steps, scale, norms)  # all arguments, so that it can be pickled
        self.first, self.end, self.steps, self.scale, self.norms = first, end, steps, scale, norms

    def __str__(self) -> str:
        return f"the loss or its gradient has not been finite for {self.steps:,} steps, from step {self.first.step} on"


class Intervals(NamedTuple):
    """When to log, evaluate, save, keep a checkpoint, and stop the process."""

    log: Every
    eval: Every
    save: Every
    keep: Every
    stop: Every


class Callbacks:
    """Run after every step.

    Waits for the device only to evaluate and to save.  What is logged on a GPU is read one step later, when the GPU has
    that step to compute.  Saves only after checking that all steps since the last check were finite.  All ranks do the
    same at the same step.

    Args:
        run_log: receives the metrics.
        intervals: when to do what; minutes are measured on rank 0.
        validation: evaluates the model.
        saver: writes checkpoints.
        best: tag of the metric that selects the ``best`` checkpoint, or None.
        mode: whether that metric is better high or low.
        bad_limit: end the run above this number of distinct bad samples.
        max_bad_steps: end the run above this number of consecutive steps without a finite gradient.
        signals: requests to stop.
        monitor: warns about bad metrics.

    Attributes:
        stopping: whether to stop before the next step.
    """

    def __init__(
        self,
        run_log: RunLog | SilentLog,
        intervals: Intervals,
        validation: Validation,
        saver: AsyncSaver,
        best: str | None,
        mode: Mode,
        bad_limit: int,
        max_bad_steps: int,
        signals: Signals,
        monitor: HealthMonitor,
        stopping: bool,
    ):
        self.run_log, self.intervals, self.validation, self.saver = run_log, intervals, validation, saver
        self.best, self.mode, self.bad_limit, self.max_bad_steps = best, mode, bad_limit, max_bad_steps
        self.signals, self.monitor, self.stopping = signals, monitor, stopping
        self.shared_flags = SharedFlags()
        self.unchecked: list[tuple[BadStep, torch.Tensor]] = []  # steps, and whether their gradient was finite
        self.reading: Reading | None = None  # still to be read
        self.bad_steps: list[BadStep] = []  # the latest consecutive steps without effect
        self.records: list[dict[str, Any]] = []  # of bad samples, for skipped.jsonl
        self.eval_due = self.save_due = self.keep_due = False
        self.last_logged = self.last_evaluated = self.last_saved = -1
        self.output: StepOutput | None = None
        self.start = time.perf_counter()
        self.samples, self.wait = 0, 0.0

    def __call__(self, state: State, output: StepOutput) -> None:
        self.read(state)  # the step before
        step = state.step
        self.unchecked.append((BadStep(step, output.position, output.lr), output.grad_norm.isfinite()))
        self.records += [{"samples": state.samples, **asdict(record)} for record in output.skipped]
        self.output = output
        self.samples += output.samples
        self.wait += output.data_wait

        self.saver.check()
        minutes = (rank() == 0 and interval.passed() for interval in self.intervals)
        *passed, signalled = self.shared_flags(*minutes, self.signals.received is not None)
        log, evaluate, save, keep, stop = (
            flag or interval.due(step) for flag, interval in zip(passed, self.intervals, strict=True)
        )
        self.stopping = self.stopping or stop or signalled
        if signalled:
            self.signals.received = self.signals.received or "a signal to another rank"
        self.eval_due |= evaluate
        self.save_due |= save
        self.keep_due |= keep
        due = self.eval_due or self.save_due or self.keep_due
        if log or due or len(self.unchecked) == MAX_UNCHECKED:
            self.read_later(state, log)
        if due or not runs_ahead(output):
            self.read(state)
        if self.bad_steps or not due:  # after steps without effect the weights may be bad: postpone
            return
        kinds = self.evaluate(state) if self.eval_due else []
        kinds += ["last"] * self.save_due + [f"step_{step}"] * self.keep_due
        self.keep_due = False
        if kinds:
            self.save(state, kinds)

    def finish(self, state: State, complete: bool) -> None:
        """Log, evaluate and save at the end of ``fit``, unless just done.

        Args:
            state: of the run.
            complete: whether the run is; a signal before its end skips evaluation.
        """
        self.read(state)
        self.read_all(state, log=self.last_logged != state.step)
        interrupted = self.signals.received and not complete
        kinds = self.evaluate(state) if self.last_evaluated != state.step and not interrupted else []
        if kinds or self.last_saved != state.step:
            self.save(state, [*kinds, "last"])
        self.saver.wait()

    def read_later(self, state: State, log: bool) -> None:
        """Start to copy to the host what ``read`` needs, and gather the bad samples of all ranks.

        Raises:
            DataError: too many samples are bad.
        """
        self.reading = Reading.start(state, self.unchecked, self.output if log else None)
        self.unchecked = []
        self.report_skipped(state)

    def read(self, state: State) -> None:
        """Check, and log, what the last ``read_later`` left.  Raises as ``check_finite``."""
        reading, self.reading = self.reading, None
        if reading is None:
            return
        reading.wait()
        self.check_finite(state, reading)
        if reading.output is not None:
            self.log(state, reading, reading.output)

    def read_all(self, state: State, log: bool) -> None:
        """Check all steps, and log the last one if asked to.  Raises as ``read_later`` and ``read``."""
        self.read(state)
        self.read_later(state, log)
        self.read(state)

    def check_finite(self, state: State, reading: Reading) -> None:
        """Check the gradients of the steps since the last check.

        Raises:
            Diverged: too many of them in a row were not finite.
        """
        for step, is_finite in zip(reading.steps, reading.finite.tolist(), strict=True):
            self.bad_steps = [] if is_finite else [*self.bad_steps, step]
            if not is_finite and not state.bad_steps:
                searching = state.scaler.get_scale() != 1  # fp16 adapts its loss scale in the first steps
                logger.log(
                    logging.INFO if searching else logging.WARNING,
                    "step %d had no effect: its gradient is not finite; train/bad_steps counts these steps",
                    step.step,
                )
            state.bad_steps += not is_finite
            if len(self.bad_steps) > self.max_bad_steps:
                scale = state.model.logit_scale.exp().item()
                norms = weight_norms(state.model)
                raise Diverged(self.bad_steps[0], reading.samples, len(self.bad_steps), scale, norms)

    def log(self, state: State, reading: Reading, output: StepOutput) -> None:
        elapsed = time.perf_counter() - self.start
        metrics = {
            "train/loss": output.loss.item(),
            "train/lr": output.lr,
            "train/logit_scale": output.scale.item(),
            "train/grad_norm": output.grad_norm.item(),
            "train/samples_per_s": self.samples / elapsed,
            "train/data_wait": self.wait / elapsed,
            "train/skipped": len(state.skipped),
            "train/bad_steps": state.bad_steps,
            **peak_memory_by_tag(state.model.logit_scale.device),
            **(health_metrics(output, state.model.log_scale_range) if not self.bad_steps else {}),
        }
        self.run_log.scalars(metrics, reading.step, reading.samples)
        metrics = {tag: value for tag, value in metrics.items() if math.isfinite(value)}
        shown = {"loss": "train/loss", "samples/s": "train/samples_per_s", "data wait": "train/data_wait"}
        self.run_log.progress(reading.step, {name: metrics[tag] for name, tag in shown.items() if tag in metrics})
        for message in self.monitor.check(reading.step, metrics):
            logger.warning("step %d: %s", reading.step, message)
        self.last_logged = reading.step
        self.restart_clock()

    def evaluate(self, state: State) -> list[str]:
        """Evaluate the model; return ["best"] if it is the best so far."""
        metrics = self.validation(state.average.model, state.step, self.run_log)
        self.run_log.skipped([{"samples": state.samples, **record} for record in self.validation.skipped])
        self.last_evaluated, self.eval_due = state.step, False
        if metrics:
            self.run_log.scalars(metrics, state.step, state.samples)
            shown = {tag: metrics[tag] for tag in (self.best, "val/loss") if tag in metrics}
            logger.info("step %s  %s", f"{state.step:,}", "  ".join(f"{tag} {one:.4g}" for tag, one in shown.items()))
        value = metrics.get(self.best) if self.best else None
        known = (state.best.get("metric"), state.best.get("mode", "max")) == (self.best, self.mode)
        better = value is not None and is_better(value, state.best["value"] if known else None, self.mode)
        if better:
            state.best = {"metric": self.best, "mode": self.mode, "value": value, "step": state.step}
        self.run_log.best(state.best, state.step)
        self.restart_clock()
        return ["best"] if better else []

    def save(self, state: State, kinds: list[str]) -> None:
        self.run_log.flush()  # a resumed run truncates the logs to the checkpoint
        state.seconds = self.run_log.seconds
        self.saver(state.state_dict(), kinds)
        if "last" in kinds:
            self.last_saved, self.save_due = state.step, False
        self.restart_clock()

    def rescue(self, state: State) -> bool:
        """Save after a data error; impossible with several ranks, as the others are in the middle of a step."""
        if world_size() > 1:
            return False
        self.read_all(state, log=False)
        self.save(state, ["last"])
        return True

    def restart_clock(self) -> None:
        """Exclude callbacks from the rates."""
        self.start = time.perf_counter()
        self.samples, self.wait = 0, 0.0

    def report_skipped(self, state: State) -> None:
        """Record and count the bad samples of all ranks."""
        records, self.records = gather_lists(self.records), []
        if not records:
            return
        if not state.skipped:
            first = records[0]
            logger.warning(
                "bad samples are skipped, first %s: %s; skipped.jsonl in the run's directory lists them all",
                first["place"],
                first["reason"],
            )
        state.skipped.update(record["sample"] for record in records)
        self.run_log.skipped(records)
        if len(state.skipped) > self.bad_limit:
            last = records[-1]
            raise DataError(
                f"{len(state.skipped)} bad samples, more than data.max_skipped allows, last "
                f"{last['place']}: {last['reason']}; skipped.jsonl in the run's directory lists them. Set a larger "
                "data.max_skipped and rerun to resume"
            )
