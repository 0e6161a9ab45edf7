"""Read the pictures of items: files, URLs, or cells of a table."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

from clipx.data.captions import check_captions
from clipx.data.prepare.cells import Cell, read_cell, read_cells
from clipx.data.prepare.download import Download, is_url
from clipx.data.prepare.encode import Encoded, read_file
from clipx.data.prepare.layouts import Item
from clipx.data.sample import BadSample

Read = Callable[[], bytes]  # raises BadSample
Encode = Callable[[bytes], Encoded]


def encode_all(items: list[Item], root: Path, encode: Encode, download: Download) -> Iterator[Encoded | BadSample]:
    """Yield the encoded picture of each item or its error, in order; URLs use one thread per connection."""
    if not any(is_url(item.picture) for item in items):
        yield from (encode_one(item, read, encode) for item, read in zip(items, readers(root, items), strict=True))
        return
    with download.pool() as pool, ThreadPoolExecutor(download.connections) as threads:
        reads = [
            partial(download.fetch, pool, item.picture) if is_url(item.picture) else read
            for item, read in zip(items, readers(root, items), strict=True)
        ]
        yield from threads.map(encode_one, items, reads, [encode] * len(items))


def encode_one(item: Item, read: Read, encode: Encode) -> Encoded | BadSample:
    try:
        captions = non_empty_captions(item)
        if not captions:
            raise BadSample("has no caption")
        check_captions(captions)
        return encode(read())
    except BadSample as error:
        return error


def non_empty_captions(item: Item) -> list[str]:
    """Return the stripped captions that are not empty."""
    return [caption.strip() for caption in item.captions if caption.strip()]


def readers(root: Path, items: Iterable[Item]) -> Iterator[Read]:
    """Yield a function that reads the picture of each item, in order; table rows are read by group."""
    for _, some in groupby(items, lambda item: group_of(item.picture)):
        pictures = [item.picture for item in some]
        yield from (partial(read_file, root, picture) for picture in pictures if isinstance(picture, str))
        if cells := [picture for picture in pictures if isinstance(picture, Cell)]:  # then all are
            yield from (partial(read_cell, root, value) for value in read_cells(root, cells))


def group_of(picture: str | Cell) -> tuple[str, int] | None:
    """Return the row group of a picture; None for files and URLs."""
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
