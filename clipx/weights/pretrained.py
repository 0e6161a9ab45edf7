"""Initial weights of towers that other libraries trained."""

from collections.abc import Collection
from pathlib import Path

from clipx.errors import first_line
from clipx.models.clip import CLIP
from clipx.weights.archive import CheckpointError, read_file
from clipx.weights.foreign import find_state_dict


def load_pretrained(model: CLIP, without: Collection[str] = ()) -> str:
    """Load the weights that ``model.image.pretrained`` and ``model.text.pretrained`` name, but for some towers.

    Returns:
        A description for the log; empty without any.

    Raises:
        CheckpointError: they cannot be read or downloaded, or are of another model.
    """
    loaded = []
    for name, tower in model.towers.items():
        if name in without or not tower.pretrained:
            continue
        key = f"model.{name}.pretrained={'true' if tower.pretrained is True else tower.pretrained}"
        path = Path(tower.pretrained).expanduser() if isinstance(tower.pretrained, str) else None
        if path and not path.exists():
            raise CheckpointError(f"{key}: there is no such file")
        try:
            tower.load_trunk(find_state_dict(read_file(path), path) if path else None)
        except OSError as error:
            raise CheckpointError(
                f"{key}: the weights cannot be downloaded ({first_line(error)}); on another machine, fetch them from "
                f"{tower.source}, then set model.{name}.pretrained=FILE"
            ) from error
        except (ValueError, RuntimeError) as error:  # names or shapes
            raise CheckpointError(f"{key} does not fit: {str(error).splitlines()[-1].strip()}") from error
        loaded.append(f"of the {name} tower from {path or tower.source}")
    return ", ".join(loaded)
