"""Learning rate schedules: functions of the step alone."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt

from clipx import duration
from clipx.errors import UserError

Multiplier = Callable[[int], float]
Share = Annotated[float, Field(ge=0, le=1)]


def steps_or_share(value: duration.Duration) -> duration.Duration:
    """Return a duration unchanged after checking that it is in steps, or a share of the run."""
    if duration.parse(value)[1] not in ("steps", "%"):
        raise ValueError("should be steps (500) or a share of the run (20%)")
    return value


Cooldown = Annotated[duration.Duration, AfterValidator(steps_or_share)]


def warmup_steps(steps: int, warmup: int, warmup_cap: float) -> int:
    """Length of the warm-up: ``warmup`` steps, at most a fraction ``warmup_cap`` of the run."""
    return min(warmup, int(steps * warmup_cap))


def cooldown_steps(steps: int, cooldown: duration.Duration) -> int:
    """Length of the cooldown: steps, or a share of the run."""
    number, unit = duration.parse(cooldown)
    return int(number) if unit == "steps" else int(number / 100 * steps)


def warmup_cosine(
    steps: int, warmup: NonNegativeInt = 2000, warmup_cap: NonNegativeFloat = 0.1, floor: Share = 0.0
) -> Multiplier:
    """Linear warm-up, then cosine decay.

    Args:
        steps: length of the run.
        warmup: steps of warm-up; the paper's 2,000.
        warmup_cap: maximum fraction of the run.
        floor: fraction of the peak at the end.

    Returns:
        Step (from 0) -> multiplier of the peak learning rate, in (0, 1].

    Source: Radford et al. 2021, section 2.5 and table 18 (arXiv 2103.00020).
    """
    warm = warmup_steps(steps, warmup, warmup_cap)

    def decay(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))

    return warmed(warm, lambda step: floor + (1 - floor) * decay(step))


def warmup_linear(
    steps: int, warmup: NonNegativeInt = 2000, warmup_cap: NonNegativeFloat = 0.1, floor: Share = 0.0
) -> Multiplier:
    """Linear warm-up, then linear decay.  Arguments and result as in ``warmup_cosine``."""
    warm = warmup_steps(steps, warmup, warmup_cap)
    return warmed(warm, lambda step: 1 - (1 - floor) * passed(step, warm, steps))


def constant(steps: int, warmup: NonNegativeInt = 0, warmup_cap: NonNegativeFloat = 0.1) -> Multiplier:
    """Linear warm-up, if any, then the peak until the end.  Arguments and result as in ``warmup_cosine``."""
    return warmed(warmup_steps(steps, warmup, warmup_cap), lambda step: 1.0)


def warmup_constant_cooldown(
    steps: int,
    warmup: NonNegativeInt = 2000,
    warmup_cap: NonNegativeFloat = 0.1,
    cooldown: Cooldown = "20%",
    shape: Literal["sqrt", "linear"] = "sqrt",
    floor: Share = 0.0,
) -> Multiplier:
    """Linear warm-up, then the peak, then a cooldown.

    Args:
        steps: length of the run.
        warmup: steps of warm-up.
        warmup_cap: maximum fraction of the run.
        cooldown: its last steps, or a share of them, in which the rate falls.
        shape: of the fall, in the fraction x of the cooldown: 1 - sqrt(x) or 1 - x.
        floor: fraction of the peak at the end.

    Returns:
        Step (from 0) -> multiplier of the peak learning rate, in (0, 1].

    Raises:
        UserError: the cooldown begins before the end of the warm-up.

    Source: Hägele et al. 2024, section 3 (arXiv 2405.18392).
    """
    warm, start = warmup_steps(steps, warmup, warmup_cap), steps - cooldown_steps(steps, cooldown)
    if start < warm:
        raise UserError(
            f"sched.cooldown={cooldown} is too long: a run of {steps:,} steps with a warm-up of {warm:,} has "
            f"{steps - warm:,} left; shorten it, or the warm-up"
        )
    power = {"sqrt": 0.5, "linear": 1.0}[shape]
    return warmed(warm, lambda step: 1 - (1 - floor) * passed(step, start, steps) ** power)


def warmed(warm: int, after: Multiplier) -> Multiplier:
    """A linear warm-up of ``warm`` steps, and what comes after it."""
    return lambda step: (step + 1) / warm if step < warm else after(step)


def passed(step: int, start: int, end: int) -> float:
    """How much of the span from ``start`` to ``end`` is over: 0 before it, less than 1 in it."""
    return max(step - start, 0) / max(end - start, 1)
