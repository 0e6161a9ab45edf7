"""The page that ``--help`` shows: made of the YAML of a command, which says what each key is and what it starts as."""

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import dropwhile, takewhile
from pathlib import Path

import yaml

from clipx.config.meaning import CONF

SWITCHES = """\
Switches that every command has, from Hydra:

  --cfg job             shows the composed config, and does nothing else
  -m, --multirun        once for each of values with commas between them: optim.lr=1e-4,5e-4
  --config-dir DIR      options of your own: DIR/model/mine.yaml is model=mine
  +KEY=VALUE, ~KEY      adds a key that an option has not stated; takes one away
  -sc install=bash      completion of keys and options: eval "$(clipx-NAME -sc install=bash)"
  --hydra-help          the rest of them
"""


def help_page(command: str, words: Sequence[str] = ()) -> str:
    """All that can be given to a command.

    Args:
        command: the name of its primary config.
        words: that were given beside ``--help``; GROUP=OPTION and ``--config-dir DIR`` count.
    """
    places = [Path(str(files(CONF)))]
    places += config_dirs(words)
    head, defaults, keys = parts((places[0] / f"{command}.yaml").read_text(encoding="utf-8"))
    if "train" in defaults:             # the words of train, and some more
        _, defaults, more = parts((places[0] / "train.yaml").read_text(encoding="utf-8"))
        keys = f"{keys}\n{more}" if keys else more
    chosen = {group: option for default in defaults if isinstance(default, dict) for group, option in default.items()
              if group.isidentifier()}
    sections = [f"clipx.{command}: {head}"]
    if chosen:
        listed = "\n".join(block(places, group, chosen[group]) for group in chosen)
        sections.append(f"Groups (GROUP=OPTION; * is the default; --help GROUP=OPTION shows its keys):\n\n{listed}")
    sections.append(f"Keys (KEY=VALUE) and their defaults:\n\n{indented(keys)}")
    chosen |= dict(word.split("=", 1) for word in words if word.partition("=")[0] in chosen)
    for group, option in chosen.items():
        for name in re.findall(r"\w+", option) if isinstance(option, str) else option or []:
            sections += section(places, group, name)
    return "\n".join([*sections, SWITCHES.replace("NAME", command)])


def config_dirs(words: Sequence[str]) -> list[Path]:
    """The directories of options that the words add."""
    after = [Path(word) for before, word in zip(words, words[1:], strict=False) if before in ("--config-dir", "-cd")]
    return [*after, *(Path(word.partition("=")[2]) for word in words if word.startswith("--config-dir="))]


def parts(text: str) -> tuple[str, list[str | dict], str]:
    """The comment that a config opens with, its defaults list, and the lines of its keys."""
    lines = text.splitlines()
    comment = [*takewhile(lambda line: line.startswith("#"), lines)]
    rest = lines[len(comment) :]
    keys = [*dropwhile(lambda line: not line or line.startswith(("defaults:", "  - ")), rest)]
    defaults = yaml.safe_load("\n".join(rest[: len(rest) - len(keys)])) or {}
    head = [line[2:] for line in comment if not line.startswith("# @package")]
    return "\n".join([*head, ""]), defaults.get("defaults", []), "\n".join([*keys, ""] if keys else [])


def block(places: Sequence[Path], group: str, default: str | Sequence[str] | None) -> str:
    """A group's options, each with the first line of its comment."""
    chosen = default if isinstance(default, list) else [default]
    told = f"  {group}=\n"
    for option, text in sorted(options(places, group)):
        first = parts(text)[0].splitlines() or [""]
        told += f"  {'*' if option in chosen else ' '} {option:<18}{first[0]}".rstrip() + "\n"
    return told


def options(places: Sequence[Path], group: str) -> Iterator[tuple[str, str]]:
    """Name and text of each."""
    for place in places:
        for path in (place / group).glob("*.yaml"):
            yield path.stem, path.read_text(encoding="utf-8")


def section(places: Sequence[Path], group: str, option: str) -> list[str]:
    """The keys of an option under where they are put, behind those of the option that it builds on."""
    text = dict(options(places, group)).get(option)
    if text is None:
        return []
    _, defaults, keys = parts(text)
    package = re.match(r"# @package (\S+)", text)
    under = package[1] if package else group
    keys = keys if under == "_global_" else f"{under}:\n{indented(keys)}"
    before = [told for base in defaults if isinstance(base, str) for told in section(places, group, base)]
    return [*before, f"Keys of {group}={option}:\n\n{indented(keys)}"]


def indented(text: str) -> str:
    return "".join(f"  {line}".rstrip() + "\n" for line in text.splitlines())
