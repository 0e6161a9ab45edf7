"""``python -m clipx.compare``: a folder of runs -> one table, one plot.  Knows neither Hydra nor torch."""

import argparse
import csv
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

from clipx.config.console import lasting
from clipx.config.runs import suggest_runs
from clipx.training.direction import Mode, mode_of

Row = dict[str, Any]

WHERE = {"name", "varied", "stop_at", "device", "workers", "resume"}        # keys that say nothing of what a run is
BINS = 200          # points of a curve


@dataclass(frozen=True)
class Run:
    """What a run's summary.json says."""

    path: Path
    summary: Mapping[str, Any]

    @property
    def state(self) -> str:
        """finished, stopped, failed, running; or killed, where the process that should run it is gone."""
        return "killed" if self.summary["state"] == "running" and is_gone(self.summary) else self.summary["state"]

    @property
    def keys(self) -> dict[str, Any]:
        """The run's config, flat; a group's option stands under the group's name."""
        config = self.summary.get("config", {})
        return {key.removeprefix("choices."): value for key, value in config.items() if key.split(".")[0] not in WHERE}


def is_gone(summary: Mapping[str, Any]) -> bool:
    """Whether a process of this machine that wrote a summary has ended since."""
    import psutil

    process = summary.get("process", {})
    if process.get("host") != host():
        return False            # of other machines nothing is known
    try:
        return psutil.Process(process["id"]).create_time() > process["since"]       # another one has its number
    except psutil.NoSuchProcess:
        return True


def host() -> str:
    """This machine."""
    import socket

    return socket.gethostname()


def find(paths: Sequence[Path]) -> list[Run]:
    """The runs at or below some paths; what is no run's summary is named on stderr and left out.

    Raises:
        SystemExit: there is none, or a path is missing.
    """
    runs = []
    if missing := next((path for path in paths if not path.exists()), None):
        sys.exit(f"{missing}: there is no such run or folder of runs{suggest_runs(missing)}")
    for file in dict.fromkeys(file for path in paths for file in sorted(path.rglob("summary.json"))):
        try:
            runs.append(Run(file.parent, read(file)))
        except (OSError, ValueError) as error:
            print(f"{file} is left out: {error}", file=sys.stderr)
    if not runs:
        sys.exit(f"{' '.join(map(str, paths))}: no run is there; expected their folder, such as outputs/sweeps/NAME")
    return runs


def read(file: Path) -> dict[str, Any]:
    """A run's summary.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not the summary of a run.
    """
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"it cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError("it is empty or damaged, not the JSON that a run writes") from error
    parts = {"state": str, "final": dict, "best": dict}
    if not isinstance(summary, dict) or any(not isinstance(summary.get(key), kind) for key, kind in parts.items()):
        raise ValueError("it was not written by a run of clipx")
    return summary


def varied(runs: Sequence[Run]) -> list[str]:
    """The keys in which runs differ; where a group's option does, those of its keys that differ besides."""
    configs = [run.keys for run in runs]
    every = dict.fromkeys(key for config in configs for key in config)
    return [key for key in every if differs(key, configs)]


