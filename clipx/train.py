"""``python -m clipx.train``: config -> run -> the objective."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clipx.config.cli import call, command
from clipx.config.instantiate import build
from clipx.config.resolve import check_nodes, typed_values
from clipx.config.schema import TrainConfig
from clipx.config.validate import check_node
from clipx.training.direction import mode_of
from clipx.training.existing_run import check_existing_run


def main() -> None:
    command("train", train, trains=True)


def train(composed: DictConfig, directory: Path) -> float | None:
    """Train, or resume the run in a directory.

    Returns:
        The last value of ``objective``, if there is one.

    Raises:
        UserError: the config, the data or the run is wrong.
    """
    values = typed_values(composed, TrainConfig)
    check_early(values, directory)
    config = check_nodes(values, TrainConfig)
    for tag in filter(None, (config.best, config.objective)):
        mode_of(tag, config.mode)
    from clipx.models.numerics import numerics  # imports torch: errors in the config and --help do not wait for it
    from clipx.training import run as training

    with numerics(config.matmul_precision, config.deterministic):
        return training.run(config, directory)


def check_early(values: Mapping[str, Any], directory: Path) -> None:
    """Check what needs no torch, which takes seconds to import.

    Args:
        values: the typed config, with its nodes as written.
        directory: of the run.

    Raises:
        UserError: the directory holds another run, or the data or the initial weights do not exist.
    """
    check_existing_run(values, directory)
    data, trust = values["data"], values["trust"]
    root = data.get("root")
    is_ours = str(data.get("_target_")).startswith("clipx.data.")  # without torch
    if is_ours and isinstance(root, str) and not data.get("shards") and not Path(root).expanduser().is_dir():
        build(check_node(data, "data", trust), "data", trust)  # raises the error that names the layout


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train from Python, for example in a notebook.

        summary = clipx.train.run(overrides=["model=small", "data=folder", "data.root=DIR"])

    Args:
        overrides: command-line arguments, without switches; one call is one run.

    Returns:
        The content of summary.json: state, final and best numbers.

    Raises:
        UserError: an argument, the data or the run is wrong; what was saved stays.
    """
    return json.loads((call("train", train, overrides) / "summary.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
