"""``python -m clipx.check``: find what is wrong with a training run before it starts."""

from pathlib import Path

from omegaconf import DictConfig

from clipx.config.cli import command
from clipx.config.resolve import resolve
from clipx.config.schema import TrainConfig
from clipx.errors import UserError


def main() -> None:
    command("check", check)


def check(composed: DictConfig, directory: Path) -> None:
    """Log the findings about one run; nothing in its directory changes.

    Raises:
        UserError: the run would fail.
    """
    config = resolve(composed, TrainConfig)
    from clipx.tools.findings import examine  # imports torch

    if wrong := examine(config, directory):
        raise UserError(f"this run would fail: fix the findings marked WRONG ({wrong})")


if __name__ == "__main__":
    main()
