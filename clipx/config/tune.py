"""A search: Optuna proposes the overrides of the jobs, and poor trials stop early."""

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from clipx import duration
from clipx.config.arguments import escape_override, run_directory
from clipx.config.console import write_line
from clipx.config.resolve import to_dict
from clipx.config.study import Direction, SearchSettings, lock_search, make_sampler, open_study, propose
from clipx.config.sweep import UNSET, apply_hydra_dirs, varied_keys
from clipx.config.validate import ConfigError, check_call
from clipx.errors import UserError
from clipx.training.direction import Mode, mode_of
from clipx.training.summary import read_summary

SWEEPER = "hydra.sweeper."


def tune(
    given: dict[str, Any], config: DictConfig, arguments: list[str], launcher: Launcher, loader: ConfigLoader
) -> None:
    """Run a search, or resume it.

    Args:
        given: the config of the sweeper.
        config: of all jobs, with Hydra's settings.
        arguments: overrides, some of which vary.
        launcher: runs the jobs.
        loader: resolves the options of groups.

    Raises:
        UserError: a key is wrong, or jobs returned no objective, which is raised after the others have run.
    """
    settings = SearchSettings(**check_call(SearchSettings, given, SWEEPER))
    check_rungs(settings.rungs)
    params = [escape_override(f"{key}={value}", sweep=True) for key, value in settings.params.items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*params, *arguments])
    overrides = {override.get_key_element(): override for override in parsed}.values()
    space = [override for override in overrides if override.is_sweep_override()]
    if not space:
        raise ConfigError(
            "there is nothing to search; give a key several values, such as 'optim.lr=tag(log,interval(1e-5,1e-2))'"
        )
    plain = to_dict(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]), resolve=True)
    if plain.get("objective") is None:
        raise ConfigError("objective=null: a search needs a metric, such as val/retrieval/mean_recall")
    settings = replace(settings, direction=direction_of(settings.direction, plain["objective"], plain.get("mode")))
    name = None if plain.get("name") is None else str(plain["name"])
    keys = varied_keys(arguments, list(settings.params), sweep=True)
    if config.hydra.sweep.subdir != UNSET:
        raise ConfigError(
            f"hydra.sweep.subdir={config.hydra.sweep.subdir}: a search names its jobs' directories; "
            "set hydra.sweep.dir to move them"
        )
    directory = apply_hydra_dirs(config.hydra, run_directory([], name, keys), sweep=True).parent
    meaning = {**plain, "hydra": {"sweeper": {
        "params": {override.get_key_element(): override.get_value_string() for override in space},
        "direction": settings.direction, "rungs": settings.rungs,
    }}}  # fmt: skip
    fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    with lock_search(directory):
        study = open_study(directory, settings, meaning)
        Search(settings, study, launcher, space, fixed, keys, name, directory, plain["objective"]).run()


def direction_of(given: Direction | None, objective: str, mode: Mode | None) -> Direction:
    """The direction of a search, which is that of its objective.

    Raises:
        ConfigError: the config of the sweeper contradicts it.
    """
    direction: Direction = "maximize" if mode_of(objective, mode) == "max" else "minimize"
    if given and given != direction:
        raise ConfigError(
            f"hydra.sweeper.direction={given}: {objective} is better when it is "
            f"{'high' if direction == 'maximize' else 'low'}; leave direction out, or set "
            f"mode={given[:3]} if that is wrong"
        )
    return direction


def check_rungs(rungs: Sequence[duration.Duration]) -> None:
    """Check that each rung is later than the one before.

    Raises:
        ConfigError: one is not.
    """
    lengths = [duration.parse(rung) for rung in rungs]
    if len({unit for _, unit in lengths}) > 1 or sorted(set(lengths)) != lengths:
        raise ConfigError(
            f"{SWEEPER}rungs=[{','.join(map(str, rungs))}]: should be durations of one unit, each longer "
            "than the one before"
        )


