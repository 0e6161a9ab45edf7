"""Captions out of the members of a sample."""

import json
from collections.abc import Mapping

from clipx.data.sample import BadSample, check_bytes

JSON_KEY = "caption"        # what prepare writes
MOST_WORDS = 1 << 20        # bytes of a .txt or .json
MOST_CAPTION = 1 << 14      # bytes; a word of so many letters takes the tokenizer 4 s, and twice as many 4 times that


def read_captions(members: Mapping[str, bytes], key: str | None) -> list[str]:
    """The captions of a sample, one or many.

    Args:
        members: the sample's ``txt`` or ``json``, undecoded.
        key: the key of ``json`` that holds one caption or a list of them; without one, ``txt`` counts, and where
            there is none, the ``caption`` of ``json``.

    Raises:
        BadSample: there is no caption, or it is not UTF-8 text, or too large.
    """
    try:
        if key is None and "txt" in members:
            found = members["txt"].decode()
        elif "json" in members:
            found = json.loads(members["json"])[key or JSON_KEY]
        else:
            raise BadSample("has no caption (.txt or .json)")
    except UnicodeDecodeError as error:
        raise BadSample("its caption is not UTF-8") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSample(f"its json has no {key or JSON_KEY!r}") from error
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample("its caption is neither text nor a list of texts")
    captions = [caption.strip() for caption in captions if caption.strip()]
    if not captions:
        raise BadSample("its caption is empty")
    return checked(captions)


def checked(captions: list[str]) -> list[str]:
    """The captions; BadSample where one is too large."""
    check_bytes("its caption", max(len(caption.encode("utf-8", "replace")) for caption in captions), MOST_CAPTION)
    return captions
