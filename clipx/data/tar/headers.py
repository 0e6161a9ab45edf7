"""Tar headers (ustar, GNU, pax): name, offset and size of each member, without reading its data."""

import os
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path

from clipx.errors import UserError

BLOCK = 512  # bytes of a header; members are padded to multiples of it
MAX_HEADER = 1 << 20  # bytes of a pax or GNU header's data: names and file attributes
MAX_NAME = 1 << 10  # bytes; every row of an index is as wide as the longest name
MAX_SIZE = 1 << 62  # bytes of a member; more than an index can count
ZEROS = 1 << 20  # bytes per read after an end mark
APPLE = b"._"  # prefix of the attribute files that macOS's tar adds

# other files named .tar: first bytes, and what to do
OTHERS = (
    (b"\x1f\x8b", "compressed with gzip; unpack it: gunzip < {0} > NEW.tar"),
    (b"\xfd7zXZ", "compressed with xz; unpack it: xz -d < {0} > NEW.tar"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it: zstd -d < {0} > NEW.tar"),
    (b"BZh", "compressed with bzip2; unpack it: bunzip2 < {0} > NEW.tar"),
    (b"PK\x03\x04", "a zip archive; unpack it and pack the files again as a tar"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file; fetch it: git lfs pull"),
    (b"<!doctype html", "an HTML page, such as servers send in place of a file; download it again"),
    (b"<html", "an HTML page, such as servers send in place of a file; download it again"),
    (b"<?xml", "an XML page, such as servers send in place of a file; download it again"),
)


class DataError(UserError):
    """The data cannot be used as it is."""


class CutShort(Exception):
    """A tar ends before its end mark."""


def members(shard: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, offset and size of each regular file; in a truncated tar, the last may extend past the end.

    Concatenated tars are read to the end; macOS's ``._NAME`` files are left out.

    Raises:
        CutShort: the tar has no end mark, or is empty; all members before the cut have been yielded.
        DataError: a header is corrupt, or the file or what follows its end mark is not a tar.
    """
    end = shard.stat().st_size
    with shard.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        position, count, mark, long_name, long_size = 0, 0, None, None, None
        while position < end:
            header = os.pread(descriptor, BLOCK, position)
            if len(header) == BLOCK and not header.strip(b"\0"):
                mark, position = position, skip_zeros(descriptor, position)
                if position >= end:
                    return
                header = os.pread(descriptor, BLOCK, position)
                if not is_header(header):
                    raise foreign_end(shard, mark, position, end)
            name, size, kind = parse_header(header, shard, count)
            start = position + BLOCK
            if kind in b"xgLK":
                if size > MAX_HEADER:
                    raise damaged(shard, count)
                data = os.pread(descriptor, size, start)
                if len(data) < size:
                    break
                if kind == b"L":
                    long_name = data.rstrip(b"\0")
                elif kind == b"x":
                    long_name, long_size = pax_name_and_size(data, shard, count)
            else:
                size = size if long_size is None else long_size
                if kind in (b"0", b"\0", b"7"):
                    if len(name := long_name or name) > MAX_NAME:
                        raise DataError(
                            f"{shard} has a name of {len(name):,} bytes, more than {MAX_NAME:,}; pack it "
                            "again with shorter ones"
                        )
                    if not name.rpartition(b"/")[2].startswith(APPLE):
                        yield name, start, size
                    count += 1
                long_name, long_size = None, None
            position = start + size + -size % BLOCK
        raise CutShort


def foreign_end(shard: Path, mark: int, position: int, end: int) -> DataError:
    """Say that bytes after the end mark are not a tar."""
    return DataError(
        f"{shard} holds {end - position:,} bytes after its end mark (byte {mark:,}) that are not a tar; pack it again, "
        f"or cut them off: truncate -s {position} {shard}"
    )


def skip_zeros(descriptor: int, position: int) -> int:
    """Return the position of the next block that is not all zeros, or the end of the file."""
    while data := os.pread(descriptor, ZEROS, position):
        if rest := data.lstrip(b"\0"):
            return position + (len(data) - len(rest)) // BLOCK * BLOCK
        position += len(data)
    return position


def is_header(block: bytes) -> bool:
    """Whether the checksum of a tar header matches."""
    # adler32's low half is 1 + the sum of the bytes modulo 65521; the checksum counts its own field as spaces
    try:
        total = int(block[148:156].strip(b"\0 "), 8)
    except ValueError:
        return False
    return len(block) == BLOCK and (total + sum(block[148:156]) - 256 + 1) % 65521 == zlib.adler32(block) & 0xFFFF


def parse_header(header: bytes, shard: Path, count: int) -> tuple[bytes, int, bytes]:
    """Return name, size and type flag of a tar header, after checking its checksum."""
    if len(header) < BLOCK and count:
        raise CutShort
    if not is_header(header):
        raise damaged(shard, count)
    try:
        large = header[124] & 0x80  # GNU's way to write 8 GB and more
        size = int.from_bytes(header[125:136], "big") if large else int(header[124:136].strip(b"\0 ") or b"0", 8)
        if not 0 <= size < MAX_SIZE:
            raise ValueError
    except (ValueError, IndexError):
        raise damaged(shard, count) from None
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name, size, header[156:157]


def pax_name_and_size(data: bytes, shard: Path, count: int) -> tuple[bytes | None, int | None]:
    """Return path and size of the next member from the ``length key=value`` records of a pax header."""
    fields, place = {}, 0
    try:
        while place < len(data):
            begin = data.index(b" ", place) + 1
            end = place + int(data[place : begin - 1])
            key, equals, value = data[begin:end].partition(b"=")
            if not equals or not begin < end <= len(data):
                raise ValueError
            fields[key], place = value[:-1], end
        size = int(fields[b"size"]) if b"size" in fields else None
        if size is not None and not 0 <= size < MAX_SIZE:
            raise ValueError
    except ValueError:
        raise damaged(shard, count) from None
    return fields.get(b"path"), size


def damaged(shard: Path, count: int) -> DataError:
    if not count:
        with shard.open("rb") as file:
            begin = file.read(64).lstrip().lower()
        found = next((what for mark, what in OTHERS if begin.startswith(mark.lower())), None)
        told = f": it is {found.format(shlex.quote(str(shard)))}" if found else "; leave it out, or pack it again"
        return DataError(f"{shard} is not a tar{told}")
    return DataError(
        f"{shard} is corrupt after member {count:,}; the rest is unreadable; pack it again, or leave it out of "
        "data.shards"
    )