@dataclass(frozen=True)
class Search:
    """A running search."""

    settings: SearchSettings
    study: Study
    launcher: Launcher
    space: list[Override]
    fixed: list[str]  # overrides of every job
    keys: list[str]  # that vary, and name a job's directory
    name: str | None
    directory: Path
    objective: str
    errors: list[str] = field(default_factory=list)  # of jobs that could not report them

    def run(self) -> None:
        """Run all trials, starting with those that an earlier process left unfinished."""
        begun = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        unfinished = [Trial(self.study, trial._trial_id) for trial in begun]
        while batch := self.next_batch(unfinished):
            for height, rung in enumerate(self.settings.rungs):
                batch = self.run_to_rung(batch, 2**height, rung)  # powers of two, for successive halving
            for trial, value in zip(batch, self.launch(batch, ""), strict=True):
                self.study.tell(trial, value, TrialState.FAIL if value is None else None)
        self.report()
        if self.errors:
            raise UserError("\n".join(dict.fromkeys(self.errors)))

    def next_batch(self, unfinished: list[Trial]) -> list[Trial]:
        """Take the next trials from the unfinished ones, then from new ones."""
        batch, unfinished[:] = unfinished[: self.settings.n_jobs], unfinished[self.settings.n_jobs :]
        while len(batch) < self.settings.n_jobs and len(self.study.trials) < self.settings.n_trials:
            batch.append(self.study.ask())
            self.propose(batch[-1])
        return batch

    def propose(self, trial: Trial | FrozenTrial) -> list[str]:
        """The overrides of a trial: drawn the first time, then the same."""
        self.study.sampler = make_sampler(self.settings, trial.number)
        return [propose(trial, override) for override in self.space]

    def run_to_rung(self, batch: Sequence[Trial], step: int, rung: duration.Duration) -> list[Trial]:
        """Run trials up to a rung and return those that continue."""
        known = {trial.number: self.study.trials[trial.number].intermediate_values for trial in batch}
        new = [trial for trial in batch if step not in known[trial.number]]
        failed = set()
        for trial, value in zip(new, self.launch(new, f"stop_at={rung}"), strict=True):
            if value is None:
                failed.add(trial.number)
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                trial.report(value, step)
        continuing = []
        for trial in batch:
            if trial.number in failed:
                continue
            if trial.should_prune():
                self.study.tell(trial, state=TrialState.PRUNED)
                write_line(f"pruned at {rung}: {' '.join(self.propose(trial))}")
            else:
                continuing.append(trial)
        return continuing

    def launch(self, trials: Sequence[Trial], stop: str) -> list[float | None]:
        """The objective of each trial, None if it failed.  Trials with the same overrides share a job."""
        jobs = {tuple(self.propose(trial)): trial.number for trial in trials}
        values = dict(zip(jobs, self.launch_all(list(jobs), stop, min(jobs.values(), default=0)), strict=True))
        return [values[tuple(self.propose(trial))] for trial in trials]

    def launch_all(self, jobs: Sequence[tuple[str, ...]], stop: str, number: int) -> list[float | None]:
        """The objectives of jobs; if a process is killed, each job is run alone."""
        if not jobs:
            return []
        overrides = [[*self.fixed, *job, *filter(None, [stop])] for job in jobs]
        try:
            values = [job.return_value for job in self.launcher.launch(overrides, initial_job_idx=number)]
        except BrokenExecutor:
            if len(jobs) > 1:
                return [value for job in jobs for value in self.launch_all([job], stop, number)]
            self.errors.append(f"{self.directory_of(jobs[0]).name}: its process was killed, probably out of memory")
            return [None]
        return [self.check_objective(job, value) for job, value in zip(jobs, values, strict=True)]

    def check_objective(self, job: Sequence[str], value: float | None) -> float | None:
        """Return the objective if it is finite; else record an error, unless the job has reported one."""
        if value is not None and math.isfinite(value):
            return value
        if value is not None or read_summary(self.directory_of(job)).get("state") != "failed":
            self.errors.append(f"{self.directory_of(job).name}: the run has no finite objective={self.objective}")
        return None

    def directory_of(self, job: Sequence[str]) -> Path:
        """The directory of a job."""
        return self.directory / run_directory([*self.fixed, *job], self.name, self.keys).name

    def report(self) -> None:
        """Log the results and the next commands."""
        ended = Counter(trial.state for trial in self.study.trials)
        labels = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        counts = ", ".join(f"{ended[state]} {name}" for state, name in labels.items() if ended[state])
        write_line(f"trials    {len(self.study.trials)}: {counts}")
        if ended[TrialState.COMPLETE]:
            best = self.study.best_trial
            config = self.directory_of(self.propose(best)) / "config.yaml"
            write_line(f"best      {self.objective} {best.value:.4g}: {shlex.join(self.propose(best))}")
            write_line(f"repeat    python -m clipx.train {shlex.quote(f'config={config}')} name=best")
        write_line(f"compare   python -m clipx.compare {shlex.quote(str(self.directory))}")
