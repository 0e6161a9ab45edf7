"""The entrance of every Hydra command: arguments -> composed config and the run's directory."""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipx.config.arguments import (
    GROUPS,
    HYDRA_OVERRIDES,
    OUTPUTS,
    completion_line,
    escape_override,
    run_directory,
    split_options,
)
from clipx.config.console import log_to_console, nonzero_rank, printable, survive_closed_output
from clipx.config.explain import add_list_hint, explain, isolated_hydra
from clipx.config.help import help_page
from clipx.config.hydra_settings import find_run_dir
from clipx.config.meaning import CONF, with_defaults
from clipx.config.mistyped import check_arguments
from clipx.config.sweep import FailureLog, JobReport, apply_hydra_dirs, is_sweep, swept_values, varied_keys
from clipx.config.validate import ConfigError
from clipx.errors import Interrupted, UserError
from clipx.training.lock import remove_created_on_error

ALLOC_CONF = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # names of torch's variable: today's, and before 2.9
TRAIN_COMMANDS = ("train", "check", "bench")  # their config is that of a training run

JobFunction = Callable[[DictConfig, Path], float | None]  # of the composed config and the run's directory


@survive_closed_output()
def command(name: str, job: JobFunction, trains: bool = False) -> None:
    """Run a Hydra command with the arguments of this process.

    A mistake of the user ends in one line and exit code 1.  In a sweep a failed job does not end the others, and the
    failures are listed at the end.

    Args:
        name: of the command and of its primary config, conf/NAME.yaml.
        job: its result is what a sweep optimises.
        trains: whether jobs are training runs, each reported in a line of a sweep.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        return print(help_page(name, arguments))
    if {"-sc", "--shell-completion"} & set(arguments):
        os.environ["COMP_LINE"] = completion_line(os.environ.get("COMP_LINE", ""))
    expand_segments()
    failures = FailureLog.of_this_process()
    errors: list[str] = []
    try:
        run_explained(name, arguments, job, failures, trains)
    except UserError as error:
        errors = [str(error)]
    except (Interrupted, KeyboardInterrupt) as interrupt:
        if isinstance(interrupt, KeyboardInterrupt) and not is_sweep(arguments):
            raise  # the second Ctrl-C; in a sweep joblib may run the jobs
        if not nonzero_rank():
            resume = f"resume with  python -m clipx.{name} {shlex.join(arguments)}"
            print(*failures.pop_all(), resume, sep="\n", file=sys.stderr)
        sys.exit(interrupt.code if isinstance(interrupt, Interrupted) else 128 + signal.SIGINT)
    except BrokenExecutor:
        errors = [
            "a job's process was killed, probably out of memory, which ended the other jobs; rerun the same "
            "command to resume; hydra.launcher.n_jobs=1 runs one job at a time"
        ]
    if errors := [*failures.pop_all(), *errors]:
        sys.exit(printable("\n".join(errors)))


def call(name: str, job: JobFunction, arguments: Sequence[str]) -> Path:
    """Run a command once from Python.

    Returns:
        The run's directory.  The run has ended, or a signal such as Ctrl-C has stopped it after a save.

    Raises:
        UserError: with the message that the command would end with.
    """
    options, _ = split_options(arguments)
    if options or is_sweep(arguments):
        raise ConfigError(f"{' '.join(options) or 'a sweep'} works only on the command line; one call is one run")
    directories: list[Path] = []

    def recorded(composed: DictConfig, directory: Path) -> float | None:
        directories.append(directory)
        return job(composed, directory)

    with suppress(Interrupted):  # after a save
        run_explained(name, arguments, recorded, FailureLog.of_this_process(), True)
    return directories[0]


def expand_segments() -> None:
    """Let torch grow its segments of a GPU's memory, unless the user says how; read when torch is imported.

    Captions make each batch another size, which leaves gaps between segments of fixed size.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOC_CONF):
        os.environ[ALLOC_CONF[0]] = "expandable_segments:True"


def run_explained(name: str, arguments: Sequence[str], job: JobFunction, failures: FailureLog, trains: bool) -> None:
    """Like ``compose_and_run``, with Hydra's errors explained in one line."""
    try:
        compose_and_run(name, arguments, job, failures, trains)
    except UserError as error:
        raise UserError(add_list_hint(str(error), arguments)) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(add_list_hint(explain(error, name, arguments), arguments)) from error


