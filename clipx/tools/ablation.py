"""Runs against a baseline: what each setting changes, and what that gains.  Imports neither Hydra nor torch."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from clipx.errors import UserError
from clipx.tools.runs_table import Row, Run, find_runs, group_seeds, objective_mode, spread, spread_of, varied_keys

LABEL_WIDTH = 45  # characters of a line

Groups = Sequence[tuple[str, Sequence[Run]]]  # what each setting changes, and its seeds


def find_baseline(path: Path) -> list[Run]:
    """Find the seeds of a baseline.

    Raises:
        UserError: there is no run, or there are several settings.
    """
    runs = find_runs([path])
    if keys := [key for key in varied_keys(runs) if key != "seed"]:
        raise UserError(f"--against {path}: expected one run, or the seeds of one setting; these differ in {keys[0]}")
    return runs


def group_changes(runs: Sequence[Run], baseline: Sequence[Run]) -> Groups:
    """Group the seeds of each setting under what it changes; the baseline itself is left out."""
    changed: dict[str, list[Run]] = {}
    for run in runs:
        changed.setdefault(describe_change(run.keys, baseline[0].keys), []).append(run)
    changed.pop("", None)
    keys = varied_keys([*runs, *baseline])  # a description may leave some out
    return [(change, group) for change, alike in changed.items() for group in group_seeds(alike, keys)]


def describe_change(keys: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """What differs from the baseline; of another option of a group, only the keys that both options have."""
    changed = []
    for key, value in sorted(keys.items(), key=lambda item: "." in item[0]):  # options first
        group = key.split(".")[0]
        is_new = key != group and key not in base and keys.get(group) != base.get(group)
        if key != "seed" and not key.endswith("._target_") and not is_new and value != base.get(key):
            changed.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    return ", ".join(changed)


def gains(group: Sequence[Run], baseline: Sequence[Run], tag: str) -> list[float]:
    """Last values of a tag minus the baseline's: seed by seed, or of the means if no seed is in both."""
    found, expected = (
        {run.keys.get("seed"): value for run in runs if (value := run.summary["final"].get(tag)) is not None}
        for runs in (group, baseline)
    )
    if not found or not expected:
        return []
    pairs = [value - expected[seed] for seed, value in found.items() if seed in expected]
    return pairs or [statistics.fmean(found.values()) - statistics.fmean(expected.values())]


def ablation_table(groups: Groups, baseline: Sequence[Run], tags: Sequence[str]) -> list[Row]:
    """One row per change, the largest gain of the first tag first, among them the baseline."""
    rows = [make_row(change, group, baseline, tags) for change, group in [("baseline", baseline), *groups]]
    sign = -1 if objective_mode(baseline, tags[0]) == "min" else 1
    means = [statistics.fmean(gains(group, baseline, tags[0]) or [-sign * math.inf]) for _, group in groups]
    order = sorted(zip([0.0, *means], rows, strict=True), key=lambda pair: sign * pair[0], reverse=True)
    return [row for _, row in order]


def make_row(change: str, group: Sequence[Run], baseline: Sequence[Run], tags: Sequence[str]) -> Row:
    states = Counter(run.state for run in group)
    row: Row = {"change": change, "runs": ", ".join(f"{count} {state}" for state, count in states.items())}
    for tag in tags:
        found = None if group is baseline else spread(gains(group, baseline, tag))
        row |= {tag: spread_of(group, tag), "gain" if tag == tags[0] else f"gain in {tag}": found}
    return row | {"minutes": spread([run.summary["seconds"] / 60 for run in group if "seconds" in run.summary])}


def plot_gains(groups: Groups, baseline: Sequence[Run], tags: Sequence[str], out: Path) -> None:
    """Draw the gain of each change, a point for each seed: one panel per tag, sorted by the first."""
    from matplotlib.figure import Figure  # slow to import

    found = [(change, group) for change, group in groups if gains(group, baseline, tags[0])]
    found.sort(key=lambda pair: statistics.fmean(gains(pair[1], baseline, tags[0])))
    labels = [fill(change, LABEL_WIDTH) for change, _ in found]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(4 + 3.5 * len(tags), 1.2 + 0.25 * lines + 0.1 * len(found)), layout="tight")
    panels = figure.subplots(1, len(tags), sharey=True, squeeze=False)[0]
    for axes, tag in zip(panels, tags, strict=True):
        values = [gains(group, baseline, tag) for _, group in found]
        axes.barh(labels, [statistics.fmean(part or [math.nan]) for part in values], color="lightsteelblue")
        for label, part in zip(labels, values, strict=True):
            axes.plot(part, [label] * len(part), "k.", markersize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"gain in\n{tag}", fontsize=9)
        axes.tick_params(labelsize=8, top=True, labeltop=len(found) > 20)
        axes.margins(y=0.5 / max(1, len(found)))
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(out)
