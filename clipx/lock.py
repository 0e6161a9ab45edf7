"""One process at a time trains in a directory."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clipx.errors import UserError


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the one process that trains in a directory, which is made if it is not there.

    The lock is the process's own: its children do not inherit it, and the system lifts it when the process ends,
    however that happens.  Other machines see it where the file system supports POSIX locks, as NFS does.

    Raises:
        UserError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(f"{directory} is in use: {file.read().strip() or 'another process'} trains there; wait for "
                            "it, end it, or train beside it with name=...") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},")
        file.flush()
        try:
            yield
        finally:
            with suppress(FileNotFoundError):       # with the directory, during the run
                (directory / "lock").unlink()