def differs(key: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key has several values; where its group has several options, whether it has under one of them."""
    group = key.split(".")[0]
    having = [config for config in configs if key in config]        # a job that failed early has its words alone
    options = [json.dumps(config.get(group)) for config in having] if key != group else []
    several = len({*options, "null"}) > 2
    values = {(option if several else "", json.dumps(config[key])) for config, option in zip_longest(having, options)}
    return len(values) > len({option for option, _ in values})


def groups(runs: Sequence[Run], keys: Sequence[str]) -> list[list[Run]]:
    """Runs that differ in their seed alone, together."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps([run.keys.get(key) for key in keys if key != "seed"]), []).append(run)
    return list(found.values())


def objective(runs: Sequence[Run]) -> str | None:
    """The tag that most runs are judged by."""
    tags = Counter(run.summary.get("objective") for run in runs)
    return tags.most_common(1)[0][0]


def mode(runs: Sequence[Run], tag: str | None) -> Mode:
    """Whether the objective is better high or low, as its runs say; runs of 0.1.0 and earlier do not."""
    said = [run.summary["mode"] for run in runs if run.summary.get("objective") == tag and "mode" in run.summary]
    return said[0] if said else mode_of(tag, None)


def row_of(group: Sequence[Run], keys: Sequence[str], tag: str | None, alone: bool) -> Row:
    """One line of the table: a run, or the seeds of one setting."""
    first = group[0]
    states = Counter(run.state for run in group)
    name = first.path.name if len(group) == 1 else f"{len(group)} seeds"
    row: Row = {"run": name, "state": ", ".join(f"{n} {s}" if len(group) > 1 else s for s, n in states.items())}
    row |= {key: first.keys.get(key) for key in keys if alone or key != "seed"}
    final = [value for run in group if (value := run.summary.get("final", {}).get(tag)) is not None]
    best = [run.summary["best"]["value"] for run in group if run.summary.get("best")]
    rates = [rate for run in group if (rate := run.summary.get("final", {}).get("train/samples_per_s"))]
    row |= {tag or "objective": spread(final), "best": spread(best), "loss": spread(
        [loss for run in group if (loss := run.summary.get("final", {}).get("train/loss")) is not None])}
    row |= {"step": max(run.summary.get("step", 0) for run in group), "samples/s": spread(rates)}
    return row | {"minutes": sum(run.summary.get("seconds", 0) for run in group) / 60}


def spread(values: Sequence[float]) -> Any:
    """A number, or the mean and the standard deviation of several; None of none."""
    if len(values) < 2:
        return values[0] if values else None
    if not all(map(math.isfinite, values)):
        return math.nan
    return Spread(statistics.fmean(values), statistics.stdev(values))


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        deviation = self.deviation if self.deviation > 1e-9 * abs(self.mean) else 0      # beneath it, rounding
        return f"{self.mean:.4g} ± {deviation:.2g}"


def mean(value: Any, otherwise: float) -> float:
    """What a row is sorted by."""
    value = value.mean if isinstance(value, Spread) else value
    return value if isinstance(value, (int, float)) and not math.isnan(value) else otherwise


def text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(runs: Sequence[Run]) -> list[Row]:
    """One row a setting, the best first."""
    keys, tag = varied(runs), objective(runs)
    together = groups(runs, keys)
    alone = len(together) == len(runs)
    rows = [row_of(group, keys, tag, alone) for group in together]
    sign = -1 if mode(runs, tag) == "min" else 1
    return sorted(rows, key=lambda row: sign * mean(row[tag or "objective"], -sign * math.inf), reverse=True)


def plain(rows: Sequence[Row]) -> str:
    """The table in columns."""
    lines = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)


STYLES = {"failed": "red", "killed": "red", "running": "yellow", "stopped": "yellow"}


def show(rows: Sequence[Row]) -> None:
    """The table on a terminal, in its width and colours; in plain columns where there is none."""
    if not sys.stdout.isatty():
        print(plain(rows))
        return
    from rich.console import Console
    from rich.table import Table

    found = Table(box=None, header_style="bold")
    for key in rows[0]:
        found.add_column(key, overflow="fold")
    for number, row in enumerate(rows):
        style = next((style for state, style in STYLES.items() if state in row["state"]), None)
        found.add_row(*map(text, row.values()), style=style or (None if number else "bold green"))
    Console(markup=False, highlight=False).print(found)


