"""Sweeps: whether the arguments start one, what it varies, and a report of each job."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser

from clipx.config.arguments import OUTPUTS, key_of
from clipx.config.console import nonzero_rank, write_line
from clipx.config.help import config_dirs
from clipx.config.meaning import CONF, is_neutral
from clipx.errors import Interrupted, UserError
from clipx.training.summary import FILE, read_summary

UNSET, SWEEP_UNSET = "./.", f"{OUTPUTS}/.sweep"  # defaults of conf/hydra/output/clipx.yaml


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether the arguments start several jobs: with ``-m``, or an experiment whose ``hydra.mode`` is MULTIRUN."""
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        return True
    folders = [files(CONF), *config_dirs(arguments)]
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("experiment=")]
    paths = [folder / "experiment" / f"{name}.yaml" for name in names for folder in folders]
    recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    return any((recipe.get("hydra") or {}).get("mode") == "MULTIRUN" for recipe in recipes if isinstance(recipe, dict))


def varied_keys(overrides: Sequence[str], params: Sequence[str], sweep: bool) -> list[str]:
    """The keys that a sweep varies, or that the arguments of a single run set.

    Args:
        overrides: in Hydra's grammar.
        params: keys that the sweeper's config varies.
        sweep: whether this is a sweep.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    keys = [override.key_or_group for override in parsed if override.is_sweep_override() or not sweep]
    return [key for key in dict.fromkeys([*params, *keys]) if not is_neutral(key)]


def apply_hydra_dirs(hydra: HydraConf, directory: Path, sweep: bool) -> Path:
    """The directory of a run: as set by the user in Hydra's settings, else as named by clipx.

    Args:
        hydra: Hydra's settings.
        directory: as named by clipx.
        sweep: whether the run is a job of a sweep.
    """
    if not sweep:
        return directory if hydra.run.dir == UNSET else Path(hydra.run.dir)
    parent = directory.parent if hydra.sweep.dir == SWEEP_UNSET else Path(hydra.sweep.dir)
    return parent / (directory.name if hydra.sweep.subdir == UNSET else hydra.sweep.subdir)


def swept_values(overrides: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """The values that a job's overrides give to some keys."""
    parsed = OverridesParser.create().parse_overrides([text for text in overrides if key_of(text) in keys])
    return {override.key_or_group: override.value() for override in parsed}


class FailureLog:
    """The failed jobs of a sweep, a line each.  They are kept in a file, because jobs may run in other processes."""

    def __init__(self, file: Path):
        self.file = file

    @classmethod
    def of_this_process(cls) -> "FailureLog":
        return cls(OUTPUTS / ".sweep" / f"failed-{os.getpid()}")

    def add(self, line: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pop_all(self) -> list[str]:
        """Return the lines and delete the file."""
        if not self.file.exists():
            return []
        lines = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        self.file.unlink()
        return lines


@dataclass(frozen=True)
class JobReport:
    """Context manager of one job: reports how it ends, and swallows its error so that the sweep continues.

    Args:
        number: of the job.
        config: the values that the sweep varies.
        directory: of the run.
        failures: where a failure is recorded.
        trains: whether it is a training run, which gets a summary.json even if it fails before it starts.
    """

    number: int
    config: Mapping[str, Any]
    directory: Path
    failures: FailureLog
    trains: bool

    def __enter__(self) -> "JobReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        ended = error is None or isinstance(error, Exception)
        if (ended or isinstance(error, Interrupted)) and not nonzero_rank():
            self.report(error if ended else None)
        return ended  # a signal ends the sweep

    def report(self, error: BaseException | None) -> None:
        """Write a line now and, if the job failed, one at the end of the sweep."""
        if error is None:
            if self.trains:
                write_line(f"[{self.number}] {self.directory.name}: {describe_run(self.directory)}")
            return
        reason = str(error).strip()
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}"
            logging.getLogger("clipx").error("job %d", self.number, exc_info=error)
        write_line(f"[{self.number}] {self.directory.name}: failed: {reason}")
        self.failures.add(f"{self.directory.name}: {reason}")
        if self.trains:
            self.write_failed_summary(reason)

    def write_failed_summary(self, reason: str) -> None:
        """Write summary.json, unless the run has written one."""
        if "step" in read_summary(self.directory) or (self.directory.exists() and not self.directory.is_dir()):
            return
        summary = {"state": "failed", "reason": reason, "final": {}, "best": {}, "config": self.config}
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / FILE).write_text(json.dumps(summary, indent=2) + "\n")


def describe_run(directory: Path) -> str:
    """State, objective and duration of a run, in one line."""
    summary = read_summary(directory)
    tag = summary.get("objective")
    objective = f", {tag} {summary['final'][tag]:.4g}" if tag in summary["final"] else ""
    return f"{summary['state']} at step {summary['step']:,}{objective}, {summary['seconds'] / 60:.1f} min"
