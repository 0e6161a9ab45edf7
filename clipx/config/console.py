"""What a command prints on the terminal: log lines above its progress bars, and tables."""

import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TextIO

from tqdm import tqdm


class ClosableStream:
    """A text stream that drops what is written once the terminal or pipe that it writes to has closed.

    Args:
        stream: standard output or error.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.redirect_to_null()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.redirect_to_null()

    def redirect_to_null(self) -> None:
        """Drop the rest, including what Python flushes at exit."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def survive_closed_output() -> Iterator[None]:
    """Keep a command running when its output is closed, as by ``| head``, or was closed from the start."""
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            setattr(sys, name, ClosableStream(stream or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


class ConsoleHandler(logging.Handler):
    """Log lines on the terminal, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        write_line(self.format(record))


def write_line(text: str) -> None:
    tqdm.write(printable(text), file=sys.stderr)


def printable(text: str) -> str:
    """Replace control characters: names of files and samples may come from a stranger."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)


def columns(rows: Sequence[Sequence[str]], align: Literal["<", ">"] = "<") -> list[str]:
    """The lines of a table; ``align`` is that of all columns but the first, which is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"<{widths[0]}", *(f"{align}{width}" for width in widths[1:])]
    return ["  ".join(map(format, row, formats)).rstrip() for row in rows]


def nonzero_rank() -> str:
    """The rank of this process, or "" on rank 0."""
    return os.environ.get("RANK", "0").lstrip("0")


@contextmanager
def log_to_console(sweep: bool = False) -> Iterator[None]:
    """Show clipx's log on the terminal: all of it, warnings of a sweep's jobs, errors of other ranks.

    Args:
        sweep: whether the run is a job of a sweep.
    """
    level = logging.ERROR if nonzero_rank() else logging.WARNING if sweep else logging.INFO
    logger, handler = logging.getLogger("clipx"), ConsoleHandler(level)
    if nonzero_rank():
        handler.setFormatter(logging.Formatter(f"rank {nonzero_rank()}: %(message)s"))
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
