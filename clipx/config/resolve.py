"""From Hydra's composed config to plain typed values."""

from importlib.resources import files
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from clipx.config import arguments
from clipx.config.meaning import CONF
from clipx.config.schema import TrainConfig
from clipx.config.validate import ConfigError, check_call, check_node

Schema = TypeVar("Schema")


def resolve(composed: DictConfig, schema: type[Schema] = TrainConfig) -> Schema:
    """Plain typed values; every node is held against the signature that it calls, and nothing is built.

    Args:
        composed: the config, as Hydra composes it.
        schema: of the command, a dataclass; those of its fields that are groups hold nodes.

    Raises:
        ConfigError: a key, a type or a value is wrong.
    """
    values = typed_values(composed, schema)
    trust = values.get("trust", [])
    groups = values.keys() & set(arguments.GROUPS) - {"evals"}
    for key in sorted(groups, key=lambda key: key not in ("data", "source", "sched")):     # whose code needs no torch
        values[key] = check_node(values[key], key, trust)
    if "evals" in values:
        values["evals"] = {key: check_node(node, f"evals.{key}", trust) for key, node in values["evals"].items()}
    return schema(**values)


def typed_values(composed: DictConfig, schema: type = TrainConfig) -> dict[str, Any]:
    """Plain values in the types of a schema, nodes as they are written: what can be known without importing torch.

    Raises:
        ConfigError: a key, a type or a value is wrong.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; add {error.full_key}={options(error.full_key)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    return check_call(schema, plain)


def options(key: str) -> str:
    """What a group can be; "..." for any other key."""
    if key not in arguments.GROUPS:
        return "..."
    return "|".join(sorted(path.name[:-5] for path in files(CONF).joinpath(key).iterdir() if path.name[-5:] == ".yaml"))


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
