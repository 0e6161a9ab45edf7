"""Files on servers: their bytes, sizes and names, and what is tried again when a server fails.

Every way to fail becomes an ``OSError``: ``FileNotFoundError`` and ``PermissionError`` where another try would end in
the same way, ``ConnectionError`` where it may not.
"""

import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from threading import Event
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from clipx.data.tar.headers import DataError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

logger = logging.getLogger("clipx")

PIPE = "pipe:"
WAITS = (1, 3, 10, 30, 60, 120)     # seconds before another try
SILENCE = timedelta(seconds=30)     # without a byte, after which a server counts as failed
LONGEST = timedelta(days=1)         # of one copy
PAUSE = 0.5                         # seconds between two looks at a copy
GRACE = 0.25                        # seconds that a copy has to end when the run does
BLOCK = 1 << 20                     # bytes
METADATA = "169.254.169.254"        # asked for credentials by machines in a cloud; elsewhere nobody answers there
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS=FILE, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true for a public one",
}

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")


def download(url: str, part: Path, stopped: Event, most: int) -> None:
    """Write the bytes of a URL into a file.

    Raises:
        DataError: there are more than ``most`` bytes, or ``stopped`` is set.
        OSError: the server, or the command of a pipe, fails.
    """
    size = 0
    with part.open("wb") as file:
        for block in blocks(url):
            size += file.write(block)
            if stopped.is_set():
                raise DataError("nothing is copied any more")
            if size > most:
                raise DataError(f"{url} gives more than {most:,} bytes, what it should have or data.cache_gb has room "
                                "for")


def blocks(url: str) -> Iterator[bytes]:
    """The bytes of a URL, block by block."""
    if url.startswith(PIPE):
        from webdataset.gopen import gopen

        with gopen(url) as source:
            yield from iter(partial(source.read, BLOCK), b"")
        return
    store, name = open_store(url)
    with failures(url):
        for block in store.get(name).stream(min_chunk_size=BLOCK):
            yield memoryview(block)


def size_of(url: str) -> int:
    """The bytes of a file, as its server says."""
    store, name = open_store(url)
    with failures(url):
        return store.head(name)["size"]


def list_matches(pattern: str) -> list[str]:
    """The URLs of a bucket that a glob stands for, sorted; ``*`` does not reach across a slash.

    Raises:
        DataError: it is not a bucket; a web server does not list its files.
    """
    if pattern.startswith("http"):
        raise DataError(f"{pattern}: a web server does not list its files; write out their numbers, {{00000..00041}}")
    root = re.split(r"/[^/]*[*?\[]", pattern, maxsplit=1)[0]
    wanted = PurePosixPath(pattern[len(root) + 1 :])
    store, _ = open_store(f"{root}/")
    with failures(pattern):
        names = [PurePosixPath(entry["path"]) for page in store.list() for entry in page]
    found = [name for name in names if len(name.parts) == len(wanted.parts) and name.match(str(wanted))]
    return sorted(f"{root}/{name}" for name in found)


def open_store(url: str) -> "tuple[ObjectStore, str]":
    """The directory of a URL as an object store, and the file's name in it.

    Raises:
        DataError: nothing opens such a URL, or obstore is not installed.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import HTTPStore, from_url
    except ImportError as error:
        raise DataError(f'{url} needs obstore, which is not installed; pip install "clipx[remote]"') from error
    path, mark, query = url.partition("?")                  # a signed URL's signature
    directory, _, name = path.rpartition("/")
    web = url.startswith("http")
    make = HTTPStore.from_url if web else from_url          # an https URL of a bucket needs no credentials
    client = {"allow_http": True, "connect_timeout": SILENCE, "read_timeout": SILENCE, "timeout": LONGEST}
    try:
        store = make(directory + mark + query, client_options=client, retry_config={"max_retries": 0})
    except BaseError as error:
        raise DataError(f"{url} cannot be opened: {first_line(error)}; http(s)://, s3://, gs:// and az:// can be"
                        ) from error
    return store, unquote(name) if web else name


@contextmanager
def failures(url: str) -> Iterator[None]:
    """Turn what obstore raises into an ``OSError`` with a reason of one line; a ``DataError`` ends the run at once."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        answer = re.search(r"status code: ((\d+)[^:<\n]*)", str(error))
        status = int(answer[2]) if answer else 0
        kind = url.partition("://")[0]
        if METADATA in str(error) or (status == 401 and kind != "http"):
            raise PermissionError(f"no credentials; {CREDENTIALS.get(kind, 'a signed URL carries its own')}") from error
        if "Content-Length Header missing" in str(error):
            raise DataError(f"{url}: its server does not say how long it is; copy it by other means") from error
        if "incorrectly configured region" in str(error):
            raise PermissionError("the bucket is in another region; set AWS_REGION") from error
        reason = f"HTTP {answer[1].strip()}" if answer else first_line(error).rpartition(" - ")[2]
        if status in (404, 410) or (isinstance(error, FileNotFoundError) and not status):
            raise FileNotFoundError(reason) from error
        if 400 <= status < 500 and status not in (408, 429):
            raise PermissionError(reason) from error
        raise ConnectionError(reason) from error


def run_with_retries(
    pool: ThreadPool, function: Callable[[Item], Result], items: Mapping[Item, str], stopped: Event
) -> dict[Item, Result]:
    """What a function gives for some items, side by side; what fails is tried again after growing waits.

    Args:
        pool: works.
        function: of an item; an OSError that does not last is worth another try.
        items: with their URLs.
        stopped: ends it.

    Raises:
        DataError: an item fails for good, or all too often.
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
            for job in jobs.values():       # they end with the next bytes that come
                job.wait(GRACE)
            raise DataError("nothing is copied any more")
        if not errors:
            break
        item = next((item for item, error in errors.items() if is_permanent(error)), next(iter(errors)))
        error = errors[item]
        if isinstance(error, DataError):
            raise error
        if wait is None or is_permanent(error):
            raise DataError(
                f"{items[item]} cannot be copied ({error_reason(error)}); when it can be, rerun the same command to "
                "resume from the last checkpoint"
            ) from error
        logger.warning("%s cannot be copied (%s); trying again in %g s", items[item], error_reason(error), wait)
        stopped.wait(wait)
    return found


def is_permanent(error: BaseException) -> bool:
    """Whether another try would end in the same way."""
    return isinstance(error, (DataError, FileNotFoundError, PermissionError))


def error_reason(error: BaseException) -> str:
    return first_line(error) or type(error).__name__


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
