"""Pictures by URL: bounded in connections, time and bytes, and told why where they are not to be had."""

import re
import time
from contextlib import closing
from dataclasses import dataclass, replace

from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError

from clipx.data.sample import BadSample

MAX_BYTES = 64 << 20       # of a picture
MAX_TIMEOUTS = 6           # a whole download may take so many times what a single wait may
AGENT = {"User-Agent": "Mozilla/5.0 (compatible; clipx)", "Accept": "image/*"}
BUSY = (429, 500, 502, 503, 504)    # answers after which it is worth asking again


@dataclass(frozen=True)
class Download:
    """How pictures are fetched."""

    connections: int = 64   # at once, all processes together
    timeout: float = 10.0   # seconds that a server may be silent
    retries: int = 2

    def shared_by(self, processes: int) -> "Download":
        """The part of one of some processes."""
        return replace(self, connections=max(1, self.connections // processes))

    def pool(self) -> PoolManager:
        """Connections for one process."""
        again = Retry(total=None, connect=self.retries, read=self.retries, status=self.retries, redirect=5, other=0,
                      backoff_factor=0.5, status_forcelist=BUSY, raise_on_status=False,
                      respect_retry_after_header=False)
        return PoolManager(self.connections, AGENT, maxsize=self.connections, retries=again,
                           timeout=Timeout(self.timeout, self.timeout))

    def fetch(self, pool: PoolManager, url: str) -> bytes:
        """The file behind a URL.

        Raises:
            BadSample: there is none; the reason stands behind a colon.
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


def is_url(picture: object) -> bool:
    return isinstance(picture, str) and picture.startswith(("http://", "https://"))
