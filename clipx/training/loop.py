"""The loop, all of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from clipx import distributed
from clipx.data.loader import skip_left_out
from clipx.data.readers import Chunk, Skipped
from clipx.models.clip import CLIP
from clipx.training.batch import split_micro_batches
from clipx.training.compile import is_compiled
from clipx.training.memory import fits
from clipx.training.step import Forward, MicroBatchEncoder, backward


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
    bad_steps: int = 0                                  # steps without effect, as their gradient was not finite
    left_out: list[list[int]] = field(default_factory=list)     # positions, from and to, that are not trained on
    seconds: float = 0.0                                # that the run has taken, as of the last checkpoint
    resumed_from: str = ""                              # checksum of the checkpoint that resume=PATH named

    def advance(self, samples: int) -> None:
        self.step += 1
        self.samples = skip_left_out(self.samples + samples, self.left_out)

    def leave_out(self, spans: Sequence[Sequence[int]]) -> None:
        """Do not train on what stands at some positions, from and to."""
        self.left_out = [list(span) for span in sorted({tuple(span) for span in (*self.left_out, *spans)})]
        self.samples = skip_left_out(self.samples, self.left_out)

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
            "bad_steps": self.bad_steps,
            "left_out": self.left_out,
            "seconds": self.seconds,
            "resumed_from": self.resumed_from,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model_state_dict"])
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, rates in zip(self.optimizer.param_groups, own, strict=True):
            group.update(rates)         # its moments go on; rates and decay are the config's
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.samples = saved["step"], saved["samples"]
        self.best, self.skipped = saved["best"], set(saved["skipped"])
        self.bad_steps, self.left_out, self.seconds = saved["bad_steps"], saved["left_out"], saved["seconds"]
        self.resumed_from = saved.get("resumed_from", "")       # 0.1.0 did not write it
        torch.set_rng_state(saved["rng"]["torch"])
        if len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])


@dataclass(frozen=True)
class StepOutput:
    """What one step showed.  The tensors may still be on their way: reading one waits for the device."""

    loss: Tensor        # () nats
    image: Tensor       # (b, E) unit features, of this rank's share of the batch
    text: Tensor        # (b, E) likewise
    scale: Tensor       # () inverse temperature
    norms: Tensor       # (2,) of the gradient before clipping: of the image tower, of the text tower
    norm: Tensor        # () of all of it
    lr: float           # of the first group
    wait: float         # seconds spent waiting for data
    position: int       # of the batch's first sample in the plan
    samples: int        # of the batch, all ranks together
    skipped: list[Skipped]


def fit(
    state: State,
    forward: Forward,
    loss_fn: Callable[..., Tensor],
    batches: Iterator[list[Chunk]],
    micro_batch_size: int | None,
    stop: Callable[[int], bool],
    multiplier: Callable[[int], float],
    amp: torch.dtype | None,
    clip_norm: float | None,
    callbacks: Callable[[State, StepOutput], None],
) -> None:
    """Train until ``stop(step)``.

    Args:
        state: is advanced in place.
        forward: normalised images (b, 3, S, S), packed captions -> unit features (b, E), (b, E), scale (); the bare
            model, or what is wrapped around it.
        loss_fn: unit features (b, E), (b, E), scale (), ids (b, 2) or None -> loss ().
        batches: steps, as lists of chunks; of each this rank's share.
        micro_batch_size: samples that go forward at once; None for the whole batch.
        stop: whether the run ends before the step with this number (from 0).
        multiplier: of the peak learning rate, by step (from 0).
        amp: autocast's type, or None for float32.
        clip_norm: largest norm of the gradient, or None.
        callbacks: is called when a step is done; reads of its numbers wait for the device.

    Raises:
        DoesNotFit: there is not enough memory.
    """
    encoder = MicroBatchEncoder(forward, state.model.logit_scale.device, amp)
    optimizer, scaler = state.optimizer, state.scaler
    state.model.train()
    while not stop(state.step):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * multiplier(state.step)
        asked = time.perf_counter()
        chunks = next(batches)
        wait = time.perf_counter() - asked
        share = sum(map(len, chunks))
        with fits(min(share, micro_batch_size or share), encoder.device):
            micro_batches = split_micro_batches(chunks, micro_batch_size, few_shapes=is_compiled(forward))
            loss, image, text, scale = backward(encoder, loss_fn, micro_batches, scaler)
            scaler.unscale_(optimizer)
            norms, norm = gradient_norms(state.model)
            if clip_norm is not None:
                clip_grads_with_norm_(state.model.parameters(), clip_norm, norm)
            scaler.step(optimizer)              # leaves the weights as they are where a gradient is not finite
        scaler.update(None if amp is torch.float16 else 1.0)        # only fp16 has a scale to be looked for
        optimizer.zero_grad(set_to_none=True)
        state.model.clamp_scale()
        position, samples = state.samples, share * distributed.world_size()
        state.advance(samples)
        skipped = [record for chunk in chunks for record in chunk.skipped]
        lr = optimizer.param_groups[0]["lr"]
        numbers = StepOutput(loss, image, text, scale, norms, norm, lr, wait, position, samples, skipped)
        callbacks(state, numbers)


def gradient_norms(model: CLIP) -> tuple[Tensor, Tensor]:
    """Of the image tower and of the text tower (2,), and of the whole model ()."""
    zero = model.logit_scale.new_zeros(())          # of a tower that is frozen
    image, text, scale = (
        get_total_norm([p.grad for p in part if p.grad is not None] or [zero])
        for part in (model.visual.parameters(), model.text.parameters(), [model.logit_scale])
    )
    norms = torch.stack([image, text])
    return norms, get_total_norm([norms, scale])
