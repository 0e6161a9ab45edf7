"""Whether a metric is better high or low."""

import math
import re
from typing import Literal

from clipx.errors import UserError

Mode = Literal["max", "min"]

# names of clipx's own metrics, with or without a prefix: i2t_r1, shuffled_t2i_mean_rank, balanced_top1
LOW = r"(.*_)?(loss|mean_rank|median_rank|skipped|bad_steps|data_wait)"
HIGH = r"(.*_)?(r\d+|mean_recall|mrr|top\d+|mean_per_class|samples_per_s)"


def mode_of(tag: str | None, given: Mode | None) -> Mode:
    """Whether a metric is better high (``max``) or low (``min``).

    Args:
        tag: of the metric, for example ``val/loss``.
        given: the user's ``mode``; None infers it from the name, and unknown metrics are better high.

    Raises:
        UserError: the two contradict each other.
    """
    name = (tag or "").rpartition("/")[2]
    known: Mode | None = "min" if re.fullmatch(LOW, name) else "max" if re.fullmatch(HIGH, name) else None
    if known and given not in (None, known):
        raise UserError(
            f"mode={given}: {tag} is better when it is {'low' if known == 'min' else 'high'}; leave out "
            "mode, or set objective and best to the intended metric"
        )
    return known or given or "max"


def is_better(value: float, before: float | None, mode: Mode) -> bool:
    """Whether ``value`` is better than ``before``; NaN never is."""
    if before is None:
        return not math.isnan(value)
    return value > before if mode == "max" else value < before
