"""Read summary.json."""

import json
from pathlib import Path
from typing import Any

FILE = "summary.json"


def read_summary(directory: Path) -> dict[str, Any]:
    """Read the summary of a run; empty if it is missing or not a run's."""
    try:
        return load_summary(directory)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def load_summary(directory: Path) -> dict[str, Any]:
    """Read the summary of a run.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a run's summary.
    """
    try:
        summary = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError("it is empty or corrupt, not the JSON that a run writes") from error
    types = {"state": str, "final": dict, "best": dict}
    if not isinstance(summary, dict) or any(not isinstance(summary.get(key), kind) for key, kind in types.items()):
        raise ValueError("it was not written by a run of clipx")
    return summary
