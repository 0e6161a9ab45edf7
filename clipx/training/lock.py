"""One training process per directory; directories created for a refused run are removed."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from clipx.errors import UserError

READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def directory_lock(directory: Path, other: str = "train elsewhere with name=...") -> Iterator[None]:
    """Lock a directory for training or embedding; create it if it is missing.

    Child processes do not inherit the lock, and the system releases it when the process ends for any reason.  Other
    machines see it if the file system supports POSIX locks, as NFS does.  A read-only directory needs no lock: nobody
    can train there, and a finished run can still be reported.

    Args:
        directory: to lock.
        other: how to use another one, for the error.

    Raises:
        UserError: another process holds the lock.
    """
    with remove_created_on_error(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            file = acquire(directory / "lock", other)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            yield
            return
        with file:
            try:
                yield
            finally:
                with suppress(FileNotFoundError):  # the directory may have been deleted during the run
                    (directory / "lock").unlink()


def acquire(path: Path, other: str) -> TextIO:
    """Open and lock the lock file; ``other`` as in ``directory_lock``.

    Raises:
        UserError: another process holds the lock.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            with file:
                file.seek(0)
                raise UserError(
                    f"{path.parent} is in use: {file.read().strip() or 'another process'} works there; "
                    f"wait for it, stop it, or {other}"
                ) from error
        if is_same_file(path, file):
            break
        file.close()  # its owner removed it between open and lock; the next process would lock another file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},")
    file.flush()
    return file


def is_same_file(path: Path, file: TextIO) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def remove_created_on_error(directory: Path, ignored: str | None = None) -> Iterator[None]:
    """On error, remove the empty directories that the ``with`` block created.

    Args:
        directory: the deepest of them; its parents are checked too.
        ignored: a file in it that is removed as well.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if ignored and directory in missing:
                (directory / ignored).unlink(missing_ok=True)
            for path in missing:
                path.rmdir()
        raise
