"""The training loop."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from clipx import distributed
from clipx.data.loader import skip_left_out
from clipx.data.readers import Chunk, Skipped
from clipx.models.clip import CLIP, OUTSIDE_TOWERS
from clipx.models.lora import adapter_state, load_adapter_state
from clipx.training.average import WeightAverage
from clipx.training.batch import split_micro_batches
from clipx.training.compile import is_compiled
from clipx.training.memory import explain_oom
from clipx.training.step import Forward, MicroBatchEncoder, backward


@dataclass
class State:
    """Everything that training changes and a resumed run needs."""

    model: CLIP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: InitVar[float | None] = None  # decay of the average
    projections: nn.ParameterDict = field(default_factory=nn.ParameterDict)  # to the width of a teacher, by tower
    average: WeightAverage = field(init=False)  # what is evaluated: the averaged weights, or the model's own
    step: int = 0  # optimiser steps attempted
    samples: int = 0  # position in the plan where the next batch starts
    best: dict[str, Any] = field(default_factory=dict)  # of the objective: value, step
    skipped: set[int] = field(default_factory=set)  # ids of bad samples
    bad_steps: int = 0  # steps without effect: the gradient was not finite
    left_out: list[range] = field(default_factory=list)  # positions to skip, in ascending order
    seconds: float = 0.0  # duration of the run up to the last checkpoint
    resumed_from: str = ""  # checksum of the checkpoint that resume=PATH named

    def __post_init__(self, ema: float | None) -> None:
        self.average = WeightAverage(self.model, ema)

    def advance(self, samples: int) -> None:
        self.step += 1
        self.samples = skip_left_out(self.samples + samples, self.left_out)

    def leave_out(self, spans: Sequence[range]) -> None:
        """Skip these positions."""
        self.left_out = sorted({*self.left_out, *spans}, key=lambda span: (span.start, span.stop))
        self.samples = skip_left_out(self.samples, self.left_out)

    def state_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, tensors and numbers for a checkpoint."""
        return {
            "model_state_dict": dict(self.model.state_dict()),  # with LoRA, merged
            "lora_state_dict": adapter_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "samples": self.samples,
            "rng": {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            "best": self.best,
            "skipped": sorted(self.skipped),
            "bad_steps": self.bad_steps,
            "left_out": [[span.start, span.stop] for span in self.left_out],
            "seconds": self.seconds,
            "resumed_from": self.resumed_from,
            **self.average.state_dict(),
            **({"projection_state_dict": dict(self.projections.state_dict())} if self.projections else {}),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model_state_dict"])
        load_adapter_state(self.model, saved.get("lora_state_dict", {}))
        self.average.load_state_dict(saved)
        self.projections.load_state_dict(saved.get("projection_state_dict", {}))
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, rates in zip(self.optimizer.param_groups, own, strict=True):
            group.update(rates)  # keep the moments; learning rate and decay come from the config
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.samples = saved["step"], saved["samples"]
        self.best, self.skipped = saved["best"], set(saved["skipped"])
        self.left_out = [range(*span) for span in saved["left_out"]]
        self.bad_steps, self.seconds = saved["bad_steps"], saved["seconds"]
        self.resumed_from = saved.get("resumed_from", "")  # 0.1.0 did not write it
        torch.set_rng_state(saved["rng"]["torch"])
        if len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])


@dataclass(frozen=True)
class StepOutput:
    """Results of one step.  The tensors may still be computing: reading one waits for the device."""

    loss: Tensor  # () nats
    image: Tensor  # (b, E) unit features, of this rank's share of the batch
    text: Tensor  # (b K, E) unit features, K captions of each image
    scale: Tensor  # () inverse temperature
    tower_grad_norms: Tensor  # (2,) image and text tower, before clipping
    grad_norm: Tensor  # () whole model, before clipping
    lr: float  # of the first parameter group
    data_wait: float  # seconds
    position: int  # of the first sample in the plan
    samples: int  # global batch size
    skipped: list[Skipped]


