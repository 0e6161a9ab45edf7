"""Configuration enters once, through ``command``, and becomes plain typed values in ``resolve``."""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipx.config import arguments
from clipx.config.console import console, lasting, other_rank, printable
from clipx.config.explain import explain, own_hydra, with_list
from clipx.config.help import help_page
from clipx.config.hydra_settings import look_ahead
from clipx.config.meaning import CONF, completed
from clipx.config.mistyped import check_typed
from clipx.config.sweep import Failures, JobEnd, is_sweep, obeyed, settings, varied
from clipx.config.validate import ConfigError
from clipx.errors import Interrupted, UserError
from clipx.training.lock import remove_created_on_error

OF_A_RUN = ("train", "check", "bench")      # commands whose config is that of a training run


@lasting()
def command(name: str, job: Callable[[DictConfig, Path], float | None], trains: bool = False) -> None:
    """The door of every Hydra command: conf/NAME.yaml, or the file in ``config=FILE``, and the words of the process.

    A mistake of the user's ends in one line and exit code 1.  In a sweep a failed job does not end the others, and
    the failures are told once more at the end.

    Args:
        name: of the command and of its primary config.
        job: gets the composed config and the run's directory; its result is what a sweep optimises.
        trains: whether it is a training run; in a sweep each is told in a line.
    """
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        return print(help_page(name, given))
    if {"-sc", "--shell-completion"} & set(given):
        os.environ["COMP_LINE"] = arguments.completion_line(os.environ.get("COMP_LINE", ""))
    failures = Failures(arguments.OUTPUTS / ".sweep" / f"failed-{os.getpid()}")
    told: list[str] = []
    try:
        carry_out(name, given, job, failures, trains)
        told = failures.told()
    except UserError as error:
        told = [*failures.told(), with_list(str(error), given)]
    except (Interrupted, KeyboardInterrupt) as ended:
        if isinstance(ended, KeyboardInterrupt) and not is_sweep(given):
            raise                                           # at the second Ctrl-C; in a sweep joblib may run the jobs
        if not other_rank():
            again = f"goes on with  python -m clipx.{name} {shlex.join(given)}"
            print(*failures.told(), again, sep="\n", file=sys.stderr)
        sys.exit(ended.code if isinstance(ended, Interrupted) else 128 + signal.SIGINT)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        told = [*failures.told(), with_list(explain(error, name, given), given)]
    except BrokenExecutor:
        told = [*failures.told(), "a job's process was killed, as for want of memory, which ended the others; the same "
                "words go on; hydra.launcher.n_jobs=1 runs one at a time"]
    if told:
        sys.exit(printable("\n".join(told)))


def call(name: str, job: Callable[[DictConfig, Path], float | None], given: Sequence[str]) -> Path:
    """A command in a program or a notebook: one run, by the words of a command line.

    Returns:
        The run's directory; the run has ended, or a signal such as Ctrl-C has stopped it after a save.

    Raises:
        UserError: what a command would say in its last line.
    """
    options, _ = arguments.parted(given)
    if options or is_sweep(given):
        raise ConfigError(f"{' '.join(options) or 'a sweep'} is for the command line; one call is one run")
    places: list[Path] = []

    def noted(composed: DictConfig, directory: Path) -> float | None:
        places.append(directory)
        return job(composed, directory)

    try:
        carry_out(name, given, noted, Failures(arguments.OUTPUTS / ".sweep" / f"failed-{os.getpid()}"), True)
    except UserError as error:
        raise UserError(with_list(str(error), given)) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(with_list(explain(error, name, given), given)) from error
    except Interrupted:
        pass                        # it is saved
    return places[0]


