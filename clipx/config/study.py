"""The Optuna study of a search: its settings, its journal on disk, and the overrides that it proposes."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.pruners import MedianPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import NonNegativeInt, PositiveInt

from clipx.config.meaning import differences
from clipx.config.schema import Duration
from clipx.config.validate import ConfigError
from clipx.errors import UserError

JOURNAL = "optuna.journal"

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class SearchSettings:
    """Keys of hydra.sweeper, which conf/hydra/sweeper/optuna.yaml explains."""

    params: dict[str, Any]
    direction: Direction | None
    n_trials: PositiveInt
    n_jobs: PositiveInt
    seed: NonNegativeInt
    sampler: Literal["tpe", "random"]
    startup: NonNegativeInt
    rungs: list[Duration]
    pruner: Literal["median", "halving"]


@contextmanager
def lock_search(directory: Path) -> Iterator[None]:
    """Let one process search in a directory.  Running trials in its journal are then left from an earlier process.

    Raises:
        UserError: another process searches there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / JOURNAL).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process searches in {directory}; name=... starts a new search, "
                "and hydra.sweeper.n_jobs=... runs several trials at once"
            ) from error
        yield


def open_study(directory: Path, settings: SearchSettings, meaning: dict[str, Any]) -> Study:
    """Open the study in a sweep's directory, or create one if there is none with a result.

    Raises:
        UserError: the existing study searches something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # each job already has a line
    journal = JournalStorage(JournalFileBackend(str(directory / JOURNAL)))
    pruner = (
        SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        if settings.pruner == "halving"
        else MedianPruner(settings.startup)
    )
    create = partial(
        optuna.create_study,
        storage=journal,
        study_name="clipx",
        direction=settings.direction,
        pruner=pruner,
        load_if_exists=True,
    )
    study = create()
    changes = differences(study.user_attrs.get("meaning", meaning), meaning)
    states = {trial.state for trial in study.trials}
    if not states & {TrialState.COMPLETE, TrialState.PRUNED} and (changes or TrialState.FAIL in states):
        optuna.delete_study(study_name="clipx", storage=journal)
        study, changes = create(), {}
    if changes:
        raise UserError(f"{directory} holds another search ({'; '.join(changes.values())}); name=... starts a new one")
    study.set_user_attr("meaning", meaning)
    return study


def make_sampler(settings: SearchSettings, number: int) -> BaseSampler:
    """The sampler of a trial.  It is seeded per trial, so a resumed search proposes what an unbroken one would."""
    seed = int(np.random.SeedSequence((settings.seed, number)).generate_state(1)[0])
    return (
        RandomSampler(seed)
        if settings.sampler == "random"
        else TPESampler(n_startup_trials=settings.startup, seed=seed)
    )


def propose(trial: Trial | FrozenTrial, override: Override) -> str:
    """Draw one override of a trial, or return the one drawn before.

    Raises:
        ConfigError: the distribution is invalid.
    """
    key, sweep = override.get_key_element(), override.value()
    log = "log" in getattr(sweep, "tags", ())
    try:
        if isinstance(sweep, IntervalSweep):
            low, high, step = sweep.start, sweep.end, None
        elif isinstance(sweep, RangeSweep):
            numbers = sorted(sweep.range())
            low, high, step = numbers[0], numbers[-1], abs(sweep.step)
        else:
            return f"{key}={trial.suggest_categorical(key, list(override.sweep_string_iterator()))}"
        assert low is not None and high is not None
        if isinstance(low, int) and isinstance(high, int):
            return f"{key}={trial.suggest_int(key, low, high, step=int(step or 1), log=log)}"
        return f"{key}={trial.suggest_float(key, low, high, step=step, log=log)}"
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: {str(error).splitlines()[0]}") from error
