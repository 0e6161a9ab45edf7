"""Build the object that a config node describes; the path in ``_target_`` is the registry."""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipx.errors import UserError


def locate(target: str, where: str, trust: Sequence[str] = (), own: str = "clipx") -> Callable[..., Any]:
    """Import the function or class that ``target`` names.

    It must be defined in an allowed package: names that a module merely imports are refused, except those in the
    ``__all__`` of a trusted package.

    Args:
        target: dotted path, such as ``clipx.models.clip.CLIP``.
        where: its config key, for errors.
        trust: packages besides clipx whose code may be called.
        own: the part of clipx whose code may be called.

    Raises:
        UserError: the package is not trusted, or the function does not exist.
    """
    if not is_within(target, own, *trust):
        raise not_allowed(where, target, target, own)
    parent, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(parent)
        found = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where}._target_={target} cannot be imported: {error}") from error
    if not callable(found):
        raise UserError(f"{where}._target_={target} is a {type(found).__name__}, neither a function nor a class")
    home = getattr(found, "__module__", None) or (parent if is_within(target, *trust) else "builtins")
    if not is_within(home, own, *trust) and not (is_within(target, *trust) and name in getattr(module, "__all__", ())):
        raise not_allowed(where, target, home, own)
    return found


def is_within(path: str, *packages: str) -> bool:
    return any(f"{path}.".startswith(f"{package}.") for package in packages)


def not_allowed(where: str, target: str, home: str, own: str) -> UserError:
    """The error for a target that is defined in ``home``."""
    package = home.partition(".")[0]
    if package == "clipx":
        return UserError(f"{where}._target_={target} is outside {own}, the only part of clipx that may be called here")
    reason = "is not clipx's own code" if home == target else f"comes from {home}"
    return UserError(f"{where}._target_={target} {reason}; trust=[{package}] allows it to be called")


def build(node: Any, where: str = "model", trust: Sequence[str] = (), own: str = "clipx") -> Any:
    """Call the ``_target_`` of a node with its other entries, which are built first.

    Args:
        node: a mapping with ``_target_``, and ``_partial_: true`` if code supplies the other arguments.  A mapping
            without it is built item by item, and any other value is returned unchanged.
        where: the config key of the node, for errors.
        trust: packages besides clipx whose code may be called.
        own: the part of clipx whose code may be called.

    Returns:
        What the target returns, or a ``functools.partial`` of it.

    Raises:
        UserError: the target must not or cannot be called, or rejects a value.
    """
    if isinstance(node, Mapping) and "_target_" not in node:
        return {key: build(value, f"{where}.{key}", trust, own) for key, value in node.items()}
    if not isinstance(node, Mapping):
        return node
    target = locate(node["_target_"], where, trust, own)
    given = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    arguments = {key: build(value, f"{where}.{key}", trust, own) for key, value in given.items()}
    if node.get("_partial_"):
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except ValueError as error:  # raised by targets for an invalid value
        raise UserError(f"{where}.{error}") from error
