"""Read the pictures of items: files, URLs, cells of a table, or members of a tar."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from clipx.data.prepare.caption_rules import CaptionRules
from clipx.data.prepare.cells import Cell, read_cell, read_cells
from clipx.data.prepare.download import Download, is_url
from clipx.data.prepare.encode import Encoded, read_file
from clipx.data.prepare.layouts import Item, Picture
from clipx.data.prepare.members import Member, read_member
from clipx.data.sample import BadSample

Read = Callable[[], bytes]  # raises BadSample
Encode = Callable[[bytes], Encoded]


class Ready(NamedTuple):
    """What goes into a shard."""

    picture: Encoded
    captions: list[str]


def encode_all(
    items: list[Item], root: Path, rules: CaptionRules, encode: Encode, download: Download
) -> Iterator[Ready | BadSample]:
    """Yield the encoded picture and the captions of each item, or its error, in order.

    URLs use one thread per connection.
    """
    if not any(is_url(item.picture) for item in items):
        for item, read in zip(items, readers(root, items), strict=True):
            yield encode_one(item, read, rules, encode)
        return
    with download.pool() as pool, ThreadPoolExecutor(download.connections) as threads:
        reads = [
            partial(download.fetch, pool, item.picture) if is_url(item.picture) else read
            for item, read in zip(items, readers(root, items), strict=True)
        ]
        one = partial(encode_one, rules=rules, encode=encode)
        yield from threads.map(one, items, reads)


def encode_one(item: Item, read: Read, rules: CaptionRules, encode: Encode) -> Ready | BadSample:
    try:
        captions = rules.choose(item.captions)
        return Ready(encode(read()), captions)
    except BadSample as error:
        return error


def readers(root: Path, items: Iterable[Item]) -> Iterator[Read]:
    """Yield a function that reads the picture of each item, in order; table rows are read by group."""
    for _, some in groupby(items, lambda item: group_of(item.picture)):
        pictures = [item.picture for item in some]
        for picture in pictures:
            if isinstance(picture, str):
                yield partial(read_file, root, picture)
            elif isinstance(picture, Member):
                yield partial(read_member, root, picture)
        if cells := [picture for picture in pictures if isinstance(picture, Cell)]:  # then all are
            yield from (partial(read_cell, root, value) for value in read_cells(root, cells))


def group_of(picture: Picture) -> tuple[str, int] | None:
    """Return the row group of a picture; None if it is not in a table."""
    return (picture.file, picture.group) if isinstance(picture, Cell) else None


def content_hashes(root: Path, items: Iterable[Item], workers: int) -> Iterator[bytes | None]:
    """Yield a hash of each picture's bytes; None for unreadable ones, which packing reports."""
    with ThreadPoolExecutor(max(1, workers)) as pool:  # hashing and reading release the GIL
        for _, some in groupby(items, lambda item: group_of(item.picture)):
            yield from pool.map(content_hash, readers(root, some))


def content_hash(read: Read) -> bytes | None:
    try:
        return blake2b(read(), digest_size=16).digest()
    except BadSample:
        return None
