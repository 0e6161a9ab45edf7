"""Class names: from a file, from classnames.txt next to shards, or from open_clip."""

from pathlib import Path

from clipx.data.files import find_sidecar, read_lines
from clipx.tokenizer import open_clip_module


def read_names(place: str, key: str) -> list[str]:
    """Read class names, one per line; ``imagenet`` is OpenAI's list of 1,000, from open_clip."""
    if place == "imagenet":
        return list(open_clip_module("zero_shot_metadata").IMAGENET_CLASSNAMES)
    path = Path(place).expanduser()
    if not path.is_file():
        raise ValueError(f"{key}={place}: there is no such file; expected class names, one per line, or imagenet")
    return read_lines(path, key)


def plain(name: str) -> str:
    """Turn an identifier into words."""
    return name.replace("_", " ")


def read_classnames_file(directory: Path, key: str) -> list[str]:
    """Read classnames.txt next to the tars or, as in CLIP_benchmark, one level up."""
    listing = find_sidecar(directory, "classnames.txt")
    if listing is None:
        raise ValueError(
            f"{key} has no value, and there is no classnames.txt in {directory} or its parent; "
            "set classes=FILE, one name per line"
        )
    return read_lines(listing, key)
