"""Errors of Hydra and OmegaConf in one line, with the nearest key or option."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from clipx.config.arguments import split_commas
from clipx.config.meaning import CONF, flatten
from clipx.config.resolve import to_dict
from clipx.config.sweep import is_sweep
from clipx.config.validate import suggest
from clipx.errors import first_line


def add_list_hint(message: str, arguments: Sequence[str]) -> str:
    """Add how to give several values to an error about a value with commas."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        parts = [] if value.startswith(("'", '"')) else split_commas(value)
        if len(parts) > 1 and all(parts) and message.startswith((f"{key}=", f"{key}:")) and not is_sweep(arguments):
            return f"{message}; -m runs once for each value ({key}={value}), and {key}=[{value}] is one list"
    return message


@contextmanager
def isolated_hydra() -> Iterator[None]:
    """Start with an uninitialised Hydra, and restore the one that a notebook may use."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = before


def explain(error: Exception, name: str, arguments: Sequence[str]) -> str:
    """The message of an error in one line, with a near match."""
    text = first_line(error)
    key = re.search(r"Could not override '([^']+)'", text)
    option = re.search(r"Could not (?:find|load) '([^']+)/([^']+)'", text)
    if "validated against ConfigStore schema" in text:
        return "hydra-optuna-sweeper also defines hydra/sweeper=optuna; pip uninstall hydra-optuna-sweeper"
    if "does not support sweep type" in text:
        return "a sweep needs a list of values, not an interval; add hydra/sweeper=optuna to search the interval"
    with isolated_hydra(), hydra.initialize_config_module(CONF, version_base="1.3"):
        if option:
            options = GlobalHydra.instance().config_loader().get_group_options(option[1])
            return f"{option[1]}={option[2]}: there is no such option{suggest(option[2], options)}"
        if key:
            known = hydra_keys(name, arguments, key[1]) if key[1].startswith("hydra.") else known_keys(name, arguments)
            if key[1].startswith("optim.") and "optim.optimizer" in known:
                return f"{key[1]}: not a key of clipx; if it is an argument of the optimiser, add it with +{key[1]}=..."
            return f"{key[1]}: there is no such key{suggest(key[1], known)}"
    return text


def known_keys(name: str, arguments: Sequence[str]) -> list[str]:
    """All keys of the chosen groups."""
    try:
        composed = hydra.compose(name, [text for text in arguments if re.fullmatch(r"[a-z]+=[\w\[\],]+", text)])
    except HydraException:
        composed = hydra.compose(name)
    plain = to_dict(composed)
    return [*flatten(plain), *(key for key, value in plain.items() if isinstance(value, dict))]


def hydra_keys(name: str, arguments: Sequence[str], key: str) -> list[str]:
    """The keys of Hydra under the same parent as ``key``."""
    groups = [text for text in arguments if re.fullmatch(r"hydra/\w+=\w+", text)]
    composed = hydra.compose(name, groups, return_hydra_config=True)
    parent = key.rpartition(".")[0]
    siblings = OmegaConf.select(composed, parent)
    return [f"{parent}.{sibling!s}" for sibling in siblings] if isinstance(siblings, DictConfig) else []
