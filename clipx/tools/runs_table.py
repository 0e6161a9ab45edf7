"""Runs on disk as one table: what differs between them, and what came out.  Imports neither Hydra nor torch."""

import csv
import json
import math
import socket
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

from clipx.config.console import columns
from clipx.config.runs import suggest_runs
from clipx.errors import UserError
from clipx.training.direction import Mode, mode_of
from clipx.training.summary import FILE, load_summary

Row = dict[str, Any]

IGNORED_KEYS = {"name", "varied", "stop_at", "device", "workers", "resume", "track"}  # they do not change the result
STYLES = {"failed": "red", "killed": "red", "running": "yellow", "stopped": "yellow"}


@dataclass(frozen=True)
class Run:
    """A run's directory and its summary.json."""

    path: Path
    summary: Mapping[str, Any]

    @property
    def state(self) -> str:
        """finished, stopped, failed or running; killed if it should be running and its process is gone."""
        return "killed" if self.summary["state"] == "running" and is_gone(self.summary) else self.summary["state"]

    @property
    def keys(self) -> dict[str, Any]:
        """The flat config; the option of a group is listed under the group's name."""
        config = self.summary.get("config", {})
        return {
            key.removeprefix("choices."): value
            for key, value in config.items()
            if key.removeprefix("choices.").split(".")[0] not in IGNORED_KEYS
        }


def is_gone(summary: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a summary has ended; False for processes of other machines."""
    import psutil

    process = summary.get("process", {})
    if process.get("host") != socket.gethostname():
        return False
    try:
        return psutil.Process(process["id"]).create_time() > process["since"]  # the id was reused
    except psutil.NoSuchProcess:
        return True


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Find the runs at or below some paths; report on stderr each summary.json that cannot be used.

    Raises:
        UserError: a path is missing, or there is no run.
    """
    if missing := next((path for path in paths if not path.exists()), None):
        raise UserError(f"{missing}: there is no such run or folder of runs{suggest_runs(missing)}")
    runs = []
    for file in dict.fromkeys(file for path in paths for file in sorted(path.rglob(FILE))):
        try:
            runs.append(Run(file.parent, load_summary(file.parent)))
        except OSError as error:
            print(f"{file} is left out: it cannot be read: {error.strerror}", file=sys.stderr)
        except ValueError as error:
            print(f"{file} is left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError(
            f"{' '.join(map(str, paths))}: no runs found; expected a folder of runs, such as outputs/sweeps/NAME"
        )
    return runs


def varied_keys(runs: Sequence[Run]) -> list[str]:
    """The keys in which runs differ; if a group's option differs, only the keys that also differ within an option."""
    configs = [run.keys for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if differs(key, configs)]


def differs(key: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key has several values; if its group has several options, within one of them."""
    group = key.split(".")[0]
    having = [config for config in configs if key in config]  # a job that failed early has only its arguments
    options = [json.dumps(config.get(group)) for config in having] if key != group else []
    several = len({*options, "null"}) > 2
    values = {(option if several else "", json.dumps(config[key])) for config, option in zip_longest(having, options)}
    return len(values) > len({option for option, _ in values})


def group_seeds(runs: Sequence[Run], keys: Sequence[str]) -> list[list[Run]]:
    """Group runs that differ only in their seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.keys.get(key) for key in keys if key != "seed"]), []).append(run)
    return list(groups.values())


def objective(runs: Sequence[Run]) -> str | None:
    """The most frequent objective."""
    tags = Counter(run.summary.get("objective") for run in runs)
    return tags.most_common(1)[0][0]


def objective_mode(runs: Sequence[Run], tag: str | None) -> Mode:
    """Whether a high or a low objective is better; summaries of 0.1.0 and earlier do not say."""
    modes = [run.summary["mode"] for run in runs if run.summary.get("objective") == tag and "mode" in run.summary]
    return modes[0] if modes else mode_of(tag, None)


