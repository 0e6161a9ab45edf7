"""A search: Optuna proposes the words of the jobs, poor ones end early, and the same words go on with it."""

import fcntl
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeInt, PositiveInt

from clipx import duration
from clipx.config.arguments import escape_arguments, run_directory
from clipx.config.console import tell
from clipx.config.meaning import differences
from clipx.config.schema import Duration
from clipx.config.sweep import UNSET, has_failed, obeyed, varied
from clipx.config.validate import ConfigError, check_call
from clipx.errors import UserError
from clipx.training.direction import Mode, mode_of

try:
    import optuna
    from optuna.samplers import BaseSampler, RandomSampler, TPESampler
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial, TrialState
except ModuleNotFoundError as error:
    raise UserError('hydra/sweeper=optuna searches with Optuna; pip install "clipx[optuna]"') from error

KEYS = "hydra.sweeper."
JOURNAL = "optuna.journal"


@dataclass(frozen=True)
class Settings:
    """The schema of hydra.sweeper.  conf/hydra/sweeper/optuna.yaml says what each key means and holds the defaults."""

    params: dict[str, Any]
    direction: Literal["maximize", "minimize"] | None
    n_trials: PositiveInt
    n_jobs: PositiveInt
    seed: NonNegativeInt
    sampler: Literal["tpe", "random"]
    startup: NonNegativeInt
    rungs: list[Duration]
    pruner: Literal["median", "halving"]


def tune(
    given: dict[str, Any], config: DictConfig, arguments: list[str], launcher: Launcher, loader: ConfigLoader
) -> None:
    """Search to the end, from where an earlier process has left it.

    Args:
        given: the sweeper's own config.
        config: of all jobs, and Hydra's.
        arguments: overrides, some of which vary.
        launcher: runs jobs.
        loader: knows the options of groups.

    Raises:
        UserError: a key is wrong, or jobs gave no number; that is told when the others are done.
    """
    settings = Settings(**check_call(Settings, given, KEYS))
    check_rungs(settings.rungs)
    own = escape_arguments([f"{key}={value}" for key, value in settings.params.items()], sweep=True)
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*own, *arguments])
    overrides = {override.get_key_element(): override for override in parsed}.values()
    space = [override for override in overrides if override.is_sweep_override()]
    if not space:
        raise ConfigError("there is nothing to search; give a key several values, such as "
                          "'optim.lr=tag(log,interval(1e-5,1e-2))'")
    jobs = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    plain = OmegaConf.to_container(jobs, resolve=True)
    if plain.get("objective") is None:
        raise ConfigError("objective=null: a search needs a number to go by, such as val/retrieval/mean_recall")
    settings = replace(settings, direction=direction_of(settings.direction, plain["objective"], plain.get("mode")))
    name = None if plain.get("name") is None else str(plain["name"])
    keys = varied(arguments, list(settings.params), sweep=True)
    if config.hydra.sweep.subdir != UNSET:
        raise ConfigError(f"hydra.sweep.subdir={config.hydra.sweep.subdir}: a search names its jobs' directories; "
                          "hydra.sweep.dir says where they are")
    directory = obeyed(config.hydra, run_directory([], name, keys), sweep=True).parent
    meaning = {**plain, "hydra": {"sweeper": {
        "params": {override.get_key_element(): override.get_value_string() for override in space},
        "direction": settings.direction, "rungs": settings.rungs,
    }}}  # fmt: skip
    fixed = [override.input_line for override in overrides if not override.is_sweep_override()]
    with alone(directory):
        study = open_study(directory, settings, meaning)
        Search(settings, study, launcher, space, fixed, keys, name, directory, plain["objective"]).run()


def direction_of(given: str | None, objective: str, mode: Mode | None) -> str:
    """Which way a search goes: the objective's.

    Raises:
        UserError: the sweeper is told otherwise.
    """
    direction = {"max": "maximize", "min": "minimize"}[mode_of(objective, mode)]
    if given not in (None, direction):
        raise ConfigError(f"hydra.sweeper.direction={given}: {objective} is taken as better when it is "
                          f"{'high' if direction == 'maximize' else 'low'}; leave direction out, and say "
                          f"mode={given[:3]} where that is wrong")
    return direction


