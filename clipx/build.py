"""From a config node to the object it describes: the path in ``_target_`` is the registry."""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipx.errors import UserError


def locate(target: str, where: str, trust: Sequence[str] = ()) -> Callable[..., Any]:
    """The function or class that ``target`` names, imported.

    Args:
        target: dotted path, such as ``clipx.models.clip.CLIP``.
        where: the config key that holds it, for the error.
        trust: packages besides clipx whose code may be called.

    Raises:
        UserError: the package is not trusted, or there is no such function.
    """
    package = target.partition(".")[0]
    if package not in ("clipx", *trust):
        raise UserError(f"{where}._target_={target} is not clipx's own code; trust=[{package}] allows it to be called")
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where}._target_={target} cannot be imported: {error}") from error


def build(node: Any, where: str = "model", trust: Sequence[str] = ()) -> Any:
    """Call the ``_target_`` of a node with the node's other entries, innermost nodes first.

    Args:
        node: a mapping with ``_target_`` (and ``_partial_: true`` where code supplies the rest of the
            arguments), or a plain value, which is returned as it is.
        where: the config key of the node, for errors.
        trust: packages besides clipx whose code may be called.

    Returns:
        What the target returns, or a ``functools.partial`` of it.

    Raises:
        UserError: the target may not or cannot be called, or refuses a value.
    """
    if isinstance(node, Mapping) and "_target_" not in node:
        return {key: build(value, f"{where}.{key}", trust) for key, value in node.items()}
    if not isinstance(node, Mapping):
        return node
    target = locate(node["_target_"], where, trust)
    given = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    arguments = {key: build(value, f"{where}.{key}", trust) for key, value in given.items()}
    if node.get("_partial_"):
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except ValueError as error:      # our own targets raise it for a value that cannot be
        raise UserError(f"{where}.{error}") from error
