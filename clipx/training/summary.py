"""What a run says of itself: summary.json."""

import json
from pathlib import Path
from typing import Any

FILE = "summary.json"


def read_summary(directory: Path) -> dict[str, Any]:
    """The summary of the run in a directory; empty where there is none, or none that can be read."""
    try:
        found = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) and "state" in found else {}
