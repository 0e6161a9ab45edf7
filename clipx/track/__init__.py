"""Trackers: where the numbers and the figures of a run go, besides metrics.jsonl and summary.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipx.config.meaning import is_neutral

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of a run when it starts."""

    directory: Path
    config: Mapping[str, Any]  # resolved
    hparams: Mapping[str, Any]  # what the command varied, and the options of the other groups
    objective: str | None  # tag of the metric that ranks the run
    step: int  # last step done: of a resumed run, its checkpoint's
    rows: Sequence[Mapping[str, float]]  # of metrics.jsonl up to that step; what was logged after it is void


class Tracker:
    """Receives what a run logs, on rank 0; methods that a tracker leaves out do nothing.

    It is made before the data are opened, and should refuse there what cannot work.  ``start`` may be called again on
    the same tracker, after ``close``: a run that diverges goes back to its last checkpoint.
    """

    def start(self, run: TrackedRun) -> None:
        """Open the logs; of a resumed run, without what was logged after ``run.step``."""

    def log(self, row: Mapping[str, float]) -> None:
        """Log a line of metrics.jsonl: step, samples, epoch, seconds, and finite numbers by tag."""

    def best(self, tag: str, value: float, step: int) -> None:
        """Log the best value so far of the metric that selects checkpoints, at an evaluation."""

    def figure(self, tag: str, figure: "Figure", step: int) -> None:
        """Log a figure of matplotlib."""

    def view(self) -> str:
        """How to look at the logs; the run's last lines say it."""
        return ""

    def flush(self) -> None:
        """Write what is buffered; called before a checkpoint is saved."""

    def close(self, state: str) -> None:
        """End the logs of this process: finished, stopped, failed, or running if it will start again."""


def tags_of(row: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a row that have a tag, such as ``train/loss``."""
    return {key: value for key, value in row.items() if "/" in key}


def best_tag(tag: str) -> str:
    """The tag for the best value of ``tag``."""
    return f"best/{tag.removeprefix('val/')}"


def hparams_row(config: Mapping[str, Any], choices: Mapping[str, Any], varied: Sequence[str]) -> dict[str, Any]:
    """The hyperparameters to show: those that the command varied, and the options of the other groups.

    The other groups share one column, as TensorBoard shows only the first five columns by default, in alphabetical
    order.

    Args:
        config: of the run, flattened.
        choices: by group.
        varied: keys or groups.
    """
    fixed = {group: option for group, option in choices.items() if group not in varied and not is_neutral(group)}
    every = {**config, **choices}
    groups = " ".join(map(format_choice, fixed.items()))
    return {"groups": groups, **{key: every[key] for key in varied if key in every}}


def format_choice(item: tuple[str, Any]) -> str:
    group, option = item
    return f"{group}={','.join(option) if isinstance(option, list) else option}"


def shown(row: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Hyperparameters as a table can show them; lists and the like as JSON."""
    return {
        key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value) for key, value in row.items()
    }
