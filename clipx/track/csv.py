"""metrics.csv: a table for spreadsheets."""

import csv
import os
from collections.abc import Mapping
from typing import TextIO

from clipx.track import TrackedRun, Tracker

FIRST = ("step", "samples", "epoch", "seconds")  # columns


class CsvTable(Tracker):
    """Write metrics.csv: a line for each line of metrics.jsonl, a column for each tag."""

    def start(self, run: TrackedRun) -> None:
        self.path, self.rows = run.directory / "metrics.csv", [dict(row) for row in run.rows]
        self.file = self.rewrite()

    def log(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))
        if row.keys() <= set(self.columns):
            csv.DictWriter(self.file, self.columns).writerow(row)
        else:  # a new tag
            self.file.close()
            self.file = self.rewrite()

    def rewrite(self) -> TextIO:
        """Write all rows, with the columns in the order in which they first appear, and leave the file open."""
        self.columns = [*dict.fromkeys([*FIRST, *(key for row in self.rows for key in row)])]
        file = self.path.open("w", newline="", encoding="utf-8")
        writer = csv.DictWriter(file, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        file.flush()
        return file

    def view(self) -> str:
        return str(self.path)

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self, state: str) -> None:
        self.file.close()
