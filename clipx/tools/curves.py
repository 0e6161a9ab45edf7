"""Curves of several runs, and the effect of each key that differs between them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipx.errors import UserError
from clipx.tools.runs_table import Run, objective, varied_keys

MAX_POINTS = 200  # of a curve


def read_curve(run: Run, tag: str) -> Iterator[tuple[int, int, float, float]]:
    """Yield step, samples, hours and value from metrics.jsonl, whose last line may be incomplete.

    Raises:
        UserError: another line is corrupt.
    """
    file = run.path / "metrics.jsonl"
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number} is corrupt; delete that line, or leave the run out") from error
        if tag in row:
            yield row["step"], row["samples"], row["seconds"] / 3600, row[tag]


def plot(runs: Sequence[Run], out: Path) -> None:
    """Draw objective and loss against steps, samples and hours; below, the objective against each varied key."""
    from matplotlib.figure import Figure  # slow to import

    tag, varied = objective(runs), varied_keys(runs)
    keys = [key for key in varied if key != "seed"] if tag else []
    tags = [name for name in (tag, "train/loss") if name]
    height = len(tags) + -(-len(keys) // 3)
    figure = Figure(figsize=(15, 4.2 * height), layout="tight")
    for row, name in enumerate(tags):
        for column, axis in enumerate(("steps", "samples", "hours")):
            axes = figure.add_subplot(height, 3, 3 * row + column + 1, xlabel=axis, ylabel=name)
            for run in runs:
                points = list(read_curve(run, name))
                points = points[:: -(-len(points) // MAX_POINTS) or 1]
                label = ", ".join(f"{key}={run.keys.get(key)}" for key in varied) or run.path.name
                axes.plot([point[column] for point in points], [point[3] for point in points], label=label, linewidth=1)
            if not column and len(runs) <= 12:
                axes.legend(fontsize=7)
    for place, key in enumerate(keys, 3 * len(tags) + 1):
        assert tag is not None  # or there are no keys
        plot_effect(figure.add_subplot(height, 3, place, xlabel=key, ylabel=tag), runs, key, tag)
    figure.savefig(out)


def plot_effect(axes: Any, runs: Sequence[Run], key: str, tag: str) -> None:
    """Draw the last objective of each run against one key."""
    pairs = [(run.keys.get(key), value) for run in runs if (value := run.summary["final"].get(tag)) is not None]
    numbers = all(isinstance(setting, (int, float)) and not isinstance(setting, bool) for setting, _ in pairs)
    settings: list[Any] = [setting if numbers else json.dumps(setting) for setting, _ in pairs]
    axes.plot(settings, [value for _, value in pairs], "o")
    if numbers and settings and min(settings) > 0 and max(settings) >= 5 * min(settings):
        axes.set_xscale("log")
