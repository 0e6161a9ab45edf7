"""What a config means, and whether the run in a directory means the same.  Nothing here imports torch."""

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from clipx.config.instantiate import locate
from clipx.config.validate import ConfigError, suggest

CONF = "clipx.conf"      # the package of the YAML files

# what does not change the meaning of a run: where, how fast, in how much memory, how closely watched
NEUTRAL = {
    "name", "stop_at", "device", "workers", "resume", "trust", "log_every", "eval_every", "save_every", "keep_every",
    "data.root", "data.shards", "data.val_shards", "data.index_dir", "data.cache", "data.cache_gb",
    "data.allow_pipe", "data.made_by", "data.max_skipped", "micro_batch_size", "grad_checkpoint", "compile",
    "resume_allow", "max_bad_steps", "max_rollbacks", "signal_exit_code",
}  # fmt: skip
PLACES = r"(labelled|evals\.[^.]+\.sets)\.[^.]+\.(root|folder|shards|train|classes)"       # of labelled data

LENGTH_KEYS = {"epochs", "max_steps"}        # these may grow
RECORDED = {"choices", "varied"}        # what is only noted, and means nothing


def is_neutral(key: str) -> bool:
    """Whether a key does not change the meaning of a run."""
    in_mix = re.sub(r"^data\.sources\.[^.]+\.", "data.", key)        # of a mix's sources, too
    return in_mix in NEUTRAL or re.fullmatch(PLACES, key) is not None


def completed(saved: Mapping[str, Any], name: str = "train") -> dict[str, Any]:
    """A run's saved config, with the defaults of those keys of a command that it lacks.

    A saved config lacks the keys that another command adds, and those of later versions: their defaults do what was
    done before they existed.
    """
    primary = yaml.safe_load(files(CONF).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    inherited = [entry for entry in primary.pop("defaults") if isinstance(entry, str) and entry != "_self_"]
    defaults: dict[str, Any] = {}
    for other in inherited:
        defaults |= completed({}, other)
    return {**defaults, **primary, **saved}


def argument_defaults(config: Mapping[str, Any], trust: Sequence[str]) -> dict[str, Any]:
    """The defaults of all arguments of a config's nodes, by key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found.update({f"{key}.{inner}": default for inner, default in argument_defaults(value, trust).items()})
    if "_target_" in config:
        parameters = inspect.signature(locate(config["_target_"], "config", trust)).parameters.values()
        found.update({one.name: list(one.default) if isinstance(one.default, tuple) else one.default
                      for one in parameters if one.default is not one.empty})
    return found


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found


def earlier(before: Mapping[str, Any]) -> dict[str, Any]:
    """A run's saved config, flat, with the defaults of keys that are newer than the run."""
    whole = completed(before)
    references = {key: match[1] for key, value in whole.items() if (match := re.fullmatch(r"\$\{(\w+)\}", str(value)))}
    return flatten({**whole, **{key: whole[other] for key, other in references.items()}})      # best: ${objective}


def means_something(key: str) -> bool:
    return not is_neutral(key) and key.split(".")[0] not in RECORDED


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """What has another meaning in two configs: by key, ``key: before -> after``.

    What ``before`` does not have, as it was written before the key existed, has its default there.
    """
    kept, new = earlier(before), flatten(after)
    old = {**argument_defaults(after, after.get("trust", [])), **kept}
    keys = filter(means_something, dict.fromkeys([*new, *kept]))
    return {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)}


def certain_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Those of the differences that need no signature: keys of both, whose values no conversion makes equal."""
    old, new = earlier(before), flatten(after)
    keys = filter(means_something, (key for key in new if key in old))
    return {key: f"{key}: {old[key]!r} -> {new[key]!r}" for key in keys if certainly_differ(old[key], new[key])}


def certainly_differ(one: Any, other: Any) -> bool:
    """Whether two values differ, whatever a signature may turn them into: "5" and 5 may be the same."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) != len(other) or any(map(certainly_differ, one, other))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other))
    return one != other and (numbers or type(one) is type(other) or None in (one, other))


def refusal_message(path: Path, changes: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Why a run does not resume from a checkpoint; empty where it does.

    Args:
        path: of the checkpoint.
        changes: what has another meaning, by key.
        config: says what may have changed (``resume_allow``).

    Raises:
        ConfigError: ``resume_allow`` names what is no key.
    """
    permitted = allowed(config, changes)
    told = {key: text for key, text in changes.items() if key not in permitted}
    return "" if not told else (
        f"{path} is of another run ({'; '.join(told.values())}); name=... starts one of its own, and "
        f"resume_allow=[{','.join(told)}] goes on with this one all the same"
    )


def allowed(config: Mapping[str, Any], changes: Mapping[str, str]) -> set[str]:
    """Those of the changed keys that ``resume_allow`` names, each itself or its group.

    Raises:
        ConfigError: it names what is no key.
    """
    known = {".".join(key.split(".")[:depth]) for key in flatten(config) for depth in (1, 2, 3, 4)}
    for key in config["resume_allow"]:
        if key not in known | changes.keys():
            raise ConfigError(f"resume_allow=[{key}]: there is no such key{suggest(key, sorted(known))}")
    return {key for key in changes if any(f"{key}.".startswith(f"{name}.") for name in config["resume_allow"])}


