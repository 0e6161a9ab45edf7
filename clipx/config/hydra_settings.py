"""Hydra settings in the user's YAML files: obeyed or refused as on the command line, before Hydra acts on them."""

from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from clipx.config.arguments import HYDRA_OVERRIDES, key_of, option_values
from clipx.config.help import config_dirs
from clipx.config.meaning import CONF, flatten
from clipx.config.mistyped import check_hydra_key
from clipx.config.resolve import to_dict

SET_BY_HYDRA = ("runtime", "overrides", "job.override_dirname", "job.config_name")


def find_run_dir(name: str, location: str, options: Sequence[str], overrides: Sequence[str]) -> Path:
    """The directory that Hydra will create for a single run.

    Args:
        name: of the primary config.
        location: of that config: a package, as ``pkg://NAME``, or a directory.
        options: Hydra's switches with their values.
        overrides: in Hydra's grammar.

    Raises:
        UserError: a file has a setting without effect.
    """
    own = config_dirs(options)
    keys = {key_of(override) for override in overrides}
    if not own and not keys & {"hydra.run.dir", "hydra.searchpath"}:
        return Path()  # then all settings are clipx's
    names = option_values(options, "--config-name", "-cn")
    root, main = location, names[-1] if names else name
    searchpath = [f"file://{folder.absolute()}" for folder in own]
    ours = [] if location == f"pkg://{CONF}" else [f"pkg://{CONF}"]  # clipx's options, for a run's saved config
    if home := next((folder for folder in own if names and (folder / f"{main}.yaml").is_file()), None):
        root, searchpath = str(home.absolute()), [*searchpath, location]  # its primary config
    parser = OverridesParser.create()
    single = [override for override in overrides if not parser.parse_override(override).is_sweep_override()]
    try:
        composed = compose(main, root, [*searchpath, *ours], single)
        after = flatten(to_dict(composed.hydra))
        directory = Path(composed.hydra.run.dir)
    except (HydraException, OmegaConfBaseException):
        return Path()  # Hydra will raise it
    before = flatten(to_dict(compose(name, location, ours, []).hydra))
    for key, value in after.items():
        set_by_hydra = any(f"{key}.".startswith(f"{prefix}.") for prefix in SET_BY_HYDRA)
        if not set_by_hydra and before.get(key) != value:
            check_hydra_key(f"hydra.{key}", f", as a file of {', '.join(map(str, own)) or 'yours'} sets it,")
    return directory


def compose(name: str, location: str, searchpath: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    """Compose a config with Hydra's settings, including clipx's directories."""
    package = location.removeprefix("pkg://")
    initialized = (
        hydra.initialize_config_module(package, version_base="1.3")
        if package != location
        else hydra.initialize_config_dir(location, version_base="1.3")
    )
    with initialized:
        own = [f"hydra.searchpath=[{','.join(searchpath)}]"] if searchpath else []
        return hydra.compose(name, [HYDRA_OVERRIDES[0], *own, *overrides], return_hydra_config=True)
