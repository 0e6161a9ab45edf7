"""Download pictures, with limits on connections, time and bytes."""

import re
import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TypeGuard

from urllib3 import PoolManager, Retry
from urllib3.exceptions import HTTPError

from clipx.data.sample import BadSample

MAX_BYTES = 64 << 20  # of a picture
MAX_TIMEOUTS = 6  # limit of a whole download, in timeouts
AGENT = {"User-Agent": "Mozilla/5.0 (compatible; clipx)", "Accept": "image/*"}
RETRIES = 2
BUSY = (429, 500, 502, 503, 504)  # status codes to retry


@dataclass(frozen=True)
class Download:
    """Settings of downloads."""

    connections: int = 64  # parallel, over all processes
    timeout: float = 10.0  # seconds to wait for a server

    def shared_by(self, processes: int) -> "Download":
        """Return the settings for one of ``processes``."""
        return replace(self, connections=max(1, self.connections // processes))

    def pool(self) -> PoolManager:
        """Open the connection pool of one process."""
        again = Retry(
            total=None,
            connect=RETRIES,
            read=RETRIES,
            status=RETRIES,
            redirect=5,
            other=0,
            backoff_factor=0.5,
            status_forcelist=BUSY,
            raise_on_status=False,
            respect_retry_after_header=False,
        )
        return PoolManager(self.connections, AGENT, maxsize=self.connections, retries=again, timeout=self.timeout)

    def fetch(self, pool: PoolManager, url: str) -> bytes:
        """Download a URL.

        Raises:
            BadSample: it cannot be downloaded; the reason follows a colon.
        """
        data, deadline = bytearray(), time.monotonic() + MAX_TIMEOUTS * self.timeout
        try:
            with closing(pool.request("GET", url, preload_content=False)) as response:
                if response.status != 200:
                    raise BadSample(f"unreachable: HTTP {response.status}")
                if {"noai", "noimageai"} & set(re.split(r"[\s,:]+", response.headers.get("X-Robots-Tag", "").lower())):
                    raise BadSample("unreachable: its owner asks not to be trained on (X-Robots-Tag)")
                while piece := response.read1(1 << 16):
                    data += piece
                    if len(data) > MAX_BYTES:
                        raise BadSample(f"is too large: more than {MAX_BYTES >> 20} MB")
                    if time.monotonic() > deadline:
                        raise BadSample("unreachable: too slow")
        except (HTTPError, UnicodeError) as error:
            raise BadSample(f"unreachable: {type(getattr(error, 'reason', None) or error).__name__}") from error
        return bytes(data)


def is_url(picture: object) -> TypeGuard[str]:
    return isinstance(picture, str) and picture.startswith(("http://", "https://"))
