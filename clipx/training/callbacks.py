"""What happens between two steps: logged, evaluated, saved, each in its own time; and whether the run goes on."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from clipx.data.tar.headers import DataError
from clipx.distributed import SharedFlags, gather_lists, rank, world_size
from clipx.distributed.signals import Signals
from clipx.duration import Every
from clipx.errors import UserError
from clipx.models.clip import CLIP
from clipx.training.direction import Mode, is_better
from clipx.training.health import HealthMonitor, health, tower_norms
from clipx.training.logs import RunLog, SilentLog
from clipx.training.loop import State, StepOutput
from clipx.training.memory import peaks
from clipx.weights.checkpoint import AsyncSaver

logger = logging.getLogger("clipx")

MOST_UNREAD = 100       # steps after which it is looked whether they were finite, where nothing else is due


class BadStep(NamedTuple):
    """A step whose gradient was not finite."""

    step: int           # from 1
    position: int       # of its batch in the plan
    lr: float


class Diverged(UserError):
    """Too many steps in a row have no finite loss and gradient.

    Args:
        first: of these steps.
        end: the position behind the last of them.
        norms: of the weights of both towers.
        scale: inverse temperature.
        steps: how many.
    """

    def __init__(self, first: BadStep, end: int, steps: int, scale: float, norms: dict[str, float]):
        super().__init__(first, end, steps, scale, norms)       # all of them: it may come from another process
        self.first, self.end, self.steps, self.scale, self.norms = first, end, steps, scale, norms

    def __str__(self) -> str:
        return f"the loss or its gradient has not been finite for {self.steps:,} steps, from step {self.first.step} on"


@dataclass(frozen=True)
class Intervals:
    """When what is done; ``stop`` when the process ends."""

    log: Every
    eval: Every
    save: Every
    keep: Every
    stop: Every


class Callbacks:
    """What happens between steps.

    Nothing here waits for the device unless something is due.  Nothing is saved before the numbers since the last
    time are known to be finite.  Ranks do the same at the same step.

    Args:
        log: where numbers go.
        intervals: when what is done; minutes are rank 0's.
        evaluate: scores the model at a step; gives numbers by tag.
        saver: writes the state.
        best: tag of the number whose best value is kept as ``best``, or None.
        mode: whether that number is better high or low.
        bad_limit: how many distinct bad samples end the run.
        max_bad_steps: how many steps in a row may be without a finite gradient.
        signals: whether a signal has asked to end.
        monitor: says in words what is wrong with the run.

    Attributes:
        stopping: whether the process is to end before the next step.
    """

    def __init__(
        self,
        log: RunLog | SilentLog,
        intervals: Intervals,
        evaluate: Callable[[CLIP, int, RunLog], dict[str, float]],
        saver: AsyncSaver,
        best: str | None,
        mode: Mode,
        bad_limit: int,
        max_bad_steps: int,
        signals: Signals,
        monitor: HealthMonitor,
        stopping: bool,
    ):
        self.log, self.intervals, self.evaluate, self.saver = log, intervals, evaluate, saver
        self.best, self.mode, self.bad_limit, self.max_bad_steps = best, mode, bad_limit, max_bad_steps
        self.signals, self.monitor, self.stopping = signals, monitor, stopping
        self.shared_flags = SharedFlags()
        self.unread: list[tuple[BadStep, torch.Tensor]] = []        # steps, and whether they were finite
        self.row: list[BadStep] = []                                # steps without effect, up to the last one
        self.records: list[dict[str, int | str]] = []               # of bad samples
        self.eval_due = self.save_due = self.keep_due = False
        self.last_logged = self.last_evaluated = self.last_saved = -1
        self.latest: StepOutput | None = None
        self.since = time.perf_counter()
        self.samples, self.wait = 0, 0.0

    def __call__(self, state: State, numbers: StepOutput) -> None:
        step = state.step
        self.unread.append((BadStep(step, numbers.position, numbers.lr), numbers.norm.isfinite()))
        self.records += [{"samples": state.samples, **asdict(record)} for record in numbers.skipped]
        self.latest = numbers
        self.samples += numbers.samples
        self.wait += numbers.wait

        self.saver.check()
        every = list(vars(self.intervals).values())
        minutes = (rank() == 0 and one.passed() for one in every)
        *passed, asked = self.shared_flags(*minutes, self.signals.asked is not None)
        log, evaluate, save, keep, stop = (flag or one.due(step) for flag, one in zip(passed, every, strict=True))
        self.stopping = self.stopping or stop or asked
        if asked:
            self.signals.asked = self.signals.asked or "a signal to another rank"
        self.eval_due |= evaluate
        self.save_due |= save
        self.keep_due |= keep
        due = self.eval_due or self.save_due or self.keep_due
        if log or due or len(self.unread) == MOST_UNREAD:
            self.check_finite(state)
        if log:
            self.write(state, numbers)
        if self.row or not due:         # after steps without effect the weights may be no good: what is due waits
            return
        kinds = self.run_evaluation(state) if self.eval_due else []
        kinds += ["last"] * self.save_due + [f"step_{step}"] * self.keep_due
        self.keep_due = False
        if kinds:
            self.run_save(state, kinds)

    def finish(self, state: State) -> None:
        """Log, evaluate and save at the end of ``fit``, where that has not just been done; a signal leaves no time."""
        self.check_finite(state)
        if self.latest is not None and self.last_logged != state.step:
            self.write(state, self.latest)
        late = self.signals.asked and state.step < self.intervals.eval.steps
        kinds = self.run_evaluation(state) if self.last_evaluated != state.step and not late else []
        if kinds or self.last_saved != state.step:
            self.run_save(state, [*kinds, "last"])
        self.saver.wait()

    def check_finite(self, state: State) -> None:
        """Look at what the steps since the last time have brought, on all ranks.

        Raises:
            Diverged: too many of them in a row were not finite.
            DataError: too many samples are bad.
        """
        finite = torch.stack([flag for _, flag in self.unread]).tolist() if self.unread else []
        for (step, _), good in zip(self.unread, finite, strict=True):
            self.row = [] if good else [*self.row, step]
            if not good and not state.bad_steps:
                searching = state.scaler.get_scale() != 1           # fp16 looks for its loss scale in the first steps
                logger.log(logging.INFO if searching else logging.WARNING, "step %d had no effect: its gradient is not "
                           "finite; train/bad_steps counts such steps", step.step)
            state.bad_steps += not good
            if len(self.row) > self.max_bad_steps:
                scale = state.model.logit_scale.exp().item()
                raise Diverged(self.row[0], state.samples, len(self.row), scale, tower_norms(state.model))
        self.unread.clear()
        self.note_skipped(state)

    def write(self, state: State, numbers: StepOutput) -> None:
        elapsed = time.perf_counter() - self.since
        found = {
            "train/loss": numbers.loss.item(),
            "train/lr": numbers.lr,
            "train/logit_scale": numbers.scale.item(),
            "train/grad_norm": numbers.norm.item(),
            "train/samples_per_s": self.samples / elapsed,
            "train/data_wait": self.wait / elapsed,
            "train/skipped": len(state.skipped),
            "train/bad_steps": state.bad_steps,
            **peaks(numbers.loss.device),
            **(health(numbers) if not self.row else {}),
        }
        self.log.scalars(found, state.step, state.samples)
        found = {tag: value for tag, value in found.items() if math.isfinite(value)}
        shown = {"loss": "train/loss", "samples/s": "train/samples_per_s", "data wait": "train/data_wait"}
        self.log.progress(state.step, {name: found[tag] for name, tag in shown.items() if tag in found})
        for words in self.monitor.look(state.step, found):
            logger.warning("step %d: %s", state.step, words)
        self.last_logged = state.step
        self.restart_clock()

    def run_evaluation(self, state: State) -> list[str]:
        """Score the model; names it ``best`` where it is better than all before."""
        numbers = self.evaluate(state.model, state.step, self.log)
        self.log.skipped([{"samples": state.samples, **record} for record in self.evaluate.skipped])
        self.last_evaluated, self.eval_due = state.step, False
        if numbers:
            self.log.scalars(numbers, state.step, state.samples)
            shown = {tag: numbers[tag] for tag in (self.best, "val/loss") if tag in numbers}
            logger.info("step %s  %s", f"{state.step:,}", "  ".join(f"{tag} {one:.4g}" for tag, one in shown.items()))
        value = numbers.get(self.best)
        known = (state.best.get("metric"), state.best.get("mode", "max")) == (self.best, self.mode)
        better = value is not None and is_better(value, state.best["value"] if known else None, self.mode)
        if better:
            state.best = {"metric": self.best, "mode": self.mode, "value": value, "step": state.step}
        self.log.best(state.best, state.step)
        self.restart_clock()
        return ["best"] if better else []

    def run_save(self, state: State, kinds: list[str]) -> None:
        self.log.flush()            # what the checkpoint goes on behind is in the files
        state.seconds = self.log.seconds
        self.saver(state.state_dict(), kinds)
        if "last" in kinds:
            self.last_saved, self.save_due = state.step, False
        self.restart_clock()

    def rescue(self, state: State) -> bool:
        """Save between two steps when there is no next one; of several ranks the others are in theirs, and none can."""
        if world_size() > 1:
            return False
        self.check_finite(state)
        self.run_save(state, ["last"])
        return True

    def restart_clock(self) -> None:
        """Rates count training alone, not what is done between steps."""
        self.since = time.perf_counter()
        self.samples, self.wait = 0, 0.0

    def note_skipped(self, state: State) -> None:
        """List the bad samples that any rank has met, and count them."""
        records, self.records = gather_lists(self.records), []
        if not records:
            return
        if not state.skipped:
            first = records[0]
            logger.warning("bad samples are skipped, the first of them %s: %s; skipped.jsonl in the run's directory "
                           "lists them all", first["place"], first["reason"])
        state.skipped.update(record["sample"] for record in records)
        self.log.skipped(records)
        if len(state.skipped) > self.bad_limit:
            worst = records[-1]
            raise DataError(
                f"{len(state.skipped)} bad samples, more than data.max_skipped allows; the last of them "
                f"{worst['place']}: {worst['reason']}; skipped.jsonl in the run's directory lists them. With a larger "
                "data.max_skipped the same words go on"
            )
