"""Command-line arguments: escaped for Hydra's grammar, and turned into the name of a run's directory."""

import os
import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from clipx.config.meaning import LABELLED_PATHS, is_neutral
from clipx.config.runs import OUTPUTS

GROUPS = ("model", "data", "augment", "optim", "sched", "loss", "evals", "track", "experiment", "source")
MAX_NAME_LENGTH = 120  # characters of a directory's name

# names and paths: their values stay text even if they look like numbers
TEXT_KEYS = {
    "name", "init_from", "resume", "feature_cache", "teacher",
    "run", "mix", "sets", "sets_cache", "src", "out", "cache", "images", "index", "texts", "search", "json",
}  # fmt: skip
TEXT_NESTED_KEYS = r"init_from\.(image|text)|data\.(sources\.[^.]+\.)?(root|shards|val_shards|index_dir|cache)"

# clipx does not use Hydra's log files; conf/hydra/output/clipx.yaml sets its directories
HYDRA_OVERRIDES = [
    "hydra/output=clipx", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none",
]  # fmt: skip
OPTIONS_WITH_VALUE = {
    "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c",
}  # fmt: skip


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate Hydra's options and their values from the overrides."""
    options: list[str] = []
    overrides: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        is_option = argument.startswith("-") or previous in OPTIONS_WITH_VALUE
        (options if is_option else overrides).append(argument)
    return options, overrides


def option_values(arguments: Sequence[str], *names: str) -> list[str]:
    """The values of an option, given as ``--NAME VALUE`` or ``--NAME=VALUE``."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, _, value = argument.partition("=")
        if name in names and (value or following):
            found.append(value or following)
    return found


def escape_override(override: str, sweep: bool) -> str:
    """Quote the values that Hydra's grammar rejects, and commas outside a sweep."""
    key, equals, value = override.partition("=")
    if key in ("init_from.image", "init_from.text"):
        key = f"++{key}"  # init_from is null or a text by default
    if key in ("hydra.run.dir", "hydra.sweep.dir"):
        value = os.path.expanduser(value)  # Hydra creates these directories itself
    if not equals or is_valid(f"{key}={value}", sweep):
        return f"{key}{equals}{value}"
    return f"{key}=" + ",".join(escape_value(key, part, sweep) for part in (split_commas(value) if sweep else [value]))


def escape_value(key: str, value: str, sweep: bool) -> str:
    """Quote a value or, of a list or a mapping, only the items that Hydra's grammar rejects."""
    if is_valid(f"{key}={value}", sweep):
        return value
    if value.startswith("[") and value.endswith("]"):
        items = f"[{','.join(escape_value(key, part, sweep=False) for part in split_commas(value[1:-1]))}]"
        if is_valid(f"{key}={items}", sweep):
            return items
    if value.startswith("{") and value.endswith("}"):
        entries = [part.partition(":") for part in split_commas(value[1:-1])]
        inner = (f"{name}:{escape_value(key, part.strip(), sweep=False)}" for name, _, part in entries)
        items = f"{{{','.join(inner)}}}"
        if all(colon for _, colon, _ in entries) and is_valid(f"{key}={items}", sweep):
            return items
    return quote(value)


def split_commas(value: str) -> list[str]:
    """Split a value at the commas outside brackets and braces."""
    parts, depth = [""], 0
    for character in value:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts if depth == 0 else value.split(",")


def is_valid(text: str, sweep: bool) -> bool:
    """Whether Hydra reads an override as the user means it."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return False
    if override.is_sweep_override():
        return sweep
    if is_text(override.key_or_group):
        return not isinstance(override.value(), (int, float))
    is_option = override.key_or_group in GROUPS and text != "experiment=null"
    return not is_option or isinstance(override.value(), (str, list))  # model=5 names an option, too


def is_text(key: str) -> bool:
    """Whether the values of a key stay text: 007 and 1e3 can be names."""
    return key in TEXT_KEYS or re.fullmatch(f"{TEXT_NESTED_KEYS}|{LABELLED_PATHS}", key) is not None


def completion_line(line: str) -> str:
    """The line that the shell completes, without earlier arguments that Hydra's completion cannot parse."""
    arguments = [*line.split(), *([""] if line.endswith(" ") else [])]
    kept = [
        argument
        for previous, argument in zip(arguments, arguments[1:-1], strict=False)
        if previous in OPTIONS_WITH_VALUE
        or argument.startswith("-")
        or (is_valid(argument, sweep=True) and not argument.startswith("config="))
    ]
    return " ".join([*arguments[:1], *kept, *arguments[1:][-1:]])


def quote(value: str) -> str:
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes count only before a quote
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def directory_name(overrides: Sequence[str]) -> str:
    """Join overrides into a file name; a hash is added if characters are replaced or the name is cut."""
    by_key = {key_of(override): override.lstrip("+") for override in overrides}  # the last one of a key counts
    text = ",".join(sorted(override for key, override in by_key.items() if not is_neutral(key)))
    name = re.sub(r"[^\w.,=+~-]|^\.+$", "_", text)  # name=.. must not leave outputs/
    if name != text or len(name) > MAX_NAME_LENGTH:
        name = f"{name[:MAX_NAME_LENGTH]}-{blake2b(text.encode(), digest_size=4).hexdigest()}"
    return name


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def run_directory(
    overrides: Sequence[str], name: str | None, swept: Sequence[str] | None = None, saved: Path | None = None
) -> Path:
    """The directory of a run: the same arguments give the same directory.

    Args:
        overrides: of the run.
        name: the key ``name``.  In a sweep it names the sweep, and replaces the overrides that all jobs share.
        swept: the keys that the sweep varies; None for a single run.
        saved: the config file of the run that this one repeats.
    """
    if swept is not None:
        own = directory_name([override for override in overrides if not name or key_of(override) in swept])
        return OUTPUTS / "sweeps" / (directory_name([name]) if name else "sweep") / (own or "default")
    own = directory_name(overrides)
    if name:
        return OUTPUTS / directory_name([name])
    return OUTPUTS / (",".join(filter(None, [saved.parent.name if saved else "", own])) or "default")
