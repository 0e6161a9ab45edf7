"""Pictures inside tars."""

from pathlib import Path
from typing import NamedTuple

from clipx.data.sample import BadSample


class Member(NamedTuple):
    """A picture inside a tar."""

    file: str  # relative to the layout's root
    key: str
    offset: int  # of its first byte
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.file}/{self.key}"


def read_member(root: Path, member: Member) -> bytes:
    """Read the bytes of a picture.

    Raises:
        BadSample: the tar has become shorter.
        OSError: the tar cannot be read.
    """
    with (root / member.file).open("rb") as file:
        file.seek(member.offset)
        content = file.read(member.size)
    if len(content) < member.size:
        raise BadSample("is lost: its shard is cut short")
    return content
