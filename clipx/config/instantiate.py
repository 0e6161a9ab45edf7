"""From a config node to the object it describes: the path in ``_target_`` is the registry."""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipx.errors import UserError


def locate(target: str, where: str, trust: Sequence[str] = (), own: str = "clipx") -> Callable[..., Any]:
    """The function or class that ``target`` names, imported.

    It must be defined where it may be called, as a module holds much that it has merely imported; only a trusted
    package may pass on what is not its own, by its ``__all__``.

    Args:
        target: dotted path, such as ``clipx.models.clip.CLIP``.
        where: the config key that holds it, for the error.
        trust: packages besides clipx whose code may be called.
        own: the part of clipx that may be called.

    Raises:
        UserError: the package is not trusted, or there is no such function.
    """
    if not within(target, own, *trust):
        raise refusal(where, target, target, own)
    place, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(place)
        found = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where}._target_={target} cannot be imported: {error}") from error
    if not callable(found):
        raise UserError(f"{where}._target_={target} is a {type(found).__name__}, neither a function nor a class")
    home = getattr(found, "__module__", None) or (place if within(target, *trust) else "builtins")
    if not within(home, own, *trust) and not (within(target, *trust) and name in getattr(module, "__all__", ())):
        raise refusal(where, target, home, own)
    return found


def within(path: str, *packages: str) -> bool:
    return any(f"{path}.".startswith(f"{package}.") for package in packages)


def refusal(where: str, target: str, home: str, own: str) -> UserError:
    """Why a target may not be called that is defined in ``home``."""
    package = home.partition(".")[0]
    if package == "clipx":
        return UserError(f"{where}._target_={target} is not of {own}, all of clipx that may be called here")
    reason = "is not clipx's own code" if home == target else f"comes from {home}"
    return UserError(f"{where}._target_={target} {reason}; trust=[{package}] allows it to be called")


def build(node: Any, where: str = "model", trust: Sequence[str] = (), own: str = "clipx") -> Any:
    """Call the ``_target_`` of a node with the node's other entries, innermost nodes first.

    Args:
        node: a mapping with ``_target_`` (and ``_partial_: true`` where code supplies the rest of the
            arguments), or a plain value, which is returned as it is.
        where: the config key of the node, for errors.
        trust: packages besides clipx whose code may be called.
        own: the part of clipx that may be called.

    Returns:
        What the target returns, or a ``functools.partial`` of it.

    Raises:
        UserError: the target may not or cannot be called, or refuses a value.
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
    except ValueError as error:      # our own targets raise it for a value that cannot be
        raise UserError(f"{where}.{error}") from error
