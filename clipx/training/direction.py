"""Which of two values of a metric is the better one: the one place that knows."""

import math
import re
from typing import Literal

from clipx.errors import UserError

Mode = Literal["max", "min"]

# names of clipx's own metrics, alone or after another word: i2t_r1, shuffled_t2i_mean_rank, balanced_top1
LOW = r"(.*_)?(loss|mean_rank|median_rank|skipped|bad_steps|data_wait)"
HIGH = r"(.*_)?(r\d+|mean_recall|mrr|top\d+|mean_per_class|samples_per_s)"


def mode_of(tag: str | None, given: Mode | None) -> Mode:
    """Whether a metric is better high (``max``) or low (``min``).

    Args:
        tag: of the metric, ``val/loss`` for example.
        given: what the user says; None leaves it to what is known, and a metric that is not known should be high.

    Raises:
        UserError: the two contradict each other.
    """
    name = (tag or "").rpartition("/")[2]
    known: Mode | None = "min" if re.fullmatch(LOW, name) else "max" if re.fullmatch(HIGH, name) else None
    if known and given not in (None, known):
        raise UserError(f"mode={given}: {tag} is better when it is {'low' if known == 'min' else 'high'}; leave mode "
                        "out, or name the metric that is meant as objective and best")
    return known or given or "max"


def is_better(value: float, before: float | None, mode: Mode) -> bool:
    """Whether a value is better than the one before it, if there is one; a NaN never is."""
    if before is None:
        return not math.isnan(value)
    return value > before if mode == "max" else value < before
