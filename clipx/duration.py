"""Durations: steps, epochs, a share of the run, or minutes."""

import re
import time
from dataclasses import dataclass, field

Duration = int | str  # 500, "2ep", "10%", "15min"


def parse(duration: Duration) -> tuple[float, str]:
    """Number and unit (``steps``, ``ep``, ``%`` or ``min``) of a duration.

    Raises:
        ValueError: not a duration, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(ep|%|min|)", str(duration))
    if not match or float(match[1]) <= 0 or (not match[2] and "." in match[1]):
        raise ValueError("should be a duration above 0: steps (500), epochs (2ep), a share (10%) or minutes (15min)")
    return float(match[1]), match[2] or "steps"


def checked(duration: Duration) -> Duration:
    """Return a duration unchanged after checking that it parses."""
    parse(duration)
    return duration


def checked_steps(duration: Duration) -> Duration:
    """Return a duration unchanged after checking that it is no time, which would not repeat."""
    if parse(duration)[1] == "min":
        raise ValueError("should be steps (500), epochs (2ep) or a share of the run (10%)")
    return duration


@dataclass
class Every:
    """Timer for something that happens once every ``duration``.

    Args:
        duration: None for never.
        steps: length of the run.
        epoch: steps per epoch.
    """

    duration: Duration | None
    steps: int
    epoch: float
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        number, unit = parse(self.duration) if self.duration is not None else (0, "min")
        length = {"steps": number, "ep": number * self.epoch, "%": number / 100 * self.steps}.get(unit)
        self.in_steps = None if length is None else max(1, round(length))
        self.seconds = number * 60 if unit == "min" and number else None

    def due(self, step: int) -> bool:
        """Whether it is due at the end of ``step`` (from 1); for durations in steps."""
        return self.in_steps is not None and step % self.in_steps == 0

    def passed(self) -> bool:
        """Whether it is due since the last time; for durations in minutes."""
        if self.seconds is None or time.monotonic() - self.start < self.seconds:
            return False
        self.start = time.monotonic()
        return True

    def over(self, step: int) -> bool:
        """Whether it was due at or before ``step``; for durations in steps."""
        return self.in_steps is not None and step >= self.in_steps
