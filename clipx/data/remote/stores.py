"""Files on servers: contents, sizes, listings, and retries.

Every failure becomes an ``OSError``: ``FileNotFoundError`` and ``PermissionError`` if a retry would be useless,
``ConnectionError`` otherwise.
"""

import errno
import logging
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from threading import Event
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from clipx.data.tar.headers import DataError
from clipx.errors import first_line

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore

logger = logging.getLogger("clipx")

PIPE = "pipe:"
WAITS = (1, 3, 10, 30, 60, 120)  # seconds before each retry
SILENCE = timedelta(seconds=30)  # without a byte, after which a request fails
LONGEST = timedelta(days=1)  # of one copy
PAUSE = 0.5  # seconds between two checks of a copy
GRACE = 0.25  # seconds for a copy to stop when the run ends
BLOCK = 1 << 20  # bytes
METADATA = "169.254.169.254"  # serves credentials on cloud machines; unreachable elsewhere
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS=FILE, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true for a public one",
}

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")


def download(url: str, part: Path, stopped: Event, most: int) -> None:
    """Download a URL to a file.

    Raises:
        DataError: it has more than ``most`` bytes, or ``stopped`` is set.
        OSError: the server, or the command of a pipe, fails.
    """
    size = 0
    with part.open("wb") as file:
        for block in blocks(url):
            size += file.write(block)
            if stopped.is_set():
                raise DataError("copying has stopped")
            if size > most:
                raise DataError(f"{url} has more than {most:,} bytes, its expected size or data.cache_gb")


def blocks(url: str) -> Iterator[bytes | memoryview]:
    """Yield the contents of a URL in blocks."""
    if url.startswith(PIPE):
        from webdataset.gopen import gopen

        with gopen(url) as source:
            yield from iter(partial(source.read, BLOCK), b"")
        return
    with open_store(url) as (store, name):
        for block in store.get(name).stream(min_chunk_size=BLOCK):
            yield memoryview(block)


def size_of(url: str) -> int:
    """Return the size of a remote file, bytes."""
    with open_store(url) as (store, name):
        return store.head(name)["size"]


def list_matches(pattern: str) -> list[str]:
    """Return the sorted URLs of a bucket that match a glob; ``*`` does not match a slash.

    Raises:
        DataError: it is not a bucket; a web server does not list its files.
    """
    if pattern.startswith("http"):
        raise DataError(f"{pattern}: web servers do not list files; give the numbers as {{00000..00041}}")
    root = re.split(r"/[^/]*[*?\[]", pattern, maxsplit=1)[0]
    wanted = PurePosixPath(pattern[len(root) + 1 :])
    with open_store(f"{root}/") as (store, _):
        names = [PurePosixPath(entry["path"]) for page in store.list() for entry in page]
    found = [name for name in names if len(name.parts) == len(wanted.parts) and name.match(str(wanted))]
    return sorted(f"{root}/{name}" for name in found)


@contextmanager
def open_store(url: str) -> "Iterator[tuple[ObjectStore, str]]":
    """Open the directory of a URL as an object store; yield it and the file name.

    Raises:
        DataError: the kind of URL is unknown, or obstore is not installed.
        OSError: reading in the ``with`` block fails.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import HTTPStore, from_url
    except ImportError as error:
        raise DataError(f'{url} needs obstore, which is not installed; pip install "clipx[remote]"') from error
    path, mark, query = url.partition("?")  # a signed URL's signature
    directory, _, name = path.rpartition("/")
    web = url.startswith("http")
    make = HTTPStore.from_url if web else from_url  # an https URL of a bucket needs no credentials
    client: ClientConfig = {
        "allow_http": True, "connect_timeout": SILENCE, "read_timeout": SILENCE, "timeout": LONGEST
    }  # fmt: skip
    try:
        store = make(directory + mark + query, client_options=client, retry_config={"max_retries": 0})
    except BaseError as error:
        raise DataError(
            f"{url} cannot be opened: {first_line(error)}; expected http(s)://, s3://, gs:// or az://"
        ) from error
    try:
        yield store, unquote(name) if web else name
    except (BaseError, FileNotFoundError) as error:
        raise describe_failure(url, error) from error


def describe_failure(url: str, error: Exception) -> Exception:
    """Turn an error of obstore into an ``OSError`` with a one-line reason, or into a ``DataError`` without retry."""
    answer = re.search(r"status code: ((\d+)[^:<\n]*)", str(error))
    status = int(answer[2]) if answer else 0
    kind = url.partition("://")[0]
    if METADATA in str(error) or (status == 401 and kind != "http"):
        return PermissionError(f"no credentials; {CREDENTIALS.get(kind, 'a signed URL carries its own')}")
    if "Content-Length Header missing" in str(error):
        return DataError(f"{url}: the server does not report its size; download it by other means")
    if "incorrectly configured region" in str(error):
        return PermissionError("the bucket is in another region; set AWS_REGION")
    reason = f"HTTP {answer[1].strip()}" if answer else first_line(error).rpartition(" - ")[2]
    if status in (404, 410) or (isinstance(error, FileNotFoundError) and not status):
        return FileNotFoundError(reason)
    if 400 <= status < 500 and status not in (408, 429):
        return PermissionError(reason)
    return ConnectionError(reason)


def run_with_retries(
    pool: ThreadPool, function: Callable[[Item], Result], items: Iterable[Item], stopped: Event
) -> dict[Item, Result]:
    """Apply a function to items in parallel, with retries after growing waits.

    Args:
        pool: threads.
        function: of an item; retried on an OSError that is not permanent.
        items: distinct; as text, their URLs.
        stopped: set to cancel.

    Raises:
        DataError: an item fails permanently, or after all retries.
    """
    found: dict[Item, Result] = {}
    for wait in (*WAITS, None):
        jobs = {item: pool.apply_async(function, (item,)) for item in items if item not in found}
        errors: dict[Item, Exception] = {}
        for item, job in jobs.items():
            while not job.ready() and not stopped.is_set():
                job.wait(PAUSE)
            if stopped.is_set():
                break
            try:
                found[item] = job.get()
            except (OSError, DataError) as error:
                errors[item] = error
        if stopped.is_set():
            for job in jobs.values():  # they stop at the next block
                job.wait(GRACE)
            raise DataError("copying has stopped")
        if not errors:
            break
        item, worst = max(errors.items(), key=lambda failed: is_permanent(failed[1]))  # the first of its kind
        if isinstance(worst, DataError):
            raise worst
        failure = f"{item} cannot be copied ({first_line(worst)})"
        if wait is None or is_permanent(worst):
            raise DataError(
                f"{failure}; rerun the same command to resume from the last checkpoint once it is available"
            ) from worst
        logger.warning("%s; trying again in %g s", failure, wait)
        stopped.wait(wait)
    return found


def is_permanent(error: BaseException) -> bool:
    """Whether a retry would be useless."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or isinstance(error, (DataError, FileNotFoundError, PermissionError))
