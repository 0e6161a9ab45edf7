"""Lengths of time in a run: steps, epochs, shares of the run, or minutes."""

import re
import time
from dataclasses import dataclass, field

Duration = int | str        # 500, "2ep", "10%", "15min"


def parse(duration: Duration) -> tuple[float, str]:
    """Number and unit (``steps``, ``ep``, ``%`` or ``min``) of a duration.

    Raises:
        ValueError: it is none, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(ep|%|min|)", str(duration))
    if not match or float(match[1]) <= 0 or (not match[2] and "." in match[1]):
        raise ValueError("should be a duration above 0: steps (500), epochs (2ep), a share (10%) or minutes (15min)")
    return float(match[1]), match[2] or "steps"


def checked(duration: Duration) -> Duration:
    """The duration itself, where it is one."""
    parse(duration)
    return duration


@dataclass
class Every:
    """Tells when a duration has gone by, again and again.

    Args:
        duration: how long; None is never.
        steps: of the run.
        epoch: steps of an epoch.
    """

    duration: Duration | None
    steps: int
    epoch: float
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        number, unit = parse(self.duration) if self.duration is not None else (0, "min")
        length = {"steps": number, "ep": number * self.epoch, "%": number / 100 * self.steps}.get(unit)
        self.in_steps = None if length is None else max(1, round(length))
        self.seconds = number * 60 if unit == "min" and number else None

    def due(self, step: int) -> bool:
        """Whether it has gone by at the end of ``step`` (from 1), counted in steps."""
        return self.in_steps is not None and step % self.in_steps == 0

    def passed(self) -> bool:
        """Whether it has gone by since it last had, counted in minutes."""
        if self.seconds is None or time.monotonic() - self.began < self.seconds:
            return False
        self.began = time.monotonic()
        return True

    def over(self, step: int) -> bool:
        """Whether it has gone by at least once since step 0, counted in steps."""
        return self.in_steps is not None and step >= self.in_steps
