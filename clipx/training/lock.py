"""One process at a time trains in a directory, and a directory made for a run that is refused goes again."""

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
def locked(directory: Path) -> Iterator[None]:
    """Be the one process that trains in a directory, which is made if it is not there.

    The lock is the process's own: its children do not inherit it, and the system lifts it when the process ends,
    however that happens.  Other machines see it where the file system supports POSIX locks, as NFS does.  Nobody
    trains in a directory that cannot be written, so there it takes no lock to look at a run that is finished.

    Raises:
        UserError: another process has it.
    """
    with left_as_found(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            file = acquired(directory / "lock")
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            yield
            return
        with file:
            try:
                yield
            finally:
                with suppress(FileNotFoundError):       # with the directory, during the run
                    (directory / "lock").unlink()


def acquired(path: Path) -> TextIO:
    """The lock file, locked.

    Raises:
        UserError: another process has locked it.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            with file:
                file.seek(0)
                raise UserError(f"{path.parent} is in use: {file.read().strip() or 'another process'} trains there; "
                                "wait for it, end it, or train beside it with name=...") from error
        if stands(path, file):
            break
        file.close()        # its owner removed it between the two calls; who comes next would lock another file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},")
    file.flush()
    return file


def stands(path: Path, file: TextIO) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def left_as_found(directory: Path, noted: str | None = None) -> Iterator[None]:
    """Where the ``with`` ends with an error, remove those of a directory and its parents that it has made, if empty.

    Args:
        directory: the deepest of them.
        noted: a file in it that does not count.
    """
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if noted and directory in missing:
                (directory / noted).unlink(missing_ok=True)
            for place in missing:
                place.rmdir()
        raise
