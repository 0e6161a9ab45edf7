"""``python -m clipx.evaluate``: runs or weights -> numbers."""

from pathlib import Path

from omegaconf import DictConfig

from clipx.config.cli import command
from clipx.config.resolve import resolve, typed_values
from clipx.config.runs import check_exists, expand_runs
from clipx.config.schema import EvaluateConfig
from clipx.errors import UserError


def main() -> None:
    """The entry point."""
    command("evaluate", evaluate)


def evaluate(composed: DictConfig, directory: Path) -> None:
    """The numbers of some runs.

    Args:
        composed: the config, as Hydra composes it.
        directory: where results go that can stand beside nothing, since the weights are no file.
    """
    for run in expand_runs(typed_values(composed, EvaluateConfig)["run"]):
        check_exists("run", run)
    config = resolve(composed, EvaluateConfig)
    from clipx.tools.score import score  # torch comes in here, so that --help and mistakes in the config answer at once

    try:
        score(config, directory)
    except KeyboardInterrupt:
        raise UserError("interrupted; runs that were done before have their numbers in metrics.json") from None


if __name__ == "__main__":
    main()
