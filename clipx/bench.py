"""``python -m clipx.bench``: where the time and memory of a run go on this machine, and what to change."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveFloat, PositiveInt

from clipx.config.cli import command
from clipx.config.resolve import resolve
from clipx.config.schema import TrainConfig
from clipx.config.validate import check_call


@dataclass(frozen=True)
class Bench:
    """The keys that bench adds to those of a training run; conf/bench.yaml explains each."""

    parts: list[Literal["loader", "step"]]
    rounds: PositiveInt
    steps: PositiveInt
    seconds: PositiveFloat
    trace: bool
    json: str | None


def main() -> None:
    """The entry point."""
    command("bench", bench)


def split(composed: DictConfig) -> tuple[Bench, TrainConfig]:
    """Bench's own keys, and the config of the run that is measured.

    Raises:
        UserError: a key is wrong.
    """
    own = [field.name for field in fields(Bench)]
    keys = Bench(**check_call(Bench, OmegaConf.to_container(OmegaConf.masked_copy(composed, own))))
    return keys, resolve(OmegaConf.masked_copy(composed, [key for key in composed if key not in own]))


def bench(composed: DictConfig, directory: Path) -> None:
    """Measure the loader alone, then the training step.

    Raises:
        UserError: the config or the data is wrong.
    """
    keys, config = split(composed)
    from clipx.tools.bench import bench_loader, bench_step, report_bound  # imports torch

    found: dict[str, Any] = {}
    if "loader" in keys.parts:
        found["loader"] = bench_loader(config, keys.rounds, keys.seconds)
    if "step" in keys.parts:
        found["step"] = bench_step(config, keys.rounds, keys.steps, directory / "trace" if keys.trace else None)
        report_bound(config, found)
    if keys.json:
        Path(keys.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
