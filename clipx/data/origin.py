"""Where samples come from: their key, and the file that holds them."""

from typing import NamedTuple, Protocol, runtime_checkable


class Origin(NamedTuple):
    """Where a sample comes from."""

    key: str
    shard: str | None  # path or URL of its tar
    path: str | None  # of its picture, if that is a file of its own


class Locating(Protocol):
    """Any source."""

    def locate(self, sample: int) -> str:
        """Return file and key of a sample, for messages."""


@runtime_checkable
class LocatedSource(Locating, Protocol):
    """A source that knows the files of its samples."""

    def origin(self, sample: int) -> Origin:
        """Return where a sample comes from, without reading it."""


def origin_of(source: Locating, sample: int) -> Origin:
    """Return where a sample comes from: the place that messages name, if the source knows no more."""
    return source.origin(sample) if isinstance(source, LocatedSource) else Origin(source.locate(sample), None, None)
