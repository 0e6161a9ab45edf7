"""``python -m clipx.check``: everything wrong or odd about a training run, told before it starts."""

from pathlib import Path

from omegaconf import DictConfig

from clipx.config.cli import command
from clipx.config.resolve import resolve
from clipx.errors import UserError


def main() -> None:
    """The entry point."""
    command("check", check)


def check(composed: DictConfig, directory: Path) -> None:
    """The findings of one run.

    Args:
        composed: the config, as Hydra composes it for train.
        directory: the run's; it is looked at, and nothing in it changes.

    Raises:
        UserError: the run would fail.
    """
    config = resolve(composed)
    from clipx.tools.findings import (
        examine,  # torch comes in here, so that --help and mistakes in the config answer at once
    )

    wrong = examine(config, directory)
    if wrong:
        raise UserError(f"this run would fail; {wrong} of the findings, marked WRONG, would stop it")


if __name__ == "__main__":
    main()
