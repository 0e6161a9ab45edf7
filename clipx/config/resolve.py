"""Hydra's composed config -> plain typed values."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from clipx.config.arguments import GROUPS
from clipx.config.meaning import CONF
from clipx.config.validate import ConfigError, check_call, check_named_nodes, check_node
from clipx.errors import first_line

Schema = TypeVar("Schema")


def resolve(composed: DictConfig, schema: type[Schema]) -> Schema:
    """Convert a config to plain typed values and check every node against the signature of its target.

    Args:
        composed: the config that Hydra composed.
        schema: the dataclass of the command; its fields named in GROUPS hold nodes.

    Raises:
        ConfigError: a key, a type or a value is wrong.
    """
    return check_nodes(typed_values(composed, schema), schema)


def check_nodes(values: Mapping[str, Any], schema: type[Schema]) -> Schema:
    """Check every node of typed values against the signature of its target.

    Raises:
        ConfigError: a key, a type or a value is wrong.
    """
    trust, nodes = values.get("trust", []), {}
    groups = {key for key in values.keys() & set(GROUPS) if key != "augment" or values[key]}  # {}: none
    for key in sorted(groups, key=lambda key: key not in ("data", "source", "sched")):  # these import no torch
        check = check_named_nodes if key in ("evals", "track") else check_node
        nodes[key] = check(values[key], key, trust)
    return schema(**{**values, **nodes})


def to_dict(config: DictConfig, resolve: bool = False) -> dict[str, Any]:
    """Convert a config to plain dicts and lists."""
    plain = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    return cast(dict[str, Any], plain)


def typed_values(composed: DictConfig, schema: type) -> dict[str, Any]:
    """Convert to the types of a schema, without checking nodes, which may import torch.

    Raises:
        ConfigError: a key, a type or a value is wrong.
    """
    try:
        plain = to_dict(composed, resolve=True)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise ConfigError(f"{key} has no value; add {key}={list_options(key)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    return check_call(schema, plain)


def list_options(key: str) -> str:
    """The options of a group; "..." for any other key."""
    if key not in GROUPS:
        return "..."
    return "|".join(sorted(path.name[:-5] for path in files(CONF).joinpath(key).iterdir() if path.name[-5:] == ".yaml"))
