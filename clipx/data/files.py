"""Pictures by path, without captions."""

import glob
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from clipx.data.sample import MOST_PICTURE, Sample, check_bytes
from clipx.data.shards import patiently
from clipx.data.tar import DataError


class Files:
    """Files as a source of one shard; what cannot be decoded is a bad sample."""

    def __init__(self, paths: Sequence[Path]):
        self.paths, self.sizes, self.id = list(paths), [len(paths)], "files"

    def locate(self, sample: int) -> str:
        return str(self.paths[sample])

    def read(self, sample: int) -> Sample:
        path = self.paths[sample]
        check_bytes("the picture", patiently(path.stat, path).st_size, MOST_PICTURE)
        return Sample(str(path), patiently(path.read_bytes, path), [""])


def find_pictures(where: str) -> list[Path]:
    """A picture, all pictures below a directory, or what a pattern fits; in the order of their names.

    Raises:
        DataError: there is none.
    """
    Image.init()
    known = set(Image.registered_extensions())
    root = Path(where)
    if root.is_file():
        return [root]
    found = root.rglob("*") if root.is_dir() else map(Path, glob.glob(where, recursive=True))
    pictures = sorted(path for path in found if path.is_file() and path.suffix.lower() in known)
    if not pictures:
        raise DataError(f"images={where}: no picture is there; expected a file, a directory, or a pattern: 'DIR/*.jpg'")
    return pictures