def fit(
    state: State,
    forward: Forward,
    loss_fn: Callable[..., Tensor],
    batches: Iterator[list[Chunk]],
    micro_batch_size: int | None,
    should_stop: Callable[[int], bool],
    lr_multiplier: Callable[[int], float],
    amp: torch.dtype | None,
    clip_norm: float | None,
    callbacks: Callable[[State, StepOutput], None],
    encode_frozen: Callable[[Sequence[Chunk]], Sequence[Chunk]] = list,
    patch_dropout: Callable[[int], float] | None = None,
) -> None:
    """Train until ``should_stop(step)``.

    Args:
        state: is advanced in place.
        forward: as ``MicroBatchEncoder`` takes it.
        loss_fn: as ``backward`` takes it.
        batches: this rank's share of each batch, as lists of chunks.
        micro_batch_size: samples per forward pass; None for the whole batch.
        should_stop: step (from 0) -> whether to stop before it.
        lr_multiplier: step (from 0) -> factor of the peak learning rate.
        amp: autocast dtype, or None for float32.
        clip_norm: maximum gradient norm, or None.
        callbacks: called after each step.
        encode_frozen: adds the features of frozen towers to the chunks of a step.
        patch_dropout: step (from 0) -> share of the patches that it leaves out; None to leave the model as it is.

    Raises:
        OutOfMemory: the micro-batch does not fit.
    """
    encoder = MicroBatchEncoder(forward, state.model.logit_scale.device, amp)
    edges = state.model.text.grid_edges(encoder.device, amp, is_compiled(forward))
    state.model.train()
    while not should_stop(state.step):
        follow_schedules(state, lr_multiplier, patch_dropout)
        start = time.perf_counter()
        chunks = next(batches)
        data_wait = time.perf_counter() - start
        share = sum(map(len, chunks))
        with explain_oom(min(share, micro_batch_size or share), encoder.device):
            micro_batches = split_micro_batches(encode_frozen(chunks), micro_batch_size, edges)
            batch = backward(encoder, loss_fn, micro_batches, state.scaler)
            norms = step_optimizer(state, clip_norm, amp)
        position, samples = state.samples, share * distributed.world_size()
        state.advance(samples)
        skipped, lr = [record for chunk in chunks for record in chunk.skipped], state.optimizer.param_groups[0]["lr"]
        callbacks(state, StepOutput(*batch, *norms, lr, data_wait, position, samples, skipped))


def follow_schedules(
    state: State, lr_multiplier: Callable[[int], float], patch_dropout: Callable[[int], float] | None
) -> None:
    """Set what changes with the step.  Arguments as in ``fit``."""
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_multiplier(state.step)
    if patch_dropout:
        state.model.visual.set_patch_dropout(patch_dropout(state.step))


class GradientNorms(NamedTuple):
    """Before clipping."""

    towers: Tensor  # (2,) image and text tower
    model: Tensor  # (), with what is trained besides it


def step_optimizer(state: State, clip_norm: float | None, amp: torch.dtype | None) -> GradientNorms:
    """Clip the gradient, step the optimiser, clamp the temperature, average the weights.  Arguments as in ``fit``."""
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    scaler.unscale_(optimizer)
    norms = gradient_norms(model, state.projections)
    if clip_norm is not None:
        clip_grads_with_norm_([*model.parameters(), *state.projections.parameters()], clip_norm, norms.model)
    scaler.step(optimizer)  # no-op if a gradient is not finite; a fused optimiser knows without waiting for the device
    scaler.update(None if amp is torch.float16 else 1.0)  # only fp16 adapts its loss scale
    optimizer.zero_grad(set_to_none=True)
    model.clamp_scale()
    state.average.update()
    return norms


def gradient_norms(model: CLIP, further: nn.Module) -> GradientNorms:
    zero = model.logit_scale.new_zeros(())  # for a frozen tower
    own = (getattr(model, name) for name in OUTSIDE_TOWERS)
    others = [*(p for p in own if p is not None), *further.parameters()]
    image, text, rest = (
        get_total_norm([p.grad for p in parameters if p.grad is not None] or [zero])
        for parameters in (model.visual.parameters(), model.text.parameters(), others)
    )
    towers = torch.stack([image, text])
    return GradientNorms(towers, get_total_norm([towers, rest]))
