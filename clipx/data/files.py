"""Files by path: pictures without captions, text files, and atomic writes."""

import glob
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from clipx.data.sample import MAX_IMAGE_BYTES, Sample, check_bytes
from clipx.data.tar.headers import DataError

WRITING = ".writing-"       # in the name of an incomplete file
WAITS = (0.2, 1.0, 3.0)     # seconds before each retry of a failed read
CLUTTER = {"@eadir", "__macosx", "__pycache__", "#recycle", "$recycle.bin", "lost+found", "system volume information"}


class Files:
    """Picture files as a source of one shard."""

    def __init__(self, paths: Sequence[Path]):
        self.paths, self.sizes, self.id = list(paths), [len(paths)], "files"

    def locate(self, sample: int) -> str:
        return str(self.paths[sample])

    def read(self, sample: int) -> Sample:
        path = self.paths[sample]
        check_bytes("the picture", retry_read(path.stat, path).st_size, MAX_IMAGE_BYTES)
        return Sample(str(path), retry_read(path.read_bytes, path), [""])


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


def read_text(path: Path, encoding: str = "utf-8", key: str | None = None) -> str:
    """Read a text file.

    Args:
        path: the file.
        encoding: its encoding.
        key: config key of the encoding, for the error.

    Raises:
        DataError: the encoding does not fit.
    """
    try:
        return path.read_bytes().decode(codec(encoding))
    except (UnicodeError, LookupError) as error:
        what = f"cannot be read as {key}={encoding}" if key else "is not UTF-8 text"
        fix = f"set its encoding, such as {key}=cp1252" if key else "save it as UTF-8"
        raise DataError(f"{path} {what} ({error}); {fix}") from error


def codec(name: str) -> str:
    """Return the codec of an encoding; for UTF-8, one that skips a byte order mark."""
    return "utf-8-sig" if name.lower() in ("utf-8", "utf8") else name


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
    raise DataError(f"{key}={path} is not UTF-8 text, perhaps {encoding}; convert it: "
                    f"iconv -f {encoding} -t UTF-8 {path} > NEW")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; other processes may write it at the same time."""
    temporary = path.with_name(f"{path.name}{WRITING}{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def retry_read(read: Callable[[], Any], path: Path) -> Any:
    """Call ``read``; retry I/O errors after growing waits.

    Raises:
        DataError: it still fails.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except OSError as error:
            if wait is None:
                raise DataError(
                    f"{path} cannot be read ({error.strerror}), after {len(WAITS) + 1} tries; rerun the same command "
                    "to resume from the last checkpoint"
                ) from error
            time.sleep(wait)
