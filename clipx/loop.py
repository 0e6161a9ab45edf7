"""The loop, all of it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipx.batch import parts_of
from clipx.compiled import Compiled
from clipx.data.loader import Chunk, Skipped
from clipx.data.tar import DataError
from clipx.duration import Every
from clipx.errors import UserError
from clipx.gradient import Encoder, Forward, backward
from clipx.log import RunLog
from clipx.memory import fits, peaks
from clipx.models.clip import CLIP


class Diverged(UserError):
    """The loss is no longer a number."""


@dataclass
class State:
    """All that a run changes, and all that it needs to go on."""

    model: CLIP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0                                       # optimiser steps attempted
    samples: int = 0                                    # positions of the plan used: where the next batch starts
    best: dict[str, Any] = field(default_factory=dict)  # of the objective: value, step
    skipped: set[int] = field(default_factory=set)      # ids of the bad samples met

    def advance(self, samples: int) -> None:
        self.step += 1
        self.samples += samples

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint's share of it: plain dicts, lists, tensors and numbers."""
        return {
            "model_state_dict": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "samples": self.samples,
            "rng": {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            "best": self.best,
            "skipped": sorted(self.skipped),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model_state_dict"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.samples = saved["step"], saved["samples"]
        self.best, self.skipped = saved["best"], set(saved["skipped"])
        torch.set_rng_state(saved["rng"]["torch"])
        if len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])


@dataclass(frozen=True)
class Numbers:
    """What one step showed.  The tensors may still be on their way: reading one waits for the device."""

    loss: Tensor        # () nats
    norm: Tensor        # () of the gradient, before clipping
    scale: Tensor       # () inverse temperature
    lr: float           # of the first group
    wait: float         # seconds spent waiting for data
    samples: int        # of the batch, all ranks together
    skipped: list[Skipped]


def fit(
    state: State,
    forward: Forward,
    loss_of: Callable[..., Tensor],
    batches: Iterator[list[Chunk]],
    micro_batch_size: int | None,
    stop: Callable[[int], bool],
    multiplier: Callable[[int], float],
    amp: torch.dtype | None,
    clip_norm: float | None,
    after_step: Callable[[State, Numbers], None],
) -> None:
    """Train until ``stop(step)``.

    Args:
        state: is advanced in place.
        forward: normalised images (B, 3, S, S), packed captions -> unit features (B, E), (B, E), scale (); the bare
            model, or what is wrapped around it.
        loss_of: unit features (B, E), (B, E), scale (), ids (B, 2) or None -> loss ().
        batches: steps, as lists of chunks.
        micro_batch_size: samples that go forward at once; None for the whole batch.
        stop: whether the run ends before the step with this number (from 0).
        multiplier: of the peak learning rate, by step (from 0).
        amp: autocast's type, or None for float32.
        clip_norm: largest norm of the gradient, or None.
        after_step: is called when a step is done; reads of its numbers wait for the device.

    Raises:
        DoesNotFit: there is not enough memory.
    """
    encoder = Encoder(forward, state.model.logit_scale.device, amp)
    optimizer, scaler = state.optimizer, state.scaler
    state.model.train()
    while not stop(state.step):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * multiplier(state.step)
        asked = time.perf_counter()
        chunks = next(batches)
        wait = time.perf_counter() - asked
        samples = sum(map(len, chunks))
        with fits(min(samples, micro_batch_size or samples), encoder.device):
            parts = parts_of(chunks, micro_batch_size, few_shapes=isinstance(forward, Compiled))
            loss, scale = backward(encoder, loss_of, parts, scaler)
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
            if clip_norm is not None:
                nn.utils.clip_grads_with_norm_(state.model.parameters(), clip_norm, norm)
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state.model.clamp_scale()
        state.advance(samples)
        skipped = [record for chunk in chunks for record in chunk.skipped]
        lr = optimizer.param_groups[0]["lr"]
        after_step(state, Numbers(loss, norm, scale, lr, wait, samples, skipped))


