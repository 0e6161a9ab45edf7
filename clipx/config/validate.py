"""Check config nodes against the signatures that they call: names, types, nothing missing."""

import difflib
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import Unpack

from clipx.config.instantiate import locate
from clipx.errors import UserError


class ConfigError(UserError):
    """A wrong key, type or value in a config."""


def check_node(node: Any, where: str, trust: Sequence[str]) -> dict[str, Any]:
    """Convert the values of a node, and of its nested nodes, to the types of the signature that it calls.

    Raises:
        ConfigError: a name or a value does not fit; the message names the key and what is right.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{where}={node!r}: expected a config node with a _target_")
    target = locate(node["_target_"], where, trust)
    plain = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    nested = {}
    for key, value in plain.items():
        if has_nodes(value):
            check = check_node if "_target_" in value else check_named_nodes
            nested[key] = check(value, f"{where}.{key}", trust)
    converted = check_call(target, plain, f"{where}.", skip=nested, partial=bool(node.get("_partial_")))
    return {**node, **converted, **nested}


def has_nodes(value: Any) -> bool:
    """Whether a value is a node, or a mapping of nodes."""
    return isinstance(value, Mapping) and ("_target_" in value or any(has_nodes(inner) for inner in value.values()))


def check_named_nodes(nodes: Mapping[str, Any], where: str, trust: Sequence[str]) -> dict[str, Any]:
    """Like ``check_node``, for each node of a mapping."""
    return {name: check_node(node, f"{where}.{name}", trust) for name, node in nodes.items()}


def check_call(
    target: Callable[..., Any],
    values: Mapping[str, Any],
    prefix: str = "",
    skip: Collection[str] = (),
    partial: bool = False,
) -> dict[str, Any]:
    """Check and convert keyword arguments.

    Args:
        target: a function or class with type hints.
        values: its keyword arguments.
        prefix: of their keys in the config, for example ``model.image.``.
        skip: names of values that are not converted.
        partial: arguments may be missing, because code supplies them.

    Returns:
        The values, converted to their type hints.

    Raises:
        ConfigError: a name is unknown or missing, or a value does not fit its type hint.
    """
    parameters = dict(inspect.signature(target).parameters)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    rest = next((key for key, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD), None)
    known = [key for key in parameters if key != rest]
    if rest and get_origin(hints.get(rest)) is Unpack:  # **options: Unpack[DataOptions], a TypedDict
        more = typing.get_type_hints(get_args(hints[rest])[0], include_extras=True)
        hints, known, rest = {**hints, **more}, [*known, *more], None
    for key in values:
        if rest is None and key not in known:
            raise ConfigError(f"{prefix}{key}: {target.__name__} has no such argument{suggest(key, known, prefix)}")
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if required and key not in values and not partial:
            raise ConfigError(f"{prefix}{key} has no value; add {prefix}{key}=...")
    return {
        key: value if key in skip else convert(value, hints.get(key, Any), f"{prefix}{key}")
        for key, value in values.items()
    }


def convert(value: Any, hint: Any, key: str) -> Any:
    """Convert a value to its type hint; tuples become lists, as in YAML and JSON.

    Raises:
        ConfigError: it does not fit.
    """
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r}: should have keys; {key}.{fields(hint)[0].name}=... sets one")
        return hint(**check_call(hint, value, f"{key}."))
    try:
        converted = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True)).validate_python(value)
    except ValidationError as error:
        found = error.errors()
        names = {detail["loc"][0] for detail in found if detail["loc"]}
        if isinstance(value, dict) and len(names) == 1 and names <= value.keys():  # one entry is wrong: name it
            (name,) = names
            key, value = f"{key}.{name}", value[name]
        if found[-1]["type"] == "missing" and isinstance(found[-1]["loc"][-1], int):  # of a tuple
            raise ConfigError(f"{key}={value!r}: should have {found[-1]['loc'][-1] + 1} values") from error
        reasons = dict.fromkeys(detail["msg"].removeprefix("Value error, ") for detail in found)
        reason = " or ".join(reasons).replace("Input should", "should").replace("or should be", "or")
        raise ConfigError(f"{key}={value!r}: {reason}") from error
    return list(converted) if isinstance(converted, tuple) else converted


def suggest(key: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error about an unknown name: a near match, or all known names."""
    known = [name for name in known if not name.rpartition(".")[2].startswith("_")]  # _target_ is never meant
    same = [name for name in known if name.rpartition(".")[2] == key]  # lr for optim.lr
    swapped = [name for name in known if sorted(name) == sorted(key)]  # modle: model, not mode
    near = same or swapped or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; there are {', '.join(known)}"
