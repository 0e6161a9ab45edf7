"""Learning rate schedules: functions of the step alone."""

import math
from collections.abc import Callable


def warmup_steps(steps: int, warmup: int, warmup_cap: float) -> int:
    """Length of the warm-up: ``warmup`` steps, at most a fraction ``warmup_cap`` of the run."""
    return min(warmup, int(steps * warmup_cap))


def warmup_cosine(steps: int, warmup: int = 2000, warmup_cap: float = 0.1) -> Callable[[int], float]:
    """Linear warm-up, then cosine decay to 0.

    Args:
        steps: length of the run.
        warmup: steps of warm-up; the paper's 2,000.
        warmup_cap: maximum fraction of the run.

    Returns:
        Step (from 0) -> multiplier of the peak learning rate, in (0, 1].

    Source: Radford et al. 2021, section 2.5 and table 18 (arXiv 2103.00020).
    """
    warm = warmup_steps(steps, warmup, warmup_cap)

    def multiplier(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))

    return multiplier
