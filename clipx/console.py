"""What a command says on the terminal, above its progress bars."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


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
