"""``python -m clipx.train``: config -> run -> the objective."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clipx.config.cli import call, command
from clipx.config.instantiate import build
from clipx.config.resolve import resolve, typed_values
from clipx.config.validate import check_node
from clipx.training.direction import mode_of
from clipx.training.existing_run import check_existing_run


def main() -> None:
    """The entry point."""
    command("train", train, trains=True)


def train(composed: DictConfig, directory: Path) -> float | None:
    """One run.

    Args:
        composed: the config, as Hydra composes it.
        directory: the run's; it goes on from what stands there.

    Returns:
        The last value of ``objective``; None where there is none.

    Raises:
        UserError: something is wrong with the config, the data or the run.
    """
    check_early(typed_values(composed), directory)
    config = resolve(composed)
    for tag in filter(None, (config.best, config.objective)):
        mode_of(tag, config.mode)
    from clipx.training import run as training  # torch comes in here: --help and mistakes in the config answer at once

    return training.run(config, directory)


def check_early(values: Mapping[str, Any], directory: Path) -> None:
    """Refuse what can be refused without torch, which takes seconds to import.

    Args:
        values: of the config, typed; the nodes as they are written.
        directory: the run's.

    Raises:
        UserError: the run there is another one, or the data or what it starts from are not there.
    """
    check_existing_run(values, directory)
    data, trust = values["data"], values["trust"]
    root = data.get("root")
    ours = str(data.get("_target_")).startswith("clipx.data.")          # without torch
    if ours and isinstance(root, str) and not data.get("shards") and not Path(root).expanduser().is_dir():
        build(check_node(data, "data", trust), "data", trust)           # says what should be there


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train from Python, as in a notebook.

        summary = clipx.train.run(overrides=["model=small", "data=folder", "data.root=DIR"])

    Args:
        overrides: the words of a command line, without switches; one call is one run.

    Returns:
        The run's summary.json: its state, final and best numbers.

    Raises:
        UserError: something is wrong with the words, the data or the run; nothing is lost.
    """
    return json.loads((call("train", train, overrides) / "summary.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
