"""What a command says on the terminal, above its progress bars."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from tqdm import tqdm


class Lasting:
    """A text stream that outlives the terminal or the pipe behind it: once that is gone, what is written is dropped.

    Args:
        stream: standard output or error.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.give_up()

    def give_up(self) -> None:
        """Send the rest nowhere, what Python holds back for its exit included."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting() -> Iterator[None]:
    """Let a command go on when nobody reads its output any more, as behind ``| head``, or when it began without one."""
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            setattr(sys, name, Lasting(stream or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


class Console(logging.Handler):
    """Log lines on the terminal, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


def tell(text: str) -> None:
    """A line, or several."""
    tqdm.write(printable(text), file=sys.stderr)


def printable(text: str) -> str:
    """The text without what steers a terminal: names of files and samples are a stranger's."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)


def other_rank() -> str:
    """The number of this process where it is not the first of several."""
    return os.environ.get("RANK", "0").lstrip("0")


@contextmanager
def console(sweep: bool = False) -> Iterator[None]:
    """Show what clipx logs, for as long as a command runs.

    Args:
        sweep: whether it is one of many, of which only warnings are of interest; of ranks other than the first errors.
    """
    level = logging.ERROR if other_rank() else logging.WARNING if sweep else logging.INFO
    logger, handler = logging.getLogger("clipx"), Console(level)
    if other_rank():
        handler.setFormatter(logging.Formatter(f"rank {other_rank()}: %(message)s"))
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