def markdown(rows: Sequence[Row]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def flat_rows(runs: Sequence[Run]) -> list[Row]:
    """One row a run, with all of its last numbers, for other programs."""
    keys = varied(runs)
    return [
        {"run": str(run.path), "state": run.state, **{key: run.keys.get(key) for key in keys},
         **{key: run.summary.get(key) for key in ("step", "samples", "seconds", "reason")}, **run.summary["final"]}
        for run in runs
    ]  # fmt: skip


def commas(rows: Sequence[Row]) -> str:
    file = StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def points(run: Run, tag: str) -> Iterator[tuple[int, int, float, float]]:
    """Step, samples, hours and value, line by line of metrics.jsonl; the last line may be half written.

    Raises:
        SystemExit: another line is damaged.
    """
    file = run.path / "metrics.jsonl"
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
        except ValueError:
            sys.exit(f"{file}: line {number} is damaged; without that line, or without the run, the others are drawn")
        if tag in row:
            yield row["step"], row["samples"], row["seconds"] / 3600, row[tag]


def plot(runs: Sequence[Run], out: Path) -> None:
    """Curves of the objective and the loss against steps, samples and hours; below, what each varied key does."""
    from matplotlib.figure import Figure

    tag, keys = objective(runs), [key for key in varied(runs) if key != "seed"]
    tags = [name for name in (tag, "train/loss") if name]
    lines = len(tags) + (-(-len(keys) // 3) if tag else 0)
    figure = Figure(figsize=(15, 4.2 * lines), layout="tight")
    for line, name in enumerate(tags):
        for column, axis in enumerate(("steps", "samples", "hours")):
            axes = figure.add_subplot(lines, 3, 3 * line + column + 1, xlabel=axis, ylabel=name)
            for run in runs:
                rows = list(points(run, name))
                rows = rows[:: -(-len(rows) // BINS) or 1]
                label = ", ".join(f"{key}={run.keys.get(key)}" for key in varied(runs)) or run.path.name
                axes.plot([row[column] for row in rows], [row[3] for row in rows], label=label, linewidth=1)
            if not column and len(runs) <= 12:
                axes.legend(fontsize=7)
    for place, key in enumerate(keys if tag else [], 3 * len(tags) + 1):
        effect(figure.add_subplot(lines, 3, place, xlabel=key, ylabel=tag), runs, key, tag)
    figure.savefig(out)


def effect(axes: Any, runs: Sequence[Run], key: str, tag: str) -> None:
    """The last objective of each run against one key."""
    pairs = [(run.keys.get(key), value) for run in runs if (value := run.summary["final"].get(tag)) is not None]
    numbers = all(isinstance(setting, (int, float)) and not isinstance(setting, bool) for setting, _ in pairs)
    settings = [setting if numbers else json.dumps(setting) for setting, _ in pairs]
    axes.plot(settings, [value for _, value in pairs], "o")
    if numbers and settings and min(settings) > 0 and max(settings) >= 5 * min(settings):
        axes.set_xscale("log")


def write(runs: Sequence[Run], rows: Sequence[Row], out: Path) -> None:
    """The table, the numbers or the plot, by the file's ending.

    Raises:
        SystemExit: the ending is unknown, or the file cannot be written.
    """
    kinds = {".md": lambda: markdown(rows), ".csv": lambda: commas(flat_rows(runs)),
             ".json": lambda: json.dumps(flat_rows(runs), indent=2) + "\n"}
    try:
        if out.suffix in (".png", ".svg"):
            plot(runs, out)
        elif out.suffix in kinds:
            out.write_text(kinds[out.suffix](), encoding="utf-8")
        else:
            sys.exit(f"--out {out}: expected a name that ends in .csv, .json, .md, .png or .svg")
    except OSError as error:
        sys.exit(f"--out {out} cannot be written: {error.strerror}")


@lasting()
def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(
        "clipx.compare", description="Compare runs: one table, the best first; only what differs between them.",
        epilog="python -m clipx.compare outputs/sweeps/NAME --out NAME.md --out NAME.png",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs, or folders of them")
    parser.add_argument("--out", action="append", type=Path, default=[], metavar="FILE",
                        help=".md the table; .csv, .json every number; .png, .svg curves and the effect of each key")
    given = parser.parse_args()
    runs = find(given.runs)
    rows = table(runs)
    show(rows)
    for out in given.out:
        write(runs, rows, out)


if __name__ == "__main__":
    main()
