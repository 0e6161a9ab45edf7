"""Read summary.json."""

import json
from pathlib import Path
from typing import Any

FILE = "summary.json"


def read_summary(directory: Path) -> dict[str, Any]:
    """Return the summary of a run; empty if it is missing or unreadable."""
    try:
        found = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) and "state" in found else {}
