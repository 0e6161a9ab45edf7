"""Class names and prompts: from a file, from classnames.txt next to shards, or from open_clip."""

from pathlib import Path

from clipx.data.files import CLASS_NAMES, find_sidecar, read_lines
from clipx.data.tar.headers import DataError
from clipx.tokenizer import open_clip_module

NAMED = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}  # in open_clip


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
    listing = find_sidecar(directory, CLASS_NAMES)
    if listing is None:
        raise ValueError(
            f"{key} has no value, and there is no classnames.txt in {directory} or its parent; "
            "set classes=FILE, one name per line"
        )
    return read_lines(listing, key)


def read_templates(given: str | list[str], key: str = "templates") -> list[str]:
    """Return templates with ``{}`` where the class name goes.

    Args:
        given: ``openai``, the 80 of the paper's ensemble; ``simple``, the 7 that OpenAI found sufficient; a file with
            one per line; or the templates themselves, with ``{}`` or ``{c}``.
        key: of the config, for errors.

    Raises:
        ValueError: there are no templates, or one has no ``{}``.
    """
    if isinstance(given, str) and given in NAMED:
        return [template("{}") for template in getattr(open_clip_module("zero_shot_metadata"), NAMED[given])]
    if isinstance(given, str) and "{" not in given:
        if not Path(given).expanduser().is_file():
            raise ValueError(f"{key}={given}: there is no such file of templates; named ones are {' and '.join(NAMED)}")
        found = read_lines(Path(given).expanduser(), key)
    else:
        found = [given] if isinstance(given, str) else given
    found = [template.replace("{c}", "{}") for template in found]
    wrong = [template for template in found if "{}" not in template]
    if wrong or not found:
        raise ValueError(
            f"{key}={given}: {wrong[:1]} has no {{}} for the class name; named templates are {' and '.join(NAMED)}"
        )
    return found


def check_label(label: int, classes: list[str], place: str) -> list[str]:
    """Return the label as a caption.

    Raises:
        DataError: the label is out of range.
    """
    if not 0 <= label < len(classes):
        raise DataError(
            f"{place} has the label {label}, but there are {len(classes)} class names, for 0 to "
            f"{len(classes) - 1}; set the names of this data set: classes=FILE, one name per line"
        )
    return [str(label)]
