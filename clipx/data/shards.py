"""WebDataset shards as a source: plain tars, each sample read by its byte ranges."""

import os
from functools import lru_cache
from glob import glob
from hashlib import blake2b
from pathlib import Path

import numpy as np

from clipx.data.captions import read_captions
from clipx.data.index import KEY, DataError, ShardIndex, open_indexes
from clipx.data.sample import BadSample, Data, Sample, hold_out

PICTURES = ("jpg", "jpeg", "png", "webp")
WORDS = ("txt", "json")
OPEN_SHARDS = 64            # file descriptors that a process keeps


class Shards:
    """Some indexed tars.

    Args:
        indexes: of the tars, in their order.
        caption_key: the key of ``.json`` that holds the captions; None for ``.txt``, else json's ``caption``.
    """

    def __init__(self, indexes: list[ShardIndex], caption_key: str | None):
        self.indexes, self.caption_key = indexes, caption_key
        self.sizes = [len(index.samples) for index in indexes]
        self.ends = np.cumsum(self.sizes)
        self.id = blake2b("\n".join(index.id for index in indexes).encode(), digest_size=16).hexdigest()
        self.open = lru_cache(OPEN_SHARDS)(OpenShard)

    def __reduce__(self) -> tuple:
        return Shards, (self.indexes, self.caption_key)

    def keys(self) -> np.ndarray:
        return np.concatenate([index.samples[KEY] for index in self.indexes])

    def row(self, sample: int) -> tuple[ShardIndex, np.void]:
        shard = int(np.searchsorted(self.ends, sample, side="right"))
        index = self.indexes[shard]
        return index, index.samples[sample - (self.ends[shard] - self.sizes[shard])]

    def locate(self, sample: int) -> str:
        index, row = self.row(sample)
        return f"{index.path.name}/{row[KEY].decode('utf-8', 'replace')}"

    def read(self, sample: int) -> Sample:
        index, row = self.row(sample)
        members = {kind: tuple(row[kind].tolist()) for kind in row.dtype.names[1:] if row[kind][0]}
        picture = next((members[kind] for kind in PICTURES if kind in members), None)
        if picture is None:
            raise BadSample(f"has no picture ({', '.join('.' + kind for kind in PICTURES)})")
        shard = self.open(index.path, index.size)
        words = {kind: shard.read(*members[kind]) for kind in WORDS if kind in members}
        captions = read_captions(words, self.caption_key)
        return Sample(row[KEY].decode("utf-8", "replace"), shard.read(*picture), captions)


class OpenShard:
    """A tar that stays open for positioned reads, for as long as anybody holds it."""

    def __init__(self, path: Path, size: int):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        if os.fstat(self.descriptor).st_size != size:
            raise DataError(f"{path} has changed since its index was made; start the run again")

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def open_shards(
    root: str | None = None,
    shards: str | list[str] | None = None,
    val_shards: str | list[str] | None = None,
    val: float | str = 0.02,
    caption_key: str | None = None,
    index_dir: str = "~/.cache/clipx",
    shuffle_window: int = 131_072,
    max_skipped: float = 0.01,
    crop: tuple[float, float] = (0.9, 1.0),
) -> Data:
    """Training and validation shards, indexed.

    Args:
        root: directory with train/*.tar and val/*.tar, or with *.tar.
        shards: in place of ``root``: files, globs or brace lists, one or several.
        val_shards: likewise, for validation.
        val: where there are no validation shards, the share of the pictures held out, or a directory of shards.
        caption_key: the key of ``.json`` that holds the captions; None for ``.txt``, else json's ``caption``.
        index_dir: where an index goes that cannot stand beside its shard.
        shuffle_window: samples among which the plan shuffles.
        max_skipped: share of the samples that may be bad before the run ends.
        crop: share of a training picture's area that is kept, least and most.

    Raises:
        DataError: there are no shards, or one is not a whole tar.
    """
    if (root is None) == (shards is None):
        raise DataError("one of data.root=DIR and data.shards='DIR/*.tar' says where the shards are; give one")
    if shards is not None:
        train, held = expand(shards, "data.shards"), []
    else:
        train, held = in_root(Path(root))
    if val_shards is not None:
        held = expand(val_shards, "data.val_shards")
    elif isinstance(val, str):
        held = in_directory(Path(val))
        if not held:
            raise DataError(f"data.val={val} holds no shards (*.tar)")
    cache = Path(index_dir).expanduser()
    source = Shards(open_indexes(train, cache), caption_key)
    split = (source, Shards(open_indexes(held, cache), caption_key)) if held else hold_out(source, val)
    return Data(*split, shuffle_window, max_skipped, crop)


def in_root(root: Path) -> tuple[list[Path], list[Path]]:
    """The training and the validation shards of a directory."""
    train = in_directory(root / "train") or in_directory(root)
    if not train:
        reason = "holds no shards (*.tar, train/*.tar)" if root.is_dir() else "is not a directory"
        raise DataError(f"data.root={root} {reason}; for pictures with captions.txt use data=folder")
    return train, in_directory(root / "val")


def in_directory(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.tar"))


def expand(patterns: str | list[str], key: str) -> list[Path]:
    """The files that some names, globs and brace lists stand for, in order."""
    from webdataset.shardlists import expand_urls

    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = [pattern] if Path(pattern).is_file() else expand_urls(pattern)
        for name in names:
            matches = [name] if Path(name).is_file() else sorted(glob(name))
            if not matches:
                raise DataError(f"{key}={pattern}: there is no file {name}")
            found += matches
    return [Path(name) for name in found]
