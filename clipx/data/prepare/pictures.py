"""The pictures of items, wherever they are: files, URLs, or cells of a table."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

from clipx.data.captions import check_captions
from clipx.data.prepare.cells import Cell, read_cells
from clipx.data.prepare.download import Download, is_url
from clipx.data.prepare.encode import Encoded, read_file
from clipx.data.prepare.layouts import Item
from clipx.data.sample import BadSample

Read = Callable[[], bytes]      # raises BadSample
Encode = Callable[[bytes], Encoded]


def encode_all(items: list[Item], root: Path, encode: Encode, download: Download) -> Iterator[Encoded | BadSample]:
    """The picture of each item or why there is none, in order; URLs by as many threads as connections."""
    if not any(is_url(item.picture) for item in items):
        yield from (encode_one(item, read, encode) for item, read in zip(items, readers(root, items), strict=True))
        return
    with download.pool() as pool, ThreadPoolExecutor(download.connections) as threads:
        reads = [partial(download.fetch, pool, item.picture) if is_url(item.picture)
                 else partial(read_file, root, item.picture) for item in items]
        yield from threads.map(encode_one, items, reads, [encode] * len(items))


def encode_one(item: Item, read: Read, encode: Encode) -> Encoded | BadSample:
    try:
        if not spoken(item):
            raise BadSample("has no caption")
        check_captions(spoken(item))
        return encode(read())
    except BadSample as error:
        return error


def spoken(item: Item) -> list[str]:
    """The captions that say something."""
    return [caption.strip() for caption in item.captions if caption.strip()]


def readers(root: Path, items: Iterable[Item]) -> Iterator[Read]:
    """What reads the picture of each item, in order; a table's rows are read a group at a time."""
    for group, some in groupby(items, lambda item: group_of(item.picture)):
        pictures = [item.picture for item in some]
        if group is None:
            yield from (partial(read_file, root, picture) for picture in pictures)
        else:
            yield from (partial(given, file) for file in read_cells(root, pictures))


def group_of(picture: str | Cell) -> tuple[str, int] | None:
    """What is read together with a picture; nothing where it is a file or a URL."""
    return (picture.file, picture.group) if isinstance(picture, Cell) else None


def given(file: bytes | BadSample) -> bytes:
    if isinstance(file, BadSample):
        raise file
    return file


def content_hashes(root: Path, items: Iterable[Item], workers: int) -> Iterator[bytes | None]:
    """A hash of the bytes of each picture; None where there are none, which is told when its shard is packed."""
    with ThreadPoolExecutor(max(1, workers)) as pool:       # hashing and reading let other threads run
        for _, some in groupby(items, lambda item: group_of(item.picture)):
            yield from pool.map(content_hash, readers(root, some))


def content_hash(read: Read) -> bytes | None:
    try:
        return blake2b(read(), digest_size=16).digest()
    except BadSample:
        return None
