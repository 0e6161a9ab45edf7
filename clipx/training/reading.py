"""The numbers of a step on their way from the device to the host."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from clipx.training.health import ROWS
from clipx.training.loop import State, StepOutput


class BadStep(NamedTuple):
    """A step whose gradient was not finite."""

    step: int  # from 1
    position: int  # of its batch in the plan
    lr: float


@dataclass(frozen=True)
class Reading:
    """Whether gradients were finite, and the output of a step, copied to the host while the device computes on.

    Nothing may be read before ``wait`` returns.
    """

    step: int
    samples: int  # position in the plan after the step
    steps: list[BadStep]
    finite: Tensor  # (n,) bool, one for each of ``steps``
    output: StepOutput | None  # of the step, with the features of the first rows; None if nothing is logged
    arrived: torch.cuda.Event | None  # when everything is on the host; None if it already is

    @staticmethod
    def start(state: State, unchecked: Sequence[tuple[BadStep, Tensor]], output: StepOutput | None) -> "Reading":
        """Start the copies of the finite flags of ``unchecked`` steps and of an output."""
        flags = [flag for _, flag in unchecked]
        finite = to_host(torch.stack(flags)) if flags else torch.ones(0, dtype=torch.bool)
        if output is not None:
            output = replace(
                output,
                loss=to_host(output.loss),
                image=to_host(output.image[:ROWS]),
                text=to_host(output.text[:ROWS]),
                scale=to_host(output.scale),
                tower_grad_norms=to_host(output.tower_grad_norms),
                grad_norm=to_host(output.grad_norm),
            )
        steps = [step for step, _ in unchecked]
        return Reading(state.step, state.samples, steps, finite, output, record_event(state.model.logit_scale))

    def wait(self) -> None:
        """Wait until the device has computed and copied what is to be read."""
        if self.arrived:
            self.arrived.synchronize()


def runs_ahead(output: StepOutput) -> bool:
    """Whether the program runs ahead of the device, so that reading a tensor waits for it."""
    return output.loss.is_cuda


def to_host(x: Tensor) -> Tensor:
    return x.to("cpu", non_blocking=x.is_cuda)  # into pinned memory


def record_event(x: Tensor) -> torch.cuda.Event | None:
    """An event that follows all work queued on the device of ``x``, if it is a GPU."""
    return torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None
