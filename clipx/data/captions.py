"""Read the captions of a sample."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipx.data.files import DATASET_TYPE, find_sidecar
from clipx.data.sample import BadSample, check_bytes

JSON_KEY = "caption"  # what prepare writes
MAX_KEYS = 8  # keys of a json listed in an error,
MAX_SHOWN = 200  # characters of them
MAX_CAPTION_FILE = 1 << 20  # bytes of a .txt or .json
MAX_CAPTION = 1 << 14  # bytes; the tokenizer takes 4 s for one word of this size, and quadratic time


def read_captions(members: Mapping[str, bytes], key: str | None, caption_per_line: bool = False) -> list[str]:
    """Return the captions of a sample, one or many.

    Args:
        members: bytes of the sample's ``txt`` or ``json``.
        key: the key of ``json`` with one caption or a list; None for ``txt``, else ``caption`` of ``json``.
        caption_per_line: whether each line of ``txt`` is a caption; otherwise all of it is one.

    Raises:
        BadSample: there is no caption, it is not UTF-8, or it is too large.
    """
    try:
        if key is None and "txt" in members:
            text = members["txt"].decode()
            found = text.split("\n") if caption_per_line else text
        elif "json" in members:
            found = json_captions(json.loads(members["json"]), key or JSON_KEY)
        else:
            raise BadSample("has no caption (.txt or .json)")
    except UnicodeDecodeError as error:
        raise BadSample("its caption is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadSample("its json cannot be read") from error
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample("its caption is neither text nor a list of texts")
    captions = [caption.strip() for caption in captions if caption.strip()]
    if not captions:
        raise BadSample("its caption is empty")
    return check_captions(captions)


def json_captions(content: Any, key: str) -> Any:
    """Return the value of a key in a json; raises BadSample without that key."""
    if not isinstance(content, dict):
        raise BadSample(f"its json is not an object with {key!r}")
    if key not in content:
        keys = ", ".join(list(content)[:MAX_KEYS])[:MAX_SHOWN] or "none"
        raise BadSample(f"its json has no {key!r}; its keys: {keys}; name one of them: data.caption_key=KEY")
    return content[key]


def check_captions(captions: list[str]) -> list[str]:
    """Return the captions; raises BadSample if one is too large."""
    check_bytes("its caption", max(len(caption.encode("utf-8", "replace")) for caption in captions), MAX_CAPTION)
    return captions


def caption_per_line(places: Mapping[Path, str]) -> bool:
    """Whether each line of a ``.txt`` is a caption, as in CLIP_benchmark's retrieval sets.

    Args:
        places: directories of the shards, in which dataset_type.txt may be, and their names in messages.

    Raises:
        ValueError: only some of the shards have one caption per line.
    """
    of_retrieval = {name: dataset_type(place) == "retrieval" for place, name in sorted(places.items())}
    if len(set(of_retrieval.values())) > 1:
        one, other = (next(name for name, is_so in of_retrieval.items() if is_so is which) for which in (True, False))
        raise ValueError(
            f"shards: {one} has one caption per line (dataset_type.txt) and {other} does not; "
            "make each a source of its own with data=mix"
        )
    return True in of_retrieval.values()


def dataset_type(directory: Path) -> str:
    """Read CLIP_benchmark's dataset_type.txt next to the shards or one level up; empty if missing."""
    file = find_sidecar(directory, DATASET_TYPE)
    return file.read_text(encoding="utf-8", errors="replace").strip().lower() if file else ""
