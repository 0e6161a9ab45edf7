"""``python -m clipx.train``: config -> run -> the objective."""

from pathlib import Path

from omegaconf import DictConfig

from clipx.config import command, resolve


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
    """
    config = resolve(composed)
    from clipx.run import run  # torch comes in here, so that --help and mistakes in the config answer at once

    return run(config, directory)


if __name__ == "__main__":
    main()
