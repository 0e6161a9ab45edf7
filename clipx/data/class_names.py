"""Class names: from a file, from classnames.txt next to shards, or from open_clip."""

import importlib.util
from pathlib import Path
from types import ModuleType

from clipx.data.files import read_lines


def read_names(place: str, key: str) -> list[str]:
    """Read class names, one per line; ``imagenet`` is OpenAI's list of 1,000, from open_clip."""
    if place == "imagenet":
        return list(open_clip_metadata().IMAGENET_CLASSNAMES)
    path = Path(place).expanduser()
    if not path.is_file():
        raise ValueError(f"{key}={place}: there is no such file; expected class names, one per line, or imagenet")
    return read_lines(path, key)


def plain(name: str) -> str:
    """Turn an identifier into words."""
    return name.replace("_", " ")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def open_clip_metadata() -> ModuleType:
    """Import open_clip's class names and templates alone; the whole package takes six seconds."""
    package = importlib.util.find_spec("open_clip")
    file = Path(package.origin).with_name("zero_shot_metadata.py")
    spec = importlib.util.spec_from_file_location("clipx.open_clip_metadata", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_classnames_file(directory: Path, key: str) -> list[str]:
    """Read classnames.txt next to the tars or, as in CLIP_benchmark, one level up."""
    listings = [place / "classnames.txt" for place in (directory, directory.absolute().parent)]
    listing = next(filter(Path.is_file, listings), None)
    if listing is None:
        raise ValueError(f"{key} has no value, and there is no {listings[0]} nor one in its parent; set "
                         "classes=FILE, one name per line")
    return read_lines(listing, key)
