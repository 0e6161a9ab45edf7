"""A sweep as a whole: whether there is one, what it varies, and how each of its jobs ends."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from clipx.config import arguments
from clipx.config.console import other_rank, tell
from clipx.config.help import config_dirs
from clipx.config.meaning import CONF, is_neutral
from clipx.errors import Interrupted, UserError
from clipx.training.summary import FILE, read_summary

UNSET, SWEEP_UNSET = "./.", f"{arguments.OUTPUTS}/.sweep"       # in conf/hydra/output/clipx.yaml


def is_sweep(given: Sequence[str]) -> bool:
    """Whether the words start several jobs: ``-m`` is among them, or a recipe whose ``hydra.mode`` is MULTIRUN."""
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(given):
        return True
    folders = [files(CONF), *config_dirs(given)]
    names = [word.partition("=")[2] for word in given if word.startswith("experiment=")]
    recipes = [folder / "experiment" / f"{name}.yaml" for name in names for folder in folders]
    found = [yaml.safe_load(recipe.read_text(encoding="utf-8")) for recipe in recipes if recipe.is_file()]
    return any((recipe.get("hydra") or {}).get("mode") == "MULTIRUN" for recipe in found if isinstance(recipe, dict))


def varied(given: Sequence[str], params: Sequence[str], sweep: bool) -> list[str]:
    """The keys that a sweep varies; of a single run those that its words set.

    Args:
        given: the overrides, in Hydra's grammar.
        params: keys that the sweeper's own config varies.
        sweep: whether it is one.
    """
    overrides = OverridesParser.create().parse_overrides(list(given))
    named = [over.key_or_group for over in overrides if over.is_sweep_override() or not sweep]
    return [key for key in dict.fromkeys([*params, *named]) if not is_neutral(key)]


def obeyed(hydra: DictConfig, directory: Path, sweep: bool) -> Path:
    """The directory of a run: where Hydra's settings put it, else the one that clipx names.

    Args:
        hydra: the settings; those that nobody has changed are those of conf/hydra/output/clipx.yaml.
        directory: as clipx names it.
        sweep: whether it is one of several runs.
    """
    if not sweep:
        return directory if hydra.run.dir == UNSET else Path(hydra.run.dir)
    place = directory.parent if hydra.sweep.dir == SWEEP_UNSET else Path(hydra.sweep.dir)
    return place / (directory.name if hydra.sweep.subdir == UNSET else hydra.sweep.subdir)


def settings(overrides: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """What a job's words give some keys."""
    parsed = OverridesParser.create().parse_overrides([word for word in overrides if arguments.key_of(word) in keys])
    return {override.key_or_group: override.value() for override in parsed}


class Failures:
    """The jobs that have failed, a line each, in a file: jobs may be in processes of their own.

    Args:
        file: is removed when they have been told.
    """

    def __init__(self, file: Path):
        self.file = file

    def note(self, line: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def told(self) -> list[str]:
        """All of them."""
        if not self.file.exists():
            return []
        lines = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        self.file.unlink()
        return lines


@dataclass(frozen=True)
class JobEnd:
    """Tells how a job of a sweep ends, for the length of a ``with``; one that fails does not end the sweep.

    Args:
        number: of the job.
        config: what the sweep has varied, for this job.
        directory: its run's.
        failures: where it is noted.
        trains: whether it is a training run; one that fails before it has begun leaves a summary.json all the same.
    """

    number: int
    config: Mapping[str, Any]
    directory: Path
    failures: Failures
    trains: bool

    def __enter__(self) -> "JobEnd":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error and not isinstance(error, Exception):
            if isinstance(error, Interrupted) and not other_rank():
                self.tell(None)
            return False                            # a signal, which ends the sweep
        if not other_rank():
            self.tell(error)
        return True

    def tell(self, error: Exception | None) -> None:
        """A line now, and one at the sweep's end if the job has failed."""
        if error is None:
            if self.trains:
                tell(f"[{self.number}] {self.directory.name}: {ending(self.directory)}")
            return
        reason = str(error).strip()
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}"
            logging.getLogger("clipx").error("job %d", self.number, exc_info=error)
        tell(f"[{self.number}] {self.directory.name}: failed: {reason}")
        self.failures.note(f"{self.directory.name}: {reason}")
        if self.trains:
            self.leave_summary(reason)

    def leave_summary(self, reason: str) -> None:
        """Where no run has left one."""
        if "step" in read_summary(self.directory) or (self.directory.exists() and not self.directory.is_dir()):
            return
        summary = {"state": "failed", "reason": reason, "final": {}, "best": {}, "config": self.config}
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / FILE).write_text(json.dumps(summary, indent=2) + "\n")


def ending(directory: Path) -> str:
    """A job in a line: its state, what it is worth, how long it took."""
    summary = read_summary(directory)
    tag = summary.get("objective")
    worth = f", {tag} {summary['final'][tag]:.4g}" if tag in summary["final"] else ""
    return f"{summary['state']} at step {summary['step']:,}{worth}, {summary['seconds'] / 60:.1f} min"


def has_failed(directory: Path) -> bool:
    """Whether the run there has, and said so."""
    return read_summary(directory).get("state") == "failed"
