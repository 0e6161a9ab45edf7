"""Remote data sets in CLIP_benchmark's layout: where their shards are, and copies of their text files."""

import re
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Event
from typing import NamedTuple

from clipx.data.files import CLASS_NAMES, DATASET_TYPE, TEMPLATES, write_atomic
from clipx.data.remote.sizes import fetch, fetch_small
from clipx.data.remote.stores import run_with_retries
from clipx.data.tar.headers import DataError

HUB = re.compile(r"(https://huggingface\.co/datasets/[^/]+/([^/]+))(?:/(?:tree|resolve)/([^/]+))?")
COUNT = "{}/nshards.txt"  # the number of shards of a split
MAX_SHARDS = 100_000  # of a split


class RemoteSet(NamedTuple):
    """A data set on a server."""

    name: str
    url: str  # of its directory
    query: str  # of its files, such as a signature

    @classmethod
    def at(cls, url: str) -> "RemoteSet":
        """The data set at a URL, which may be that of its page on Hugging Face."""
        place, mark, query = url.partition("?")
        place = place.rstrip("/")
        if hub := HUB.fullmatch(place):
            return cls(hub[2], f"{hub[1]}/resolve/{hub[3] or 'main'}", mark + query)
        return cls(place.rpartition("/")[2], place, mark + query)

    def file(self, name: str) -> str:
        return f"{self.url}/{name}{self.query}"

    def shards(self, split: str, texts: Path) -> str | None:
        """The shards of a split, as a brace list; None if it has none.

        Args:
            split: ``test`` or ``train``.
            texts: the directory that ``copy_texts`` has filled.

        Raises:
            DataError: what says how many there are is not a number.
        """
        path = texts / COUNT.format(split)
        if not path.exists():
            return None
        count = path.read_text(encoding="utf-8", errors="replace").strip()
        if not (count.isascii() and count.isdecimal() and 0 < int(count) <= MAX_SHARDS):
            shown = count.partition("\n")[0][:40]
            raise DataError(f"sets={self.url}: {COUNT.format(split)} is not a number of shards but {shown!r}")
        return self.file(f"{split}/{{0..{int(count) - 1}}}.tar")


def copy_texts(remote: RemoteSet, texts: Path) -> None:
    """Copy the text files of a data set to a directory; a second time it asks no server.

    Raises:
        DataError: it is not in the layout, or its server fails.
    """
    count = COUNT.format("test")  # written last
    if (texts / count).exists():
        return
    names = {remote.file(name): name for name in (DATASET_TYPE, CLASS_NAMES, TEMPLATES, COUNT.format("train"), count)}

    def fetch_text(url: str) -> bytes | None:
        if names[url] != count:
            return fetch_small(url)
        try:
            return fetch(url)
        except FileNotFoundError as error:
            what = f"there is no {count}, the number of shards in CLIP_benchmark's layout"
            raise DataError(f"sets={remote.url}: {what}") from error

    with ThreadPool(len(names)) as pool:
        contents = run_with_retries(pool, fetch_text, names, Event())
    for url, name in names.items():
        content = contents[url]
        if content is not None:
            (texts / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(texts / name, content)
