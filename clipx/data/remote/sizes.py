"""Ask servers for the size and the number of samples of remote shards; answers are cached."""

import json
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Event

from tqdm import tqdm

from clipx.data.files import DATASET_TYPE, write_atomic
from clipx.data.remote.cache import Cache, RemoteShard
from clipx.data.remote.stores import PIPE, download, run_with_retries, size_of
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import COUNTS, FORMAT, read_head, successes

ASKED = 64  # parallel requests
MAX_SIDECAR = 64 << 20  # bytes of an index or stats file on a server
KNOWN = f"remote-{FORMAT}.json"  # cache file of one remote directory


def ask_all(urls: Sequence[str], cache: Cache) -> list[list[int]]:
    """Return bytes and COUNTS of remote shards, from the cache or from their servers.

    Raises:
        DataError: a server does not answer, or a shard without an index or stats file cannot be copied.
    """
    remotes = [cache.remote(url) for url in urls]
    known = {place: read_known_rows(place) for place in {remote.index.parent for remote in remotes}}
    for place in known:
        place.mkdir(parents=True, exist_ok=True)
    missing = [remote for remote in dict.fromkeys(remotes) if remote.path.name not in known[remote.index.parent]]
    places = {remote.index.parent: remote for remote in remotes if not remote.url.startswith(PIPE)}
    untyped = [remote for place, remote in places.items() if not (place / DATASET_TYPE).exists()]
    with ThreadPool(ASKED) as pool, tqdm(total=len(missing), unit="shard", desc="ask", disable=None) as bar:
        run_with_retries(pool, fetch_dataset_type, untyped, Event())
        for start in range(0, len(missing), ASKED):
            some = missing[start : start + ASKED]
            answers = run_with_retries(pool, ask, some, Event())
            cache.fetch_now([answer for answer in answers.values() if isinstance(answer, RemoteShard)])
            for remote, answer in answers.items():
                row = index_row(remote.index) if isinstance(answer, RemoteShard) else answer
                known[remote.index.parent][remote.path.name] = row
            for place in {remote.index.parent for remote in some}:
                write_atomic(place / KNOWN, json.dumps(known[place]).encode())
            bar.update(len(some))
    return [known[remote.index.parent][remote.path.name] for remote in remotes]


def read_known_rows(place: Path) -> dict[str, list[int]]:
    """Read the cached bytes and COUNTS of the shards of a remote directory, by name."""
    return json.loads((place / KNOWN).read_bytes()) if (place / KNOWN).exists() else {}


def ask(remote: RemoteShard) -> list[int] | RemoteShard:
    """Return bytes and COUNTS of a remote shard; or, without an index or stats file, the shard with its size if known.

    Raises:
        DataError: obstore is not installed.
        OSError: the server fails.
    """
    if not remote.url.startswith(PIPE) and not remote.index.exists():
        found = fetch_small(sibling_url(remote.url, remote.index.name))
        if found is not None:
            write_atomic(remote.index, found)
    if remote.index.exists() and read_head(remote.index).get("format") == FORMAT:
        return index_row(remote.index)
    if remote.url.startswith(PIPE):
        return remote
    stats = fetch_small(sibling_url(remote.url, f"{remote.path.stem}_stats.json"))
    size, count = size_of(remote.url), successes(stats or b"")
    return replace(remote, size=size) if count is None else [size, count, count, count, 0, 0]


def fetch_dataset_type(remote: RemoteShard) -> None:
    """Cache CLIP_benchmark's dataset_type.txt of a remote directory, next to its shards or one level up.

    Raises:
        OSError: the server fails.
    """
    urls = [sibling_url(remote.url, DATASET_TYPE)]
    directory, mark, query = remote.url.partition("?")
    directory = directory.rpartition("/")[0]
    if "/" in directory.partition("://")[2]:  # not the root of a server or bucket
        urls.append(sibling_url(f"{directory}{mark}{query}", DATASET_TYPE))
    answers = filter(None, map(fetch_small, urls))
    write_atomic(remote.index.parent / DATASET_TYPE, next(answers, b""))


def index_row(index: Path) -> list[int]:
    head = read_head(index)
    return [int(head[name]) for name in ("bytes", *COUNTS)]


def sibling_url(url: str, name: str) -> str:
    """Return the URL of another file in the same directory."""
    path, mark, query = url.partition("?")
    return f"{path.rpartition('/')[0]}/{name}{mark}{query}"


def fetch_small(url: str) -> bytes | None:
    """Download a small file; None if it is missing or forbidden."""
    try:
        return fetch(url)
    except (DataError, FileNotFoundError, PermissionError):
        return None


def fetch(url: str) -> bytes:
    """Download a small file.

    Raises:
        DataError: it is large.
        OSError: the server fails.
    """
    with NamedTemporaryFile() as part:
        download(url, Path(part.name), Event(), MAX_SIDECAR)
        return part.read()
