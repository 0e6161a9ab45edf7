"""Whether two configs mean the same run.  Does not import torch."""

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from typing_extensions import Unpack

from clipx.config.instantiate import locate
from clipx.config.validate import ConfigError, suggest

CONF = "clipx.conf"  # the package of the YAML files

# keys that do not change what a run computes: places, speed, memory, logging
NEUTRAL = {
    "name", "stop_at", "device", "workers", "resume", "trust", "log_every", "eval_every", "save_every", "keep_every",
    "data.root", "data.shards", "data.val_shards", "data.index_dir", "data.cache", "data.cache_gb",
    "data.allow_pipe", "data.made_by", "data.max_skipped", "micro_batch_size", "grad_checkpoint", "compile",
    "deterministic", "resume_allow", "feature_cache", "max_bad_steps", "max_rollbacks", "signal_exit_code", "track",
}  # fmt: skip
LABELLED_PATHS = r"(labelled|evals\.[^.]+\.sets)\.[^.]+\.(root|folder|shards|train|classes|cache)"

LENGTH_KEYS = {"epochs", "max_steps"}  # may grow on resume
RECORDED = {"choices", "varied"}  # for the record only


def is_neutral(key: str) -> bool:
    """Whether a key does not change the meaning of a run."""
    plain = re.sub(r"^data\.sources\.[^.]+\.", "data.", key)  # sources of a mix
    return plain in NEUTRAL or plain.startswith("track.") or re.fullmatch(LABELLED_PATHS, key) is not None


def with_defaults(saved: Mapping[str, Any], name: str = "train") -> dict[str, Any]:
    """A saved config with the defaults of the keys that it lacks: those of another command or of a later version.

    The default of a new key must do what earlier versions did.
    """
    primary = read_conf(f"{name}.yaml")
    defaults: dict[str, Any] = {}
    for entry in primary.pop("defaults"):
        if isinstance(entry, str) and entry != "_self_":
            defaults |= with_defaults({}, entry)
        elif isinstance(entry, dict):  # groups of several options, such as track: [tensorboard]
            lists = {group: options for group, options in entry.items() if isinstance(options, list)}
            for group, options in lists.items():
                primary[group] = {option: read_conf(f"{group}/{option}.yaml") for option in options}
    return {**defaults, **primary, **saved}


def read_conf(name: str) -> dict[str, Any]:
    """Read a YAML file of conf/."""
    return yaml.safe_load(files(CONF).joinpath(name).read_text(encoding="utf-8"))


def argument_defaults(config: Mapping[str, Any], trust: Sequence[str]) -> dict[str, Any]:
    """The default arguments of every node in a config, by key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found.update({f"{key}.{inner}": default for inner, default in argument_defaults(value, trust).items()})
    if "_target_" in config:
        target = locate(config["_target_"], "config", trust)
        parameters = inspect.signature(target).parameters.values()
        found.update(option_defaults(target))
        found.update({
            parameter.name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            for parameter in parameters if parameter.default is not parameter.empty
        })  # fmt: skip
    return found


def option_defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """Defaults of the ``**options: Unpack[Options]`` of a function: those of the dataclass that it returns."""
    hints = {} if inspect.isclass(target) else typing.get_type_hints(target)
    unpacked = [get_args(hint)[0] for hint in hints.values() if get_origin(hint) is Unpack]
    made = hints.get("return")
    if not unpacked or not isinstance(made, type) or not is_dataclass(made):
        return {}
    options = unpacked[0].__annotations__
    found = {field.name: field.default for field in fields(made) if field.name in options}
    return {key: list(default) if isinstance(default, tuple) else default for key, default in found.items()}


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found


def flatten_saved(before: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a saved config, with the defaults of keys that are newer than it."""
    whole = with_defaults(before)
    references = {key: match[1] for key, value in whole.items() if (match := re.fullmatch(r"\$\{(\w+)\}", str(value)))}
    return flatten({**whole, **{key: whole[other] for key, other in references.items()}})  # best: ${objective}


def is_meaningful(key: str) -> bool:
    return not is_neutral(key) and key.split(".")[0] not in RECORDED


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Keys whose meaning differs, each with ``key: before -> after``.

    A key that ``before`` lacks has its default there: the config may be older than the key.
    """
    kept, new = flatten_saved(before), flatten(after)
    old = {**argument_defaults(after, after.get("trust", [])), **kept}
    keys = filter(is_meaningful, dict.fromkeys([*new, *kept]))
    return {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)}


def certain_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """The differences that can be found without importing targets: values that no conversion makes equal.

    What ``auto`` selects is not known yet.
    """
    old, new = flatten_saved(before), flatten(after)
    keys = filter(is_meaningful, (key for key in new if key in old and new[key] != "auto"))
    return {key: f"{key}: {old[key]!r} -> {new[key]!r}" for key in keys if certainly_differ(old[key], new[key])}


def certainly_differ(one: Any, other: Any) -> bool:
    """Whether two values differ after any conversion to a type hint: "5" and 5 may become equal."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) != len(other) or any(map(certainly_differ, one, other))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other))
    return one != other and (numbers or type(one) is type(other) or None in (one, other))


def refusal_message(path: Path, changes: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Why a run must not resume from a checkpoint; empty if it may.

    Args:
        path: of the checkpoint.
        changes: the differences, by key.
        config: its ``resume_allow`` lists keys that may differ.

    Raises:
        ConfigError: ``resume_allow`` names an unknown key.
    """
    allowed = allowed_changes(config, changes)
    refused = {key: text for key, text in changes.items() if key not in allowed}
    return (
        ""
        if not refused
        else (
            f"{path} belongs to another run ({'; '.join(refused.values())}); name=... starts a new run, and "
            f"resume_allow=[{','.join(refused)}] resumes this one anyway"
        )
    )


def allowed_changes(config: Mapping[str, Any], changes: Mapping[str, str]) -> set[str]:
    """The changed keys that ``resume_allow`` lists, by key or group.

    Raises:
        ConfigError: it lists an unknown key.
    """
    known = {".".join(key.split(".")[:depth]) for key in flatten(config) for depth in (1, 2, 3, 4)}
    for key in config["resume_allow"]:
        if key not in known | changes.keys():
            raise ConfigError(f"resume_allow=[{key}]: there is no such key{suggest(key, sorted(known))}")
    return {key for key in changes if any(f"{key}.".startswith(f"{name}.") for name in config["resume_allow"])}