def check_metrics(runs: Sequence[Run], tags: Sequence[str]) -> None:
    """Refuse a metric that no run has.

    Raises:
        UserError: it names near matches.
    """
    known = dict.fromkeys(tag for run in runs for tag in run.summary["final"])
    if unknown := next((tag for tag in tags if tag not in known), None):
        near = get_close_matches(unknown, known, 3, 0.5)
        raise UserError(f"--metric {unknown}: no run has it" + (f"; there are {', '.join(near)}" if near else ""))


def table(runs: Sequence[Run], metrics: Sequence[str] = ()) -> list[Row]:
    """One row per setting, the best first; ``metrics`` are further columns."""
    keys, tag = varied_keys(runs), objective(runs)
    groups = group_seeds(runs, keys)
    show_seed = len(groups) == len(runs)
    rows = [make_row(group, keys, tag, show_seed, metrics) for group in groups]
    sign = -1 if objective_mode(runs, tag) == "min" else 1
    return sorted(rows, key=lambda row: sign * sort_key(row[tag or "objective"], -sign * math.inf), reverse=True)


def make_row(
    group: Sequence[Run], keys: Sequence[str], tag: str | None, show_seed: bool, metrics: Sequence[str]
) -> Row:
    """A row of the table: one run, or the seeds of one setting."""
    first = group[0]
    states = Counter(run.state for run in group)
    name = first.path.name if len(group) == 1 else f"{len(group)} seeds"
    row: Row = {"run": name, "state": ", ".join(f"{n} {s}" if len(group) > 1 else s for s, n in states.items())}
    row |= {key: first.keys.get(key) for key in keys if show_seed or key != "seed"}
    best = [run.summary["best"]["value"] for run in group if run.summary["best"]]
    row |= {tag or "objective": spread_of(group, tag), "best": spread(best), "loss": spread_of(group, "train/loss")}
    row |= {metric: spread_of(group, metric) for metric in metrics}
    row |= {"step": max(run.summary.get("step", 0) for run in group)}
    row |= {"samples/s": spread_of(group, "train/samples_per_s")}
    return row | {"minutes": sum(run.summary.get("seconds", 0) for run in group) / 60}


def spread_of(group: Sequence[Run], tag: str | None) -> Any:
    """The ``spread`` of the last values of a tag."""
    return spread([value for run in group if (value := run.summary["final"].get(tag)) is not None])


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        deviation = self.deviation if self.deviation > 1e-9 * abs(self.mean) else 0  # smaller is rounding
        return f"{self.mean:.4g} ± {deviation:.2g}"


def spread(values: Sequence[float]) -> Any:
    """None, the only value, or the ``Spread`` of several."""
    if len(values) < 2:
        return values[0] if values else None
    if not all(map(math.isfinite, values)):
        return math.nan
    return Spread(statistics.fmean(values), statistics.stdev(values))


def sort_key(value: Any, missing: float) -> float:
    value = value.mean if isinstance(value, Spread) else value
    return value if isinstance(value, (int, float)) and not math.isnan(value) else missing


def to_text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, with its head."""
    return [list(rows[0]), *([to_text(value) for value in row.values()] for row in rows)]


def show(rows: Sequence[Row]) -> None:
    """Print the table: with the width and colours of a terminal, else in plain columns."""
    head, *lines = to_cells(rows)
    if not sys.stdout.isatty():
        print(*columns([head, *lines]), sep="\n")
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, header_style="bold")
    for key in head:
        shown.add_column(key, overflow="fold")
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        found = row["state"] if "state" in row else row["runs"]  # against a baseline
        style = next((style for state, style in STYLES.items() if state in found), None)
        shown.add_row(*line, style=style or (None if number else "bold green"))
    Console(markup=False, highlight=False).print(shown)


def to_markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table as Markdown; its head comes first."""
    head, *lines = cells
    lines = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def export_rows(runs: Sequence[Run]) -> list[Row]:
    """One row per run with all of its last numbers, for other programs."""
    keys = varied_keys(runs)
    return [
        {"run": str(run.path), "state": run.state, **{key: run.keys.get(key) for key in keys},
         **{key: run.summary.get(key) for key in ("step", "samples", "seconds", "reason")}, **run.summary["final"]}
        for run in runs
    ]  # fmt: skip


def to_csv(rows: Sequence[Row]) -> str:
    file = StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