def check_rungs(rungs: Sequence[duration.Duration]) -> None:
    """Each is later than the one before.

    Raises:
        ConfigError: one is not.
    """
    lengths = [duration.parse(rung) for rung in rungs]
    if len({unit for _, unit in lengths}) > 1 or sorted(set(lengths)) != lengths:
        raise ConfigError(f"{KEYS}rungs=[{','.join(map(str, rungs))}]: should be durations of one unit, each longer "
                          "than the one before")


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Be the one process that searches there: trials that run are this one's, or of one that is no more.

    Raises:
        UserError: another one does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / JOURNAL).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process searches in {directory}; name=... starts a search of its own, "
                            "hydra.sweeper.n_jobs=... runs several trials at once") from error
        yield


def open_study(directory: Path, settings: Settings, meaning: dict[str, Any]) -> Study:
    """The study in a sweep's directory; a new one where there is none, or none that knows of a number.

    Raises:
        UserError: the one there searches something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)        # jobs have a line each already
    journal = JournalStorage(JournalFileBackend(str(directory / JOURNAL)))
    pruner = optuna.pruners.MedianPruner(settings.startup)
    if settings.pruner == "halving":
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    opened = partial(optuna.create_study, storage=journal, study_name="clipx", direction=settings.direction,
                     pruner=pruner, load_if_exists=True)
    study = opened()
    changes = differences(study.user_attrs.get("meaning", meaning), meaning)
    states = {trial.state for trial in study.trials}
    if not states & {TrialState.COMPLETE, TrialState.PRUNED} and (changes or TrialState.FAIL in states):
        optuna.delete_study(study_name="clipx", storage=journal)
        study, changes = opened(), {}
    if changes:
        raise UserError(f"{directory} holds another search ({'; '.join(changes.values())}); name=... starts one of its "
                        "own")
    study.set_user_attr("meaning", meaning)
    return study


def sampler_of(settings: Settings, number: int) -> BaseSampler:
    """What proposes a trial; each has random numbers of its own, so that a search that goes on proposes what it would
    have proposed without a break."""
    seed = int(np.random.SeedSequence((settings.seed, number)).generate_state(1)[0])
    return RandomSampler(seed) if settings.sampler == "random" else TPESampler(
        n_startup_trials=settings.startup, seed=seed
    )


def propose(trial: Trial | FrozenTrial, override: Override) -> str:
    """A word of a trial: drawn, or as it has been drawn before.

    Raises:
        ConfigError: it cannot be drawn from.
    """
    key, sweep = override.get_key_element(), override.value()
    log = "log" in getattr(sweep, "tags", ())
    try:
        if override.is_interval_sweep():
            low, high, step = sweep.start, sweep.end, None
        elif override.is_range_sweep():
            numbers = sorted(override.sweep_iterator())
            low, high, step = numbers[0], numbers[-1], abs(sweep.step)
        else:
            return f"{key}={trial.suggest_categorical(key, list(override.sweep_string_iterator()))}"
        if isinstance(low, int) and isinstance(high, int):
            return f"{key}={trial.suggest_int(key, low, high, step=step or 1, log=log)}"
        return f"{key}={trial.suggest_float(key, low, high, step=step, log=log)}"
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Search:
    """A search that is under way."""

    settings: Settings
    study: Study
    launcher: Launcher
    space: list[Override]
    fixed: list[str]            # words of every job
    keys: list[str]             # that name its directory
    name: str | None
    directory: Path
    objective: str
    lost: list[str] = field(default_factory=list)       # jobs without a number, which no one else tells

    def run(self) -> None:
        """All trials, those first that an earlier process has begun."""
        begun = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        left = [Trial(self.study, trial._trial_id) for trial in begun]
        while batch := self.batch(left):
            for height, rung in enumerate(self.settings.rungs):
                batch = self.climb(batch, 2**height, rung)      # powers of two: where halving looks
            for trial, value in zip(batch, self.launch(batch, ""), strict=True):
                self.study.tell(trial, value, TrialState.FAIL if value is None else None)
        self.report()
        if self.lost:
            raise UserError("\n".join(dict.fromkeys(self.lost)))

    def batch(self, left: list[Trial]) -> list[Trial]:
        """The next trials; takes those that are left first."""
        batch, left[:] = left[: self.settings.n_jobs], left[self.settings.n_jobs :]
        while len(batch) < self.settings.n_jobs and len(self.study.trials) < self.settings.n_trials:
            batch.append(self.study.ask())
            self.drawn(batch[-1])
        return batch

    def drawn(self, trial: Trial | FrozenTrial) -> list[str]:
        """The words of a trial, which are drawn the first time."""
        self.study.sampler = sampler_of(self.settings, trial.number)
        return [propose(trial, override) for override in self.space]

    def climb(self, batch: Sequence[Trial], step: int, rung: duration.Duration) -> list[Trial]:
        """Run trials up to a rung; gives those that go on."""
        known = {trial.number: self.study.trials[trial.number].intermediate_values for trial in batch}
        new = [trial for trial in batch if step not in known[trial.number]]
        failed = set()
        for trial, value in zip(new, self.launch(new, f"stop_at={rung}"), strict=True):
            if value is None:
                failed.add(trial.number)
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                trial.report(value, step)
        going = []
        for trial in batch:
            if trial.number in failed:
                continue
            if trial.should_prune():
                self.study.tell(trial, state=TrialState.PRUNED)
                tell(f"pruned at {rung}: {' '.join(self.drawn(trial))}")
            else:
                going.append(trial)
        return going

    def launch(self, trials: Sequence[Trial], stop: str) -> list[float | None]:
        """What each is worth; None for one that has failed.  Trials of the same words are one job."""
        jobs = {tuple(self.drawn(trial)): trial.number for trial in trials}
        values = dict(zip(jobs, self.launch_all(list(jobs), stop, min(jobs.values(), default=0)), strict=True))
        return [values[tuple(self.drawn(trial))] for trial in trials]

    def launch_all(self, jobs: Sequence[tuple[str, ...]], stop: str, number: int) -> list[float | None]:
        """The numbers of jobs; where a process is killed, each is tried alone."""
        if not jobs:
            return []
        given = [[*self.fixed, *job, *filter(None, [stop])] for job in jobs]
        try:
            values = [job.return_value for job in self.launcher.launch(given, initial_job_idx=number)]
        except BrokenExecutor:
            if len(jobs) > 1:
                return [value for job in jobs for value in self.launch_all([job], stop, number)]
            self.lost.append(f"{self.place(jobs[0]).name}: its process was killed, as for want of memory")
            return [None]
        return [self.worth(job, value) for job, value in zip(jobs, values, strict=True)]

    def worth(self, job: Sequence[str], value: float | None) -> float | None:
        """The number of a job, where it is one; else the reason is told, unless the job has."""
        if value is not None and math.isfinite(value):
            return value
        if value is not None or not has_failed(self.place(job)):
            self.lost.append(f"{self.place(job).name}: the run gives no number to go by as objective={self.objective}")
        return None

    def place(self, job: Sequence[str]) -> Path:
        """The directory of a job's run."""
        return self.directory / run_directory([*self.fixed, *job], self.name, self.keys).name

    def report(self) -> None:
        """Tell what came out, and what to type next."""
        ended = Counter(trial.state for trial in self.study.trials)
        told = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        counts = ", ".join(f"{ended[state]} {name}" for state, name in told.items() if ended[state])
        tell(f"trials    {len(self.study.trials)}: {counts}")
        if ended[TrialState.COMPLETE]:
            best = self.study.best_trial
            config = self.place(self.drawn(best)) / "config.yaml"
            tell(f"best      {self.objective} {best.value:.4g}: {shlex.join(self.drawn(best))}")
            tell(f"repeat    python -m clipx.train {shlex.quote(f'config={config}')} name=best")
        tell(f"compare   python -m clipx.compare {shlex.quote(str(self.directory))}")
