"""Hydra's own settings in files of the user's: obeyed or refused as on the command line, before Hydra acts on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipx.config import arguments
from clipx.config.help import config_dirs
from clipx.config.meaning import CONF, flatten
from clipx.config.mistyped import check_hydra

NOTED = ("runtime", "overrides", "job.override_dirname", "job.config_name")     # what Hydra itself writes there


def look_ahead(name: str, place: str, options: Sequence[str], overrides: Sequence[str]) -> Path:
    """The directory that Hydra will make for a run alone.

    Args:
        name: of the primary config.
        place: a package, as ``pkg://NAME``, or a directory that has it.
        options: Hydra's switches with their values.
        overrides: in Hydra's grammar.

    Raises:
        UserError: a file sets what has no effect.
    """
    own = config_dirs(options)
    keys = {arguments.key_of(word) for word in overrides}
    if not own and not keys & {"hydra.run.dir", "hydra.searchpath"}:
        return Path()                   # then the settings are those that clipx comes with
    names = [after for before, after in zip(options, options[1:], strict=False) if before in ("-cn", "--config-name")]
    root, main = place, names[-1] if names else name
    places = [f"file://{folder.absolute()}" for folder in own]
    start = [] if place == f"pkg://{CONF}" else [f"pkg://{CONF}"]       # of a run's own config, our options
    if home := next((folder for folder in own if names and (folder / f"{main}.yaml").is_file()), None):
        root, places = str(home.absolute()), [*places, place]       # where compose looks for the primary config
    parser = OverridesParser.create()
    single = [word for word in overrides if not parser.parse_override(word).is_sweep_override()]
    try:
        composed = compose(main, root, [*places, *start], single)
        after = flatten(OmegaConf.to_container(composed.hydra, resolve=False))
        directory = Path(composed.hydra.run.dir)
    except (HydraException, OmegaConfBaseException):
        return Path()                   # Hydra will explain it
    before: dict[str, Any] = flatten(OmegaConf.to_container(compose(name, place, start, []).hydra, resolve=False))
    for key, value in after.items():
        noted = any(f"{key}.".startswith(f"{one}.") for one in NOTED)
        if not noted and before.get(key) != value:
            check_hydra(f"hydra.{key}", f", as a file of {', '.join(map(str, own)) or 'yours'} sets it,")
    return directory


def compose(name: str, place: str, places: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    """A config with Hydra's settings, and clipx's directories among them."""
    package = place.removeprefix("pkg://")
    start = (hydra.initialize_config_module(package, version_base="1.3") if package != place
             else hydra.initialize_config_dir(place, version_base="1.3"))
    with start:
        found = [f"hydra.searchpath=[{','.join(places)}]"] if places else []
        return hydra.compose(name, [arguments.HYDRA[0], *found, *overrides], return_hydra_config=True)
