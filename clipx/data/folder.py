"""A folder of pictures as a source: images/ and captions.txt."""

import os
import shlex
from collections.abc import Iterable
from functools import cached_property
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from unicodedata import normalize

import numpy as np
from typing_extensions import Unpack

from clipx.data.captions import check_captions
from clipx.data.files import below, open_text, read_picture
from clipx.data.origin import Origin
from clipx.data.sample import IMAGE_SUFFIXES, VALIDATION, BadSample, Data, DataOptions, Sample, hold_out
from clipx.data.tar.headers import DataError

LAYOUT = "images/ with the pictures and captions.txt with lines FILENAME<TAB>CAPTION"
IMAGE_KINDS = IMAGE_SUFFIXES | {".avif", ".heic", ".heif", ".jxl"}  # including some that Pillow may not read


class Folder:
    """Pictures with their captions in captions.txt; one shard.

    Args:
        root: has images/ and captions.txt; several lines for one picture are several captions.
        key: config key, for the error.

    Raises:
        ValueError: one of the two is missing.
        DataError: a line is not FILENAME<TAB>CAPTION.
    """

    def __init__(self, root: Path, key: str = "root"):
        listing = root / "captions.txt"
        if not root.is_dir():
            raise ValueError(f"{key}={root} is not a directory (relative to {Path.cwd()}); it needs {LAYOUT}")
        if not listing.is_file() or not (root / "images").is_dir():
            if any(root.glob("*.tar")) or any(root.glob("train/*.tar")):
                raise ValueError(f"{key}={root} holds shards (*.tar), not {LAYOUT}; use data=shards")
            packed = f"{root.absolute().name}-shards"
            raise ValueError(
                f"{key}={root} needs {LAYOUT}; pack any other folder: python -m clipx.prepare "
                f"source=folder src={shlex.quote(str(root))} out={shlex.quote(packed)}, then data=shards "
                f"data.root={shlex.quote(packed)}"
            )
        self.images = root / "images"
        self.captions = read_listing(listing)
        self.names = list(self.captions)
        self.sizes = [len(self.names)]
        self.id = f"{listing.name} {blake2b(listing.read_bytes(), digest_size=16).hexdigest()}"

    def keys(self, shard: int) -> np.ndarray:
        return np.array([name.encode() for name in self.names])

    def locate(self, sample: int) -> str:
        return f"{self.images.name}/{self.names[sample]}"

    @cached_property
    def matched(self) -> tuple[dict[str, str], list[str]]:
        """Result of ``match_names``, computed when first needed."""
        return match_names(self.images, self.captions)

    def read(self, sample: int) -> Sample:
        path = self.path(sample)
        if not path.is_file():
            raise BadSample("is listed in captions.txt, but there is no such file")
        return Sample(self.names[sample], read_picture(path), self.read_captions(sample))

    def path(self, sample: int) -> Path:
        """Path of a sample's picture."""
        path = self.images / self.names[sample]
        return path if path.is_file() else self.images / self.matched[0][self.names[sample]]

    def origin(self, sample: int) -> Origin:
        return Origin(self.names[sample], None, os.path.abspath(self.path(sample)))

    def read_captions(self, sample: int) -> list[str]:
        return check_captions(self.captions[self.names[sample]])


def read_listing(path: Path, encoding: str | None = None) -> dict[str, list[str]]:
    """Return captions by file name, in the order of captions.txt; ``encoding`` as in ``open_text``."""
    captions: dict[str, list[str]] = {}
    with open_text(path, encoding) as file:
        lines = file.read().split("\n")  # not at U+2028 and the like, which captions contain
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab or not name.strip() or not caption.strip():
            raise DataError(f"{path}, line {number}: {line[:60]!r} is not FILENAME<TAB>CAPTION")
        captions.setdefault(name.strip(), []).append(caption.strip())
    if not captions:
        raise DataError(f"{path} is empty; it needs lines FILENAME<TAB>CAPTION")
    return captions


def match_names(images: Path, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Find the files that captions.txt lists, in any Unicode normalisation.

    Args:
        images: directory of the pictures.
        names: as in captions.txt.

    Returns:
        The name on disk of each (unchanged if there is no such file), and the pictures that are not listed.
    """
    there = [path.relative_to(images).as_posix() for path in below(images) if path.is_file()]
    spelt = {normalize("NFC", name): name for name in there} | {name: name for name in there}
    found = {}
    for name in names:
        plain = PurePosixPath(name).as_posix()
        found[name] = spelt.get(plain) or spelt.get(normalize("NFC", plain), name)
    unlisted = set(there) - set(found.values())
    return found, sorted(name for name in unlisted if PurePosixPath(name).suffix.lower() in IMAGE_KINDS)


def open_folder(root: str, val: float | str = 0.02, **options: Unpack[DataOptions]) -> Data:
    """Open a folder of pictures and its validation set.

    Args:
        root: has images/ and captions.txt; or train/ with these, and optionally val/ (or a name in ``VALIDATION``).
        val: directory of the same layout for validation; or, without one next to train/, the share of the pictures
            to hold out.
        options: as in ``Data``.

    Raises:
        ValueError: a directory has another layout, or training and validation are the same.
        DataError: a line of captions.txt is not FILENAME<TAB>CAPTION.
    """
    place = Path(root).expanduser()
    source = Folder(place / "train" if has_listing(place / "train") and not has_listing(place) else place)
    beside = next((place / name for name in VALIDATION if has_listing(place / name)), None)
    if isinstance(val, str):
        if Path(val).expanduser().resolve() == source.images.parent.resolve():
            raise ValueError(f"val={val} is the training directory; set another one, or a share of pictures: val=0.02")
        return Data(source, Folder(Path(val).expanduser(), "val"), **options)
    if beside:
        return Data(source, Folder(beside), **options, notes=[f"validating on {beside}"])
    return Data(*hold_out(source, val), **options)


def has_listing(directory: Path) -> bool:
    return (directory / "captions.txt").is_file()
