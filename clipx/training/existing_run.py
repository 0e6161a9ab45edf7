"""Refuse early, without torch, to train in the directory of another run or from missing checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipx.config.meaning import LENGTH_KEYS, certain_differences, refusal_message
from clipx.config.runs import check_exists
from clipx.errors import UserError
from clipx.weights.peek import read_config


def check_directory(directory: Path) -> None:
    """
    Raises:
        UserError: the run's directory, or one of its parents, is a file.
    """
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise UserError(
                f"{path} is a file where the run's directory {directory} should be; move it away, or set "
                "name=... to train elsewhere"
            )


def resumable(checkpoints: Path) -> list[Path]:
    """The checkpoints to resume from: the last, then the one before it."""
    return [path for which in ("last", "previous") if (path := checkpoints / f"clip_{which}.pt").exists()]


def check_new(resume: str | None, checkpoints: Path) -> None:
    """
    Raises:
        UserError: ``resume`` is None, but there is a run.
    """
    if resume is None and resumable(checkpoints):
        raise UserError(f"{checkpoints.parent} holds a run; resume=auto resumes it, name=... starts another")


def check_existing_run(config: Mapping[str, Any], directory: Path) -> None:
    """Make the checks that need neither torch nor data; training makes all of them.

    Args:
        config: typed values; its nodes may be unresolved.
        directory: of the run.

    Raises:
        UserError: the directory contains another run, or ``resume``, ``init_from`` or ``teacher`` does not
            exist.
    """
    check_new(config["resume"], directory / "checkpoints")
    if config["teacher"] is not None:
        check_exists("teacher", config["teacher"])
    found = resumable(directory / "checkpoints")
    if config["resume"] not in (None, "auto"):
        check_exists("resume", config["resume"])
    elif found:
        saved = read_config(found[0])
        changes = certain_differences(saved, config) if saved else {}  # corrupt: loading reports it
        changes = {key: text for key, text in changes.items() if key not in LENGTH_KEYS}
        if why := refusal_message(found[0], changes, config):
            raise UserError(why)
    elif isinstance(config["init_from"], str):
        check_exists("init_from", config["init_from"])
    else:
        for tower, where in (config["init_from"] or {}).items():
            check_exists(f"init_from.{tower}", where)
