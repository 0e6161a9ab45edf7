"""Configuration enters once, through ``command``, and becomes plain typed values in ``resolve``."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, TypeVar

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from clipx import duration, words
from clipx.console import console, lasting, other_rank, printable
from clipx.errors import Interrupted, UserError
from clipx.help import CONF, page
from clipx.lock import left_as_found
from clipx.meaning import completed, flat
from clipx.mistyped import check_typed
from clipx.schema import ConfigError, check_call, check_node, suggest
from clipx.settings import look_ahead
from clipx.sweep import Failures, JobEnd, is_sweep, obeyed, settings, varied

Duration = Annotated[duration.Duration, AfterValidator(duration.checked)]
Schema = TypeVar("Schema")

OF_A_RUN = ("train", "check", "bench")      # commands whose config is that of a training run


@dataclass(frozen=True)
class Composed:
    """What the door adds to a config, for the record."""

    choices: dict[str, Any] = field(default_factory=dict, kw_only=True)     # the options of the groups
    varied: list[str] = field(default_factory=list, kw_only=True)           # keys of the sweep, else of the words


@dataclass(frozen=True)
class Train(Composed):
    """The schema of a training run.  conf/train.yaml says what each key means and holds the defaults."""

    model: dict[str, Any]
    data: dict[str, Any]
    optim: dict[str, Any]
    sched: dict[str, Any]
    loss: dict[str, Any]
    evals: dict[str, dict[str, Any]]
    name: str | None
    init_from: str | None
    freeze: list[Literal["image", "text"]]
    epochs: PositiveFloat
    max_steps: PositiveInt | None
    stop_at: Duration | None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    clip_norm: PositiveFloat | None
    amp: Literal["none", "bf16", "fp16"]
    grad_checkpoint: bool | Literal["image", "text"]
    compile: bool
    device: str
    workers: Literal["auto"] | NonNegativeInt
    seed: NonNegativeInt
    log_every: Duration
    eval_every: Duration | None
    save_every: Duration | None
    keep_every: Duration | None
    resume: str | None
    resume_allow: list[str]
    max_bad_steps: NonNegativeInt
    max_rollbacks: NonNegativeInt
    signal_exit_code: Annotated[int, Field(ge=0, le=255)]
    best: str | None
    objective: str | None
    mode: Literal["max", "min"] | None
    trust: list[str]
    labelled: dict[str, dict[str, str]] | None = None


@dataclass(frozen=True)
class Evaluate(Composed):
    """The schema of an evaluation.  conf/evaluate.yaml says what each key means and holds the defaults."""

    run: str | list[str]
    evals: dict[str, dict[str, Any]]
    split: Literal["val", "train"]
    labelled: dict[str, dict[str, str]] | None
    bootstrap: PositiveInt | None
    per_class: bool
    cache: str | None
    amp: Literal["none", "bf16", "fp16"]
    device: str
    workers: Literal["auto"] | NonNegativeInt
    act: Literal["quick_gelu", "gelu"] | None
    trust: list[str]
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Prepare(Composed):
    """The schema of making shards.  conf/prepare.yaml says what each key means and holds the defaults."""

    source: dict[str, Any]
    src: str
    out: str | None
    samples_per_shard: PositiveInt
    shuffle: bool
    seed: NonNegativeInt
    resize: PositiveInt | None
    encode: Literal["jpg", "webp", "png"] | None
    quality: Annotated[int, Field(ge=1, le=100)]
    min_size: NonNegativeInt
    drop_duplicates: bool
    max_empty: Annotated[float, Field(ge=0, le=1)]
    verify: bool
    workers: Literal["auto"] | NonNegativeInt


@dataclass(frozen=True)
class Export(Composed):
    """The schema of an export.  conf/export.yaml says what each key means and holds the defaults."""

    run: str
    to: Literal["open_clip", "hf"]
    out: str
    act: Literal["quick_gelu", "gelu"] | None
    trust: list[str]


def resolve(composed: DictConfig, schema: type[Schema] = Train) -> Schema:
    """Plain typed values; every node is held against the signature that it calls, and nothing is built.

    Args:
        composed: the config, as Hydra composes it.
        schema: of the command, a dataclass; those of its fields that are groups hold nodes.

    Raises:
        ConfigError: a key, a type or a value is wrong.
    """
    values = typed(composed, schema)
    trust = values.get("trust", [])
    groups = values.keys() & set(words.GROUPS) - {"evals"}
    for key in sorted(groups, key=lambda key: key not in ("data", "source", "sched")):     # whose code needs no torch
        values[key] = check_node(values[key], key, trust)
    if "evals" in values:
        values["evals"] = {key: check_node(node, f"evals.{key}", trust) for key, node in values["evals"].items()}
    return schema(**values)


def typed(composed: DictConfig, schema: type = Train) -> dict[str, Any]:
    """Plain values in the types of a schema, nodes as they are written: what can be known without importing torch.

    Raises:
        ConfigError: a key, a type or a value is wrong.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; add {error.full_key}={options(error.full_key)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    return check_call(schema, plain)


def options(key: str) -> str:
    """What a group can be; "..." for any other key."""
    if key not in words.GROUPS:
        return "..."
    return "|".join(sorted(path.name[:-5] for path in files(CONF).joinpath(key).iterdir() if path.name[-5:] == ".yaml"))


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
        return print(page(name, given))
    if {"-sc", "--shell-completion"} & set(given):
        os.environ["COMP_LINE"] = words.completable(os.environ.get("COMP_LINE", ""))
    failures = Failures(words.OUTPUTS / ".sweep" / f"failed-{os.getpid()}")
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
    options, _ = words.parted(given)
    if options or is_sweep(given):
        raise ConfigError(f"{' '.join(options) or 'a sweep'} is for the command line; one call is one run")
    places: list[Path] = []

    def noted(composed: DictConfig, directory: Path) -> float | None:
        places.append(directory)
        return job(composed, directory)

    try:
        carry_out(name, given, noted, Failures(words.OUTPUTS / ".sweep" / f"failed-{os.getpid()}"), True)
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
    options, overrides = words.parted(words.legal(rest, is_sweep(rest)))
    run = Job(job, saved, overrides, failures, trains)
    ours = [f"hydra.searchpath=[pkg://{CONF}]"] if saved else []        # for hydra/sweeper=optuna
    argv = [f"clipx-{name}", *options, *words.HYDRA, *ours, *overrides]
    with primary(name, saved) as place, own_hydra():
        made = look_ahead(name, place, options, overrides)
        GlobalHydra.instance().clear()
        if is_sweep(rest):
            made = words.OUTPUTS / ".sweep"
        with hydra_reads(argv), left_as_found(made, "multirun.yaml"):
            hydra.main(version_base="1.3", config_path=place, config_name=name)(run)()
            if run.mistake:
                raise UserError(run.mistake)


def with_list(mistake: str, given: Sequence[str]) -> str:
    """A mistake, and how several values are given, where it is about values with commas between them."""
    for word in given:
        key, _, value = word.partition("=")
        parts = [] if value.startswith(("'", '"')) else words.parts_of(value)
        if len(parts) > 1 and all(parts) and mistake.startswith((f"{key}=", f"{key}:")) and not is_sweep(given):
            return f"{mistake}; -m runs once for each value ({key}={value}), and {key}=[{value}] is one list"
    return mistake


@contextmanager
def own_hydra() -> Iterator[None]:
    """Hydra as it is at the start of a process: a notebook may have initialised it for itself."""
    theirs = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = theirs


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
        chosen = {group: ran.runtime.choices[group] for group in words.GROUPS if group in ran.runtime.choices}
        if chosen and self.saved is None:
            OmegaConf.update(composed, "choices", chosen, force_add=True)
            OmegaConf.update(composed, "varied", keys, force_add=True)
        name = None if composed.get("name") is None else str(composed.name)         # 5 is a name, too
        directory = obeyed(ran, words.run_directory(own, name, keys if sweep else None, self.saved), sweep)
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
        if key in words.GROUPS:
            raise ConfigError(
                f"{word}: config={path} is a whole config, its groups are settled; change single keys "
                f"({key}.KEY=VALUE), or leave config= out and give all words"
            )
    return path, rest


def explain(error: Exception, name: str, given: Sequence[str]) -> str:
    """What Hydra or OmegaConf says, in one line with a near match."""
    text = first_line(error)
    key = re.search(r"Could not override '([^']+)'", text)
    option = re.search(r"Could not (?:find|load) '([^']+)/([^']+)'", text)
    if "validated against ConfigStore schema" in text:
        return "hydra-optuna-sweeper has a hydra/sweeper=optuna of its own; pip uninstall hydra-optuna-sweeper"
    if "does not support sweep type" in text:
        return "an interval has no list of values to go through; add hydra/sweeper=optuna, which searches it"
    with own_hydra(), hydra.initialize_config_module(CONF, version_base="1.3"):
        if option:
            options = GlobalHydra.instance().config_loader().get_group_options(option[1])
            return f"{option[1]}={option[2]}: there is no such option{suggest(option[2], options)}"
        if key:
            known = hydra_keys(name, given, key[1]) if key[1].startswith("hydra.") else known_keys(name, given)
            return f"{key[1]}: there is no such key{suggest(key[1], known)}"
    return text


def known_keys(name: str, given: Sequence[str]) -> list[str]:
    """All keys that the chosen groups have."""
    try:
        composed = hydra.compose(name, [word for word in given if re.fullmatch(r"[a-z]+=[\w\[\],]+", word)])
    except HydraException:
        composed = hydra.compose(name)
    plain = OmegaConf.to_container(composed)
    return [*flat(plain), *(key for key, value in plain.items() if isinstance(value, dict))]


def hydra_keys(name: str, given: Sequence[str], key: str) -> list[str]:
    """The settings of Hydra's that stand beside a key."""
    groups = [word for word in given if re.fullmatch(r"hydra/\w+=\w+", word)]
    composed = hydra.compose(name, groups, return_hydra_config=True)
    parent = key.rpartition(".")[0]
    beside = OmegaConf.select(composed, parent)
    return [f"{parent}.{own}" for own in beside] if isinstance(beside, DictConfig) else []


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
