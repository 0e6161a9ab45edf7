"""The page that ``--help`` prints, built from the comments and defaults in conf/."""

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import dropwhile, takewhile
from pathlib import Path

import yaml

from clipx.config.arguments import option_values
from clipx.config.meaning import CONF

SWITCHES = """\
Switches of Hydra, for every command:

  --cfg job             show the composed config and exit
  -m, --multirun        run once for each of several values: optim.lr=1e-4,5e-4
  --config-dir DIR      your own options: DIR/model/mine.yaml is model=mine
  +KEY=VALUE, ~KEY      add a key that an option does not list; remove one
  -sc install=bash      complete keys and options: eval "$(clipx-NAME -sc install=bash)"
  --hydra-help          all other switches
"""


def help_page(command: str, arguments: Sequence[str] = ()) -> str:
    """The help of a command.

    Args:
        command: the name of its primary config.
        arguments: given with ``--help``; GROUP=OPTION and ``--config-dir DIR`` change the page.
    """
    folders = [Path(str(files(CONF))), *config_dirs(arguments)]
    head, defaults, keys = split_yaml((folders[0] / f"{command}.yaml").read_text(encoding="utf-8"))
    if "train" in defaults:  # check and bench add keys to those of train
        _, defaults, more = split_yaml((folders[0] / "train.yaml").read_text(encoding="utf-8"))
        keys = f"{keys}\n{more}" if keys else more
    chosen = {
        group: option
        for default in defaults
        if isinstance(default, dict)
        for group, option in default.items()
        if group.isidentifier()
    }
    sections = [f"clipx.{command}: {head}"]
    if chosen:
        listed = "\n".join(describe_group(folders, group, chosen[group]) for group in chosen)
        sections.append(f"Groups (GROUP=OPTION; * is the default; --help GROUP=OPTION shows its keys):\n\n{listed}")
    sections.append(f"Keys (KEY=VALUE) and their defaults:\n\n{indent(keys)}")
    chosen |= dict(text.split("=", 1) for text in arguments if text.partition("=")[0] in chosen)
    for group, option in chosen.items():
        for name in re.findall(r"\w+", option) if isinstance(option, str) else option or []:
            sections += describe_option(folders, group, name)
    return "\n".join([*sections, SWITCHES.replace("NAME", command)])


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """The directories that ``--config-dir`` adds."""
    return [Path(value) for value in option_values(arguments, "--config-dir", "-cd")]


def split_yaml(text: str) -> tuple[str, list[str | dict], str]:
    """Split a config into its opening comment, its defaults list and the lines of its keys."""
    lines = text.splitlines()
    comment = [*takewhile(lambda line: line.startswith("#"), lines)]
    rest = lines[len(comment) :]
    keys = [*dropwhile(lambda line: not line or line.startswith(("defaults:", "  - ")), rest)]
    defaults = yaml.safe_load("\n".join(rest[: len(rest) - len(keys)])) or {}
    head = [line[2:] for line in comment if not line.startswith("# @package")]
    return "\n".join([*head, ""]), defaults.get("defaults", []), "\n".join([*keys, ""] if keys else [])


def describe_group(folders: Sequence[Path], group: str, default: str | Sequence[str] | None) -> str:
    """List the options of a group, each with the first line of its comment."""
    chosen = default if isinstance(default, list) else [default]
    shown = f"  {group}=\n"
    for option, text in sorted(read_options(folders, group)):
        first = split_yaml(text)[0].splitlines() or [""]
        shown += f"  {'*' if option in chosen else ' '} {option:<17} {first[0]}".rstrip() + "\n"
    return shown


def read_options(folders: Sequence[Path], group: str) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each option."""
    for folder in folders:
        for path in (folder / group).glob("*.yaml"):
            yield path.stem, path.read_text(encoding="utf-8")


def describe_option(folders: Sequence[Path], group: str, option: str) -> list[str]:
    """The keys of an option under their package, after those of the option that it extends."""
    text = dict(read_options(folders, group)).get(option)
    if text is None:
        return []
    _, defaults, keys = split_yaml(text)
    package = re.match(r"# @package (\S+)", text)
    parent = package[1] if package else group
    has_keys = bool(keys.strip())  # augment=none has none
    keys = keys if parent == "_global_" else f"{parent}:\n{indent(keys)}"
    extended = [part for base in defaults if isinstance(base, str) for part in describe_option(folders, group, base)]
    return [*extended, f"Keys of {group}={option}:\n\n{indent(keys)}"] if has_keys else extended


def indent(text: str) -> str:
    return "".join(f"  {line}".rstrip() + "\n" for line in text.splitlines())
