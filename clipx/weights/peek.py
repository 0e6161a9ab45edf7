"""Read a checkpoint's plain values in milliseconds, without torch and without its tensors."""

from io import BytesIO
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

# what unpickling a damaged or foreign file can raise
BROKEN = (
    UnpicklingError,
    BadZipFile,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    IndexError,
    StopIteration,
)


class Placeholder:
    """Stand-in for tensors and their types."""

    def __init__(self, *_: Any):
        pass


class PlainUnpickler(Unpickler):
    """Read plain values and containers; nothing that a file names is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module.partition(".")[0] == "torch":
            return Placeholder
        raise UnpicklingError(f"{module}.{name} does not belong in a checkpoint")

    def persistent_load(self, _key: Any) -> None:
        """Skip the bytes of a tensor."""


def read_config(path: Path) -> dict[str, Any]:
    """Read the run's config from a checkpoint; empty if it cannot be read."""
    config = read_plain(path).get("config")
    return config if isinstance(config, dict) else {}


def read_plain(path: Path) -> dict[str, Any]:
    """Read a checkpoint without its tensors; empty if it cannot be read, which loading it will explain."""
    try:
        with ZipFile(path) as archive:
            entry = next(one for one in archive.infolist() if one.filename.endswith("/data.pkl"))
            if entry.compress_type != ZIP_STORED:
                return {}
            content = PlainUnpickler(BytesIO(archive.read(entry))).load()
    except BROKEN:
        return {}
    return content if isinstance(content, dict) else {}
