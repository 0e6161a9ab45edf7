"""``python -m clipx.bench``: where the time and memory of a run go on this machine, and what to change."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clipx.config.cli import command
from clipx.config.resolve import resolve
from clipx.config.schema import BenchConfig, TrainConfig


def main() -> None:
    command("bench", bench)


def bench(composed: DictConfig, directory: Path) -> None:
    """Measure the loader alone, then the training step.

    Raises:
        UserError: the config or the data is wrong.
    """
    keys, config = split_config(composed)
    from clipx.models.numerics import numerics  # imports torch
    from clipx.tools.bench import bench_loader, bench_step, report_bound

    results: dict[str, Any] = {}
    trace = directory / "trace.json" if keys.trace else None
    with numerics(config.matmul_precision, config.deterministic):
        if "loader" in keys.parts:
            results["loader"] = bench_loader(config, keys.rounds, keys.seconds)
        if "step" in keys.parts:
            results["step"] = bench_step(config, keys.rounds, keys.steps, trace)
            report_bound(config, results)
    if keys.json:
        Path(keys.json).write_text(json.dumps(results, indent=2) + "\n")


def split_config(composed: DictConfig) -> tuple[BenchConfig, TrainConfig]:
    """Separate the keys of bench from the config of the run that it measures.

    Raises:
        UserError: a key is wrong.
    """
    own = [field.name for field in fields(BenchConfig)]
    rest = [str(key) for key in composed if key not in own]
    return (
        resolve(OmegaConf.masked_copy(composed, own), BenchConfig),
        resolve(OmegaConf.masked_copy(composed, rest), TrainConfig),
    )


if __name__ == "__main__":
    main()
