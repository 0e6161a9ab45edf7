"""The main score of each data set as a table with its mean, all scores as CSV, and a plot of the main ones."""

import csv
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from clipx.errors import UserError
from clipx.tools.runs_table import to_markdown, to_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAIN = ("top1", "mean_average_precision", "mean_recall")  # of an evaluation; of another, its first score
FORMATS = (".md", ".csv", ".png", ".svg")

Scores = Mapping[str, Mapping[str, float]]  # by label of the weights and tag


class Line(NamedTuple):
    """A score of all weights on one data set; None where it is missing."""

    data: str
    evaluation: str
    metric: str
    values: list[float | None]


def check_outs(outs: str | list[str] | None) -> None:
    """
    Raises:
        UserError: a file has another extension, or no directory to be in.
    """
    for out in paths(outs):
        if out.suffix not in FORMATS:
            raise UserError(f"out={out}: expected a name that ends in {', '.join(FORMATS)}")
        if not out.parent.is_dir():
            raise UserError(f"out={out}: there is no directory {out.parent}")


def paths(outs: str | list[str] | None) -> list[Path]:
    """The files that the key ``out`` names."""
    return [Path(out).expanduser() for out in ([outs] if isinstance(outs, str) else outs or [])]


def all_lines(scores: Scores) -> list[Line]:
    """Every score, by data set, evaluation and metric."""
    lines = []
    for tag in dict.fromkeys(tag for one in scores.values() for tag in one):
        _, group, metric = tag.split("/", 2)
        evaluation, _, data = group.partition("@")
        lines.append(Line(data, evaluation, metric, [one.get(tag) for one in scores.values()]))
    return sorted(lines, key=lambda line: (line.data, line.evaluation))  # stable: metrics keep their order


def main_lines(scores: Scores) -> list[Line]:
    """The main score of each data set and evaluation, as CLIP_benchmark and DataComp average them."""
    groups: dict[tuple[str, str], dict[str, Line]] = {}
    for line in all_lines(scores):
        groups.setdefault((line.data, line.evaluation), {})[line.metric] = line
    return [
        next((found[name] for name in MAIN if name in found), next(iter(found.values()))) for found in groups.values()
    ]


def means(lines: Sequence[Line]) -> list[float | None]:
    """The mean over data sets of each weights; None if one has no score."""
    columns = zip(*(line.values for line in lines), strict=True)
    return [None if None in column else fmean(column) for column in map(list, columns)]


def to_rows(scores: Scores) -> list[Sequence[str]]:
    """The main scores, with their mean, below the head of the table."""
    lines = main_lines(scores)
    rows: list[Sequence[str]] = [("data", "metric", *scores)]
    rows += [(line.data, f"{line.evaluation} {line.metric}", *map(to_text, line.values)) for line in lines]
    if len(lines) > 1:
        rows.append((f"mean of {len(lines)}", "", *map(to_text, means(lines))))
    return rows


def to_csv(scores: Scores) -> str:
    """All scores, one a line: weights, data, evaluation, metric, value."""
    file = StringIO()
    writer = csv.writer(file)
    writer.writerow(("weights", "data", "evaluation", "metric", "value"))
    for line in all_lines(scores):
        pairs = zip(scores, line.values, strict=True)
        writer.writerows((label, *line[:3], value) for label, value in pairs if value is not None)
    return file.getvalue()


def plot(scores: Scores, steps: Sequence[int] | None) -> "Figure":
    """The main scores: bars for each data set, or, of the checkpoints of a run, curves over their steps."""
    from matplotlib.figure import Figure

    lines = main_lines(scores)
    height = 4.5 if steps else 1.2 + len(lines) * (0.25 + 0.15 * len(scores))
    figure = Figure(figsize=(9, height), layout="constrained")
    axes: Any = figure.add_subplot()
    names = [f"{line.data} {line.evaluation} {line.metric}" for line in lines]
    if steps:
        order = sorted(range(len(steps)), key=lambda index: steps[index])
        curves = {name: line.values for name, line in zip(names, lines, strict=True)}
        for name, values in {**curves, **({"mean": means(lines)} if len(lines) > 1 else {})}.items():
            style = {"color": "black", "linewidth": 2} if name == "mean" else {}
            axes.plot([steps[i] for i in order], [values[i] for i in order], marker="o", label=name, **style)
        axes.set_xlabel("step")
    else:
        width = 0.8 / len(scores)
        for number, label in enumerate(scores):
            places = [place + width * number for place in range(len(lines))]
            axes.barh(places, [line.values[number] or 0 for line in lines], width, label=label)
        axes.set_yticks([place + width * (len(scores) - 1) / 2 for place in range(len(lines))], names, fontsize=8)
        axes.invert_yaxis()
    axes.legend(fontsize=8)
    return figure


def write_outs(outs: str | list[str] | None, scores: Scores, steps: Sequence[int] | None) -> None:
    """Write the table or the plot, by each file's extension.

    Args:
        outs: files.
        scores: of all weights.
        steps: of the checkpoints, if all are of one run; else None.

    Raises:
        UserError: a file cannot be written.
    """
    for out in paths(outs):
        try:
            if out.suffix in (".png", ".svg"):
                plot(scores, steps).savefig(out)
            else:
                text = to_csv(scores) if out.suffix == ".csv" else to_markdown(to_rows(scores))
                out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"out={out} cannot be written: {error.strerror}") from error


def read_scores(folders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Read the metrics.json that clipx.evaluate has written at or below some folders, by label and tag.

    Raises:
        UserError: there is none, or one is corrupt.
    """
    found: dict[str, dict[str, float]] = {}
    for file in dict.fromkeys(file for folder in folders for file in sorted(folder.rglob("metrics.json"))):
        try:
            scored = json.loads(file.read_text(encoding="utf-8"))
            for weights, sets in scored.items():
                label = file.parent.name if len(scored) == 1 else f"{file.parent.name} {Path(weights).name}"
                label = label if label not in found else f"{file.parent} {weights}"
                found[label] = {
                    f"val/{evaluation}@{data}/{metric}": value
                    for data, evaluations in sets.items()
                    for evaluation, metrics in evaluations.items()
                    for metric, value in metrics.items()
                    if metric not in ("step", "data")
                }
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{file} was not written by clipx.evaluate ({error}); move it away") from error
    if not found:
        raise UserError(f"{' '.join(map(str, folders))}: no metrics.json found; clipx.evaluate run=... writes one")
    return found
