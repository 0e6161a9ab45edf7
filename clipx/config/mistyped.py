"""Checks of the form of arguments, before any file is read."""

import re
from collections.abc import Sequence
from typing import NoReturn

from clipx.config.arguments import OPTIONS_WITH_VALUE, key_of, split_options
from clipx.errors import UserError

FLAGS = {
    "-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun", "-sc",
    "--shell-completion", "-i", "--info", "--experimental-rerun", *OPTIONS_WITH_VALUE,
}  # fmt: skip
MODES = {
    "-m": "-m",
    "--multirun": "-m",
    "--run": "--run",
    "-c": "--cfg",
    "--cfg": "--cfg",
    "-i": "--info",
    "--info": "--info",
}

# Hydra settings that have an effect
OBEYED = (
    "run.dir", "sweep.dir", "sweep.subdir", "sweeper", "launcher", "callbacks", "mode", "searchpath", "job.name",
    "job.env_set", "job.env_copy", "job.config",
)  # fmt: skip
OBEYED_GROUPS = ("sweeper", "launcher", "callbacks")


def check_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Refuse arguments that Hydra would ignore or explain badly.

    Args:
        arguments: of a command, without ``config=FILE``.

    Returns:
        Hydra's options with their values, and the overrides.

    Raises:
        UserError: one is mistyped; the message shows the right form.
    """
    options, overrides = split_options(arguments)
    for previous, option in zip(["", *options], options, strict=False):
        if previous not in OPTIONS_WITH_VALUE and option.partition("=")[0] not in FLAGS:
            raise_unknown_option(option, arguments)
    modes = dict.fromkeys(MODES[name] for option in options if (name := option.partition("=")[0]) in MODES)
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} exclude each other; leave out one of them")
    for previous, override in zip(["", *overrides], overrides, strict=False):
        check_form(override, previous)
        check_hydra_key(override)
    check_duplicates(overrides)
    return options, overrides


def raise_unknown_option(option: str, arguments: Sequence[str]) -> NoReturn:
    """Keys have no leading dashes, unlike argparse's."""
    name, _, value = option.lstrip("-").partition("=")
    following = arguments[arguments.index(option) + 1 :][:1]
    value = value or next((argument for argument in following if "=" not in argument), "...")
    raise UserError(f"{option}: there is no such switch; a key has no dashes: {name.replace('-', '_')}={value}")


def check_form(override: str, previous: str) -> None:
    """Check that an override is KEY=VALUE or ~KEY."""
    key, equals, value = override.partition("=")
    if not equals and not override.startswith("~"):
        right = re.sub(r"^(\w[\w.]*):\s*", r"\1=", override)
        raise UserError(
            f"{override!r} is not KEY=VALUE; "
            + (
                f"write {right}"
                if right != override
                else f"several values of {previous.partition('=')[0]} are one list: "
                f"{previous.partition('=')[0]}=[{previous.partition('=')[2]},{override}]"
                if previous
                else "--help lists the keys"
            )
        )
    if value.endswith(",") and len(value) > 1:
        raise UserError(
            f"{override} ends in a comma; write {override.rstrip(',')}, or quote a comma that belongs to "
            f"the value: \"{key}='{value}'\""
        )


def check_hydra_key(override: str, where: str = "") -> None:
    """Refuse a Hydra setting without effect; ``where`` names the file that sets it."""
    key = key_of(override).lstrip("~").partition("@")[0]
    group = key.removeprefix("hydra/")
    setting = key.removeprefix("hydra.")
    ignored = (
        group not in OBEYED_GROUPS
        if group != key
        else setting != key and not any(f"{setting}.".startswith(f"{known}.") for known in OBEYED)
    )
    if ignored:
        raise UserError(
            f"{key}{where} has no effect in clipx: a run keeps its own log and config in its directory, "
            "and paths are relative to the current directory; leave it out"
        )


def check_duplicates(overrides: Sequence[str]) -> None:
    """Refuse a repeated key: the shell expands a brace pattern to several arguments."""
    first: dict[str, str] = {}
    for override in overrides:
        key = key_of(override)
        if key in first:
            quote = f", and quote a pattern that the shell would expand: '{key}=DIR/{{00000..00001}}.tar'"
            raise UserError(
                f"{key} is given twice, {first[key]} and {override}; give it once{quote if '/' in override else ''}"
            )
        first[key] = override