def compose_and_run(name: str, arguments: Sequence[str], job: JobFunction, failures: FailureLog, trains: bool) -> None:
    """Compose the config and run the job, once or as a sweep.

    Raises:
        UserError: an argument is wrong, or a single run or a search failed; refused arguments leave no files.
        HydraException, OmegaConfBaseException: the config does not compose.
    """
    saved, rest = pop_saved_config(name, arguments)
    options, overrides = check_arguments(rest)
    sweep = is_sweep(rest)
    overrides = [escape_override(override, sweep) for override in overrides]
    hydra_job = HydraJob(job, saved, overrides, failures, trains)
    searchpath = [f"hydra.searchpath=[pkg://{CONF}]"] if saved else []  # for hydra/sweeper=optuna
    argv = [f"clipx-{name}", *options, *HYDRA_OVERRIDES, *searchpath, *overrides]
    with primary_config(name, saved) as location, isolated_hydra():
        run_dir = find_run_dir(name, location, options, overrides)
        GlobalHydra.instance().clear()
        created = OUTPUTS / ".sweep" if sweep else run_dir
        with hydra_argv(argv), remove_created_on_error(created, "multirun.yaml"):
            hydra.main(version_base="1.3", config_path=location, config_name=name)(hydra_job)()
            if hydra_job.error:
                raise UserError(hydra_job.error)


@dataclass
class HydraJob:
    """The function that Hydra calls for a single run, or for each job of a sweep."""

    job: JobFunction
    saved: Path | None
    overrides: list[str]  # of the command
    failures: FailureLog
    trains: bool
    error: str = ""  # of a single run

    def __call__(self, composed: DictConfig) -> float | None:
        settings = HydraConfig.get()
        sweep = settings.mode == RunMode.MULTIRUN
        own = cast(list[str], OmegaConf.to_container(settings.overrides.task, resolve=False))
        keys = varied_keys(self.overrides, list(settings.sweeper.get("params") or {}) if sweep else [], sweep)
        choices = {group: settings.runtime.choices[group] for group in GROUPS if group in settings.runtime.choices}
        if choices and self.saved is None:
            OmegaConf.update(composed, "choices", choices, force_add=True)
            OmegaConf.update(composed, "varied", keys, force_add=True)
        name = None if composed.get("name") is None else str(composed.name)  # name=5 is text
        directory = run_directory(own, name, keys if sweep else None, self.saved)
        directory = apply_hydra_dirs(settings, directory, sweep)
        report: AbstractContextManager[Any] = nullcontext()
        if sweep:
            report = JobReport(settings.job.num, swept_values(own, keys), directory, self.failures, self.trains)
        try:
            with log_to_console(sweep and self.trains), report:
                return self.job(composed, directory)
        except UserError as error:
            self.error = str(error)
        return None


@contextmanager
def hydra_argv(argv: list[str]) -> Iterator[None]:
    """Let Hydra read these arguments, and raise its errors instead of printing them."""
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]


@contextmanager
def primary_config(name: str, saved: Path | None) -> Iterator[str]:
    """Where Hydra finds NAME.yaml: clipx's package, or a directory with a run's config completed by our defaults.

    Raises:
        ConfigError: the run's config contains a key that Hydra would act on.
    """
    if saved is None:
        yield f"pkg://{CONF}"
        return
    config = yaml.safe_load(saved.read_text(encoding="utf-8")) or {}
    if unsafe := config.keys() & {"hydra", "defaults"}:
        raise ConfigError(
            f"config={saved}: {min(unsafe)} does not belong in a run's config, as it can call any code; delete it"
        )
    config = with_defaults(config, name)
    with TemporaryDirectory(prefix="clipx-") as folder:
        Path(folder, f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        yield folder


def pop_saved_config(name: str, arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Separate the file of ``config=FILE`` from the other arguments.

    Raises:
        ConfigError: the command does not read one, the file does not exist, or another argument chooses a group.
    """
    files = [argument.partition("=")[2] for argument in arguments if argument.startswith("config=")]
    rest = [argument for argument in arguments if not argument.startswith("config=")]
    if not files:
        return None, rest
    path = Path(files[-1])
    if name not in TRAIN_COMMANDS:
        raise ConfigError(f"config={path}: clipx.{name} does not read a run's config; {', '.join(TRAIN_COMMANDS)} do")
    if not path.is_file():
        raise ConfigError(f"config={path}: there is no such file; a run keeps its own as outputs/NAME/config.yaml")
    for argument in rest:
        key = argument.partition("=")[0]
        if key in GROUPS:
            raise ConfigError(
                f"{argument}: config={path} already fixes every group; change single keys "
                f"({key}.KEY=VALUE), or leave config= out and give all arguments"
            )
    return path, rest
