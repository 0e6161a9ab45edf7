"""Files by path: pictures without captions, text files, and atomic writes."""

import glob
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TextIO, TypeVar

from PIL import Image

from clipx.data.sample import MAX_IMAGE_BYTES, Sample, check_bytes
from clipx.data.tar.headers import DataError

# text files of a data set in CLIP_benchmark's layout
DATASET_TYPE, CLASS_NAMES = "dataset_type.txt", "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"

WRITING = ".writing-"  # in the name of an incomplete file
WAITS = (0.2, 1.0, 3.0)  # seconds before each retry of a failed read
CLUTTER = {"@eadir", "__macosx", "__pycache__", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
Args = ParamSpec("Args")
Result = TypeVar("Result")


class Files:
    """Picture files as a source of one shard."""

    def __init__(self, paths: Sequence[Path]):
        self.paths, self.sizes, self.id = list(paths), [len(paths)], "files"

    def locate(self, sample: int) -> str:
        return str(self.paths[sample])

    def read(self, sample: int) -> Sample:
        path = self.paths[sample]
        return Sample(str(path), read_picture(path, "the picture"), [""])


def find_sidecar(directory: Path, name: str) -> Path | None:
    """Find a file next to shards or, as CLIP_benchmark places it, one level up."""
    return next(filter(Path.is_file, (place / name for place in (directory, directory.absolute().parent))), None)


def find_pictures(where: str) -> list[Path]:
    """Find a picture, all pictures under a directory, or those that match a glob; sorted by name.

    Raises:
        DataError: there are none.
    """
    Image.init()
    known = set(Image.registered_extensions())
    root = Path(where).expanduser()
    if root.is_file():
        return [root]
    found = below(root) if root.is_dir() else map(Path, glob.glob(str(root), recursive=True))
    pictures = sorted(path for path in found if path.is_file() and path.suffix.lower() in known)
    if not pictures:
        raise DataError(f"images={where}: no pictures found; expected a file, a directory, or a pattern: 'DIR/*.jpg'")
    return pictures


def below(root: Path) -> Iterator[Path]:
    """Yield all paths under a directory except clutter of file managers, NAS systems and notebooks."""
    for path in root.rglob("*"):
        if not any(map(is_clutter, path.relative_to(root).parts)):
            yield path


def is_clutter(name: str) -> bool:
    """Whether a name is hidden or belongs to the system."""
    return name.startswith(".") or name.lower() in CLUTTER


@contextmanager
def open_text(path: Path, encoding: str | None = None) -> Iterator[TextIO]:
    """Open a text file; a byte order mark is skipped and line ends are kept.

    Args:
        path: the file.
        encoding: the value of ``source.encoding``; None for UTF-8.

    Raises:
        DataError: the file, read inside the ``with`` block, has another encoding.
    """
    codec = "utf-8-sig" if (encoding or "utf-8").lower() in ("utf-8", "utf8") else encoding
    try:
        with path.open(encoding=codec, newline="") as file:
            yield file
    except (UnicodeError, LookupError) as error:
        what = f"cannot be read as source.encoding={encoding}" if encoding else "is not UTF-8 text"
        fix = "set its encoding, such as source.encoding=cp1252" if encoding else "save it as UTF-8"
        raise DataError(f"{path} {what} ({error}); {fix}") from error


def read_lines(path: Path, key: str) -> list[str]:
    """Return the non-blank lines of a file.

    Args:
        path: the file.
        key: config key, for the error.

    Raises:
        DataError: it is not UTF-8 text.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
        if "\0" not in text:
            return [line.strip() for line in text.split("\n") if line.strip()]
    except UnicodeDecodeError:
        pass
    encoding = "UTF-16" if b"\0" in content else "CP1252"
    raise DataError(
        f"{key}={path} is not UTF-8 text, perhaps {encoding}; convert it: iconv -f {encoding} -t UTF-8 {path} > NEW"
    )


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all; other processes may write it at the same time."""
    temporary = path.with_name(f"{path.name}{WRITING}{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # its space may be what is missing
        raise


def read_picture(path: Path, what: str = "its picture") -> bytes:
    """Read the bytes of a picture.

    Raises:
        BadSample: it is too large; the message calls it ``what``.
        DataError: it cannot be read.
    """
    check_bytes(what, retry_read(path, path.stat).st_size, MAX_IMAGE_BYTES)
    return retry_read(path, path.read_bytes)


def retry_read(path: Path, read: Callable[Args, Result], *args: Args.args, **options: Args.kwargs) -> Result:
    """Call ``read``, which reads from ``path``; retry I/O errors after growing waits.

    Raises:
        DataError: it still fails.
    """
    for wait in WAITS:
        with suppress(OSError):
            return read(*args, **options)
        time.sleep(wait)
    try:
        return read(*args, **options)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}), after {len(WAITS) + 1} tries; rerun the same command "
            "to resume from the last checkpoint"
        ) from error
