"""What a run's directory holds, read without torch: another run, or nothing to start from, is refused at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipx.config.meaning import LENGTH_KEYS, certain_differences, refusal_message
from clipx.config.runs import check_exists
from clipx.errors import UserError
from clipx.weights.peek import read_config


def standing(checkpoints: Path) -> list[Path]:
    """The checkpoints that a run of a directory resumes from: the last, and the one before it."""
    return [path for which in ("last", "previous") if (path := checkpoints / f"clip_{which}.pt").exists()]


def check_new(resume: str | None, checkpoints: Path) -> None:
    """
    Raises:
        UserError: the run should start anew, and there is one.
    """
    if resume is None and standing(checkpoints):
        raise UserError(f"{checkpoints.parent} holds a run; resume=auto goes on with it, name=... starts another")


def check_kept(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse within a second or two what training would refuse as well, once torch is there and the data are read.

    Args:
        config: typed values; its nodes may be as they are written.
        directory: the run's.

    Raises:
        UserError: the run in the directory is another one, or there is nothing at ``resume`` or ``init_from``.
    """
    check_new(config["resume"], directory / "checkpoints")
    kept = standing(directory / "checkpoints")
    if config["resume"] not in (None, "auto"):
        check_exists("resume", config["resume"])
    elif kept:
        saved = read_config(kept[0])
        changes = certain_differences(saved, config) if saved else {}      # corrupt: loading reports it
        changes = {key: text for key, text in changes.items() if key not in LENGTH_KEYS}
        if why := refusal_message(kept[0], changes, config):
            raise UserError(why)
    elif config["init_from"]:
        check_exists("init_from", config["init_from"])
