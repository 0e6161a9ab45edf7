"""``python -m clipx.compare``: a folder of runs -> one table, one plot.  Imports neither Hydra nor torch."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from clipx.config.console import columns, survive_closed_output
from clipx.errors import UserError
from clipx.tools.ablation import ablation_table, find_baseline, group_changes, plot_gains
from clipx.tools.curves import plot
from clipx.tools.runs_table import (
    Row,
    Run,
    check_metrics,
    export_rows,
    find_runs,
    objective,
    show,
    table,
    to_cells,
    to_csv,
    to_markdown,
)
from clipx.tools.score_table import check_outs, read_scores, to_rows, write_outs


@survive_closed_output()
def main() -> None:
    parser = argparse.ArgumentParser(
        "clipx.compare",
        description="Compare runs in one table, best first, with only the settings that differ.",
        epilog="python -m clipx.compare outputs/sweeps/NAME --out NAME.md --out NAME.png",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or folders that contain some")
    parser.add_argument(
        "--out",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help=".md: the table; .csv, .json: all values; .png, .svg: curves and the effect of each key",
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="TAG",
        help="a further column, such as val/retrieval/i2t_r1",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RUN",
        help="a baseline, or the folder of its seeds: what each setting changes and gains, seed by seed",
    )
    parser.add_argument(
        "--sets", action="store_true", help="what clipx.evaluate has written, data set by data set, with the mean"
    )
    options = parser.parse_args()
    try:
        if options.sets:
            return compare_sets(options)
        runs = find_runs(options.runs)
        check_metrics(runs, options.metric)
        rows, draw = against(runs, options) if options.against else (table(runs, options.metric), partial(plot, runs))
        show(rows)
        for out in options.out:
            write(runs, rows, draw, out)
    except UserError as error:
        sys.exit(str(error))


def compare_sets(options: argparse.Namespace) -> None:
    """Print, and write, the scores of runs on each data set.

    Raises:
        UserError: there are none, an option does not fit, or a file cannot be written.
    """
    if options.against or options.metric:
        raise UserError("--sets goes with neither --against nor --metric; leave one out")
    outs = list(map(str, options.out))
    check_outs(outs)
    scores = read_scores(options.runs)
    print(*columns(to_rows(scores)), sep="\n")
    write_outs(outs, scores, None)


def against(runs: Sequence[Run], options: argparse.Namespace) -> tuple[list[Row], Callable[[Path], None]]:
    """The table against a baseline, and what draws it.

    Raises:
        UserError: the baseline is not one setting, or has no objective.
    """
    baseline = find_baseline(options.against)
    tags = list(dict.fromkeys([objective(baseline) or "train/loss", *options.metric]))
    groups = group_changes(runs, baseline)
    return ablation_table(groups, baseline, tags), partial(plot_gains, groups, baseline, tags)


def write(runs: Sequence[Run], rows: Sequence[Row], draw: Callable[[Path], None], out: Path) -> None:
    """Write the table, the numbers or the plot, by the file's extension.

    Raises:
        UserError: the extension is unknown, or the file cannot be written.
    """
    formats = {
        ".md": lambda: to_markdown(to_cells(rows)),
        ".csv": lambda: to_csv(export_rows(runs)),
        ".json": lambda: json.dumps(export_rows(runs), indent=2) + "\n",
    }
    try:
        if out.suffix in (".png", ".svg"):
            draw(out)
        elif out.suffix in formats:
            out.write_text(formats[out.suffix](), encoding="utf-8")
        else:
            raise UserError(f"--out {out}: expected a name that ends in .csv, .json, .md, .png or .svg")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    main()
