"""Errors of Hydra and OmegaConf in one line, with the nearest key or option."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from clipx.config import arguments
from clipx.config.meaning import CONF, flatten
from clipx.config.resolve import first_line
from clipx.config.sweep import is_sweep
from clipx.config.validate import suggest


def with_list(mistake: str, given: Sequence[str]) -> str:
    """A mistake, and how several values are given, where it is about values with commas between them."""
    for word in given:
        key, _, value = word.partition("=")
        parts = [] if value.startswith(("'", '"')) else arguments.parts_of(value)
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
    return [*flatten(plain), *(key for key, value in plain.items() if isinstance(value, dict))]


def hydra_keys(name: str, given: Sequence[str], key: str) -> list[str]:
    """The settings of Hydra's that stand beside a key."""
    groups = [word for word in given if re.fullmatch(r"hydra/\w+=\w+", word)]
    composed = hydra.compose(name, groups, return_hydra_config=True)
    parent = key.rpartition(".")[0]
    beside = OmegaConf.select(composed, parent)
    return [f"{parent}.{own}" for own in beside] if isinstance(beside, DictConfig) else []