def carry_out(
    name: str, given: Sequence[str], job: Callable[[DictConfig, Path], float | None], failures: Failures, trains: bool
) -> None:
    """Do what the words of a command ask for.

    Raises:
        UserError: a word is wrong, or a run alone or a search has failed; nothing is left of what was refused.
        HydraException, OmegaConfBaseException: they do not compose.
    """
    saved, rest = take_saved(name, given)
    check_typed(rest)
    options, overrides = arguments.parted(arguments.escape_arguments(rest, is_sweep(rest)))
    run = Job(job, saved, overrides, failures, trains)
    ours = [f"hydra.searchpath=[pkg://{CONF}]"] if saved else []        # for hydra/sweeper=optuna
    argv = [f"clipx-{name}", *options, *arguments.HYDRA, *ours, *overrides]
    with primary(name, saved) as place, own_hydra():
        made = look_ahead(name, place, options, overrides)
        GlobalHydra.instance().clear()
        if is_sweep(rest):
            made = arguments.OUTPUTS / ".sweep"
        with hydra_reads(argv), remove_created_on_error(made, "multirun.yaml"):
            hydra.main(version_base="1.3", config_path=place, config_name=name)(run)()
            if run.mistake:
                raise UserError(run.mistake)


@dataclass
class Job:
    """What Hydra calls: one run, alone or of a sweep."""

    job: Callable[[DictConfig, Path], float | None]
    saved: Path | None
    overrides: list[str]        # of the command
    failures: Failures
    trains: bool
    mistake: str = ""

    def __call__(self, composed: DictConfig) -> float | None:
        ran = HydraConfig.get()
        sweep = ran.mode == RunMode.MULTIRUN
        own = OmegaConf.to_container(ran.overrides.task, resolve=False)
        keys = varied(self.overrides, list(ran.sweeper.get("params") or {}) if sweep else [], sweep)
        chosen = {group: ran.runtime.choices[group] for group in arguments.GROUPS if group in ran.runtime.choices}
        if chosen and self.saved is None:
            OmegaConf.update(composed, "choices", chosen, force_add=True)
            OmegaConf.update(composed, "varied", keys, force_add=True)
        name = None if composed.get("name") is None else str(composed.name)         # 5 is a name, too
        directory = obeyed(ran, arguments.run_directory(own, name, keys if sweep else None, self.saved), sweep)
        end = nullcontext()
        if sweep:
            end = JobEnd(ran.job.num, settings(own, keys), directory, self.failures, self.trains)
        try:
            with console(sweep and self.trains), end:
                return self.job(composed, directory)
        except UserError as error:
            self.mistake = str(error)       # of a run alone; told by command, in one line
        return None


@contextmanager
def hydra_reads(argv: list[str]) -> Iterator[None]:
    """Let Hydra find these words in the process, and raise its errors instead of printing them."""
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]


@contextmanager
def primary(name: str, saved: Path | None) -> Iterator[str]:
    """Where Hydra finds a command's primary config, NAME.yaml: ours, or a run's own with our defaults for the rest."""
    if saved is None:
        yield f"pkg://{CONF}"
        return
    with TemporaryDirectory(prefix="clipx-") as place:
        whole = completed(yaml.safe_load(saved.read_text(encoding="utf-8")) or {}, name)
        Path(place, f"{name}.yaml").write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))
        yield place


def take_saved(name: str, given: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file of ``config=FILE``, and the other words.

    Raises:
        ConfigError: the command takes none, there is no such file, or another word chooses a group, which the file has
            settled.
    """
    files = [word.partition("=")[2] for word in given if word.startswith("config=")]
    rest = [word for word in given if not word.startswith("config=")]
    if not files:
        return None, rest
    path = Path(files[-1])
    if name not in OF_A_RUN:
        raise ConfigError(f"config={path}: clipx.{name} takes no config of a run; {', '.join(OF_A_RUN)} do")
    if not path.is_file():
        raise ConfigError(f"config={path}: there is no such file; a run keeps its own as outputs/NAME/config.yaml")
    odd = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).keys() & {"hydra", "defaults"}
    if odd:
        raise ConfigError(f"config={path}: {min(odd)} has no place in a run's config; it can call anything; delete it")
    for word in rest:
        key = word.partition("=")[0]
        if key in arguments.GROUPS:
            raise ConfigError(
                f"{word}: config={path} is a whole config, its groups are settled; change single keys "
                f"({key}.KEY=VALUE), or leave config= out and give all words"
            )
    return path, rest


