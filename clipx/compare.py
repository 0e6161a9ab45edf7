"""``python -m clipx.compare``: a folder of runs -> one table, one plot.  Imports neither Hydra nor torch."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from clipx.config.console import survive_closed_output
from clipx.errors import UserError
from clipx.tools.runs_table import Row, Run, export_rows, find_runs, show, table, to_csv, to_markdown


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
    options = parser.parse_args()
    try:
        runs = find_runs(options.runs)
        rows = table(runs)
        show(rows)
        for out in options.out:
            write(runs, rows, out)
    except UserError as error:
        sys.exit(str(error))


def write(runs: Sequence[Run], rows: Sequence[Row], out: Path) -> None:
    """Write the table, the numbers or the plot, by the file's extension.

    Raises:
        UserError: the extension is unknown, or the file cannot be written.
    """
    formats = {
        ".md": lambda: to_markdown(rows),
        ".csv": lambda: to_csv(export_rows(runs)),
        ".json": lambda: json.dumps(export_rows(runs), indent=2) + "\n",
    }
    try:
        if out.suffix in (".png", ".svg"):
            from clipx.tools.curves import plot  # imports matplotlib

            plot(runs, out)
        elif out.suffix in formats:
            out.write_text(formats[out.suffix](), encoding="utf-8")
        else:
            raise UserError(f"--out {out}: expected a name that ends in .csv, .json, .md, .png or .svg")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    main()
