"""Features of a frozen tower: one row for each view of each sample, in a memory-mapped file.

The file is a header (one line of JSON, padded to 4,096 bytes), a checksum for each row (uint32, 0 if there is no row
yet), and the rows (fp16).  Processes share it without locks: a row counts only if its checksum is right, so one that
another process is writing, or was writing when it was killed, is as good as missing.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from clipx.data.files import WRITING
from clipx.errors import UserError

FORMAT = 1
HEADER = 4096  # bytes
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Stored(NamedTuple):
    """What a file holds of a chunk's N samples; K of them are known."""

    known: Tensor  # (N,) bool
    features: Tensor  # (K, D) fp16, in order

    @classmethod
    def of(cls, rows: Sequence[np.ndarray | None], width: int) -> "Stored":
        """From the features of N samples, (D,) fp16 or None."""
        known = [row for row in rows if row is not None]
        features = torch.from_numpy(np.stack(known)) if known else torch.empty(0, width, dtype=torch.float16)
        return cls(torch.tensor([row is not None for row in rows], dtype=torch.bool), features)


@dataclass(frozen=True)
class FeatureFile:
    """Features of one tower, by row.  Picklable: each process maps the file itself."""

    path: Path
    rows: int
    width: int  # D

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "rows": self.rows, "width": self.width}

    @cached_property
    def checksums(self) -> np.ndarray:
        """(rows,) uint32."""
        return np.asarray(np.memmap(self.path, "<u4", "r+", HEADER, (self.rows,)))  # indexing a memmap is slow

    @cached_property
    def table(self) -> np.ndarray:
        """(rows, D) fp16."""
        return np.asarray(np.memmap(self.path, "<f2", "r+", HEADER + 4 * self.rows, (self.rows, self.width)))

    def read(self, row: int) -> np.ndarray | None:
        """Return a row, (D,) fp16, or None if it is missing."""
        expected = int(self.checksums[row])
        if not expected:
            return None
        found = self.table[row].copy()
        return found if checksum(found) == expected else None

    def write(self, rows: np.ndarray, features: np.ndarray) -> None:
        """Fill rows: (n,) int64, (n, D) fp16; those that the file does not have are left out."""
        inside = (rows >= 0) & (rows < self.rows)
        rows, features = rows[inside], features[inside]
        self.table[rows] = features
        self.checksums[rows] = [checksum(feature) for feature in features]

    def count(self) -> int:
        """Number of rows that are there."""
        return int(np.count_nonzero(self.checksums))

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return HEADER + self.rows * (4 + 2 * self.width)


def checksum(row: np.ndarray) -> int:
    """Checksum of a row, never 0."""
    return crc32(row.tobytes()) or 1


def open_features(path: Path, rows: int, width: int, about: Mapping[str, Any]) -> FeatureFile:
    """Open a file of features; it is created if it is missing.

    Args:
        path: of the file.
        rows: views times samples.
        width: D, values in a row.
        about: what the features were made from, plain values; another file's must not be equal.

    Raises:
        UserError: the file cannot be written, the disk is full, or the file is damaged or holds other features.
    """
    file = FeatureFile(path, rows, width)
    header = json.dumps({"format": FORMAT, "rows": rows, "width": width, "dtype": "float16", **about}).encode()
    header += b" " * (HEADER - 1 - len(header)) + b"\n"
    assert len(header) == HEADER
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.parent / "lock"):
            if not path.exists():
                create(file, header)
        with path.open("r+b") as opened:
            size, found = os.fstat(opened.fileno()).st_size, opened.read(HEADER)
    except OSError as error:
        raise UserError(
            f"feature_cache={path.parent} cannot be used: {error.strerror}; set feature_cache=DIR, or "
            "feature_cache=null to compute the features of frozen towers each time"
        ) from error
    if size != file.size:
        raise UserError(f"{path} is damaged: it has {size:,} bytes instead of {file.size:,}; {DELETE}")
    if found != header:
        raise UserError(f"{path} is damaged, or holds features of other weights or data; {DELETE}")
    return file


DELETE = "delete it, and the features will be computed again"


def create(file: FeatureFile, header: bytes) -> None:
    """Write a file without rows.  Its space is allocated now, as writing to a mapped file on a full disk is fatal.

    Raises:
        UserError: the disk is full.
    """
    temporary = file.path.with_name(file.path.name + WRITING)
    try:
        with temporary.open("wb") as opened:
            allocate(opened.fileno(), file.size, shutil.disk_usage(file.path.parent).free)
            opened.write(header)
        os.replace(temporary, file.path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        raise UserError(no_room_message(file)) from error


def allocate(descriptor: int, size: int, free: int) -> None:
    """Allocate a file's space on the disk, where the system can; elsewhere compare it with what is free.

    Raises:
        OSError: there is not enough.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    elif size > free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        os.ftruncate(descriptor, size)


def no_room_message(file: FeatureFile) -> str:
    """The error for features that do not fit on the disk."""
    free = shutil.disk_usage(file.path.parent).free
    return (
        f"feature_cache={file.path.parent}: the features of frozen towers need {file.size / 1e9:,.2f} GB, and "
        f"{free / 1e9:,.2f} GB are free; free some space, or set fewer views, feature_cache=DIR on another disk, or "
        "feature_cache=null to compute them each time"
    )


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock, so that one process at a time creates a file."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # of this open file: excludes threads, too
        yield