class AfterStep:
    """What happens between steps: log, evaluate, save, each in its own time.

    Nothing here waits for the device unless something is due.  Nothing is saved before the numbers since the last
    time are known to be finite.

    Args:
        log: where numbers go.
        log_every, eval_every, save_every, keep_every: when.
        evaluate: scores the model at a step; gives numbers by tag.
        save: writes the state as ``last``, ``best`` or ``step_N``.
        best: tag of the number whose highest value is kept as ``best``, or None.
        bad_limit: how many distinct bad samples end the run.
    """

    def __init__(
        self,
        log: RunLog,
        log_every: Every,
        eval_every: Every,
        save_every: Every,
        keep_every: Every,
        evaluate: Callable[[CLIP, int, RunLog], dict[str, float]],
        save: Callable[[State, str], None],
        best: str | None,
        bad_limit: int,
        device: torch.device,
    ):
        self.log, self.evaluate, self.save, self.best, self.bad_limit = log, evaluate, save, best, bad_limit
        self.log_every, self.eval_every = log_every, eval_every
        self.save_every, self.keep_every = save_every, keep_every
        self.bad_step = torch.full((), -1, device=device)           # the first step whose numbers were not finite
        self.last_logged = self.last_evaluated = self.last_saved = -1
        self.latest: Numbers | None = None
        self.since = time.perf_counter()
        self.samples, self.wait = 0, 0.0

    def __call__(self, state: State, numbers: Numbers) -> None:
        step = state.step
        finite = numbers.loss.isfinite() & (numbers.norm.isfinite() | state.scaler.is_enabled())
        self.bad_step = torch.where(finite | (self.bad_step >= 0), self.bad_step, step)
        self.latest = numbers
        self.samples += numbers.samples
        self.wait += numbers.wait
        if numbers.skipped:
            self.note_skipped(state, numbers.skipped)
        if self.log_every.due(step):
            self.write(state, numbers)
        if self.eval_every.due(step):
            self.run_evaluation(state)
        if self.save_every.due(step):
            self.run_save(state)
        if self.keep_every.due(step):
            self.check_finite()
            self.save(state, f"step_{step}")

    def finish(self, state: State) -> None:
        """Log, evaluate and save at the end of ``fit``, where that has not just been done."""
        if self.latest is not None and self.last_logged != state.step:
            self.write(state, self.latest)
        if self.last_evaluated != state.step:
            self.run_evaluation(state)
        if self.last_saved != state.step:
            self.run_save(state)

    def write(self, state: State, numbers: Numbers) -> None:
        self.check_finite()
        elapsed = time.perf_counter() - self.since
        rate, wait = self.samples / elapsed, self.wait / elapsed
        loss = numbers.loss.item()
        self.log.scalars(
            {
                "train/loss": loss,
                "train/lr": numbers.lr,
                "train/logit_scale": numbers.scale.item(),
                "train/grad_norm": numbers.norm.item(),
                "train/samples_per_s": rate,
                "train/data_wait": wait,
                "train/skipped": len(state.skipped),
                **peaks(self.bad_step.device),
            },
            state.step,
            state.samples,
        )
        self.log.progress(state.step, {"loss": loss, "samples/s": rate, "data wait": wait})
        self.last_logged = state.step
        self.restart_clock()

    def run_evaluation(self, state: State) -> None:
        self.check_finite()
        numbers = self.evaluate(state.model, state.step, self.log)
        self.last_evaluated = state.step
        if numbers:
            self.log.scalars(numbers, state.step, state.samples)
        value = numbers.get(self.best)
        if value is not None and value > state.best.get("value", float("-inf")):
            state.best = {"metric": self.best, "value": value, "step": state.step}
            self.save(state, "best")
        self.log.summary["best"] = state.best       # a resumed run's, too
        self.log.write_summary()
        self.restart_clock()

    def run_save(self, state: State) -> None:
        self.check_finite()
        self.save(state, "last")
        self.last_saved = state.step
        self.restart_clock()

    def restart_clock(self) -> None:
        """Rates count training alone, not what is done between steps."""
        self.since = time.perf_counter()
        self.samples, self.wait = 0, 0.0

    def check_finite(self) -> None:
        step = int(self.bad_step)
        if step >= 0:
            raise Diverged(
                f"the loss or its gradient is not finite at step {step}; the last good checkpoint stands. "
                "A lower optim.lr, a longer sched.warmup or clip_norm=1.0 are the usual remedies"
            )

    def note_skipped(self, state: State, records: list[Skipped]) -> None:
        state.skipped.update(record.sample for record in records)
        self.log.skipped([
            {"samples": state.samples, "position": r.position, "sample": r.sample, "place": r.place, "reason": r.reason}
            for r in records
        ])
        if len(state.skipped) > self.bad_limit:
            worst = records[-1]
            raise DataError(
                f"{len(state.skipped)} bad samples, more than data.max_skipped allows; the last of them {worst.place}: "
                f"{worst.reason}; skipped.jsonl in the run's directory lists them. With a larger data.max_skipped the "
                "same words go on"
            )
