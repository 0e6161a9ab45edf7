"""WebDataset shards as a source: plain tars, read by byte ranges."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import PositiveFloat
from typing_extensions import Unpack

from clipx.data.captions import MAX_CAPTION_FILE, caption_per_line, read_captions
from clipx.data.catalogue import Catalogue, open_all
from clipx.data.faults import check_faults, lost_samples
from clipx.data.handles import CachedShard, OpenShard, max_open_shards
from clipx.data.origin import Origin
from clipx.data.remote.cache import Cache, RemoteShard
from clipx.data.sample import (
    MAX_IMAGE_BYTES,
    BadSample,
    Data,
    DataOptions,
    Sample,
    Source,
    check_bytes,
    hold_out,
)
from clipx.data.shard_paths import Shard, exclude_validation, expand, find_shards, list_shards
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import INDEX_DIR, KEY, byte_ranges, expand_home

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
CAPTION_KINDS = ("txt", "json")


class Shards:
    """Indexed tars.

    Args:
        catalogue: the tars, in order.
        caption_key: the key of ``.json`` with the captions; None for ``.txt``, else json's ``caption``.
    """

    def __init__(self, catalogue: Catalogue, caption_key: str | None):
        self.catalogue, self.caption_key = catalogue, caption_key
        self.kinds = CAPTION_KINDS if caption_key is None else ("json",)  # may hold the captions, best first
        self.caption_per_line = caption_per_line(catalogue.sidecar_dirs())
        self.sizes: list[int] = catalogue.rows["samples"].tolist()
        self.id = catalogue.id + " one caption a line" * self.caption_per_line
        self.ends = np.cumsum(self.sizes, dtype=np.int64)
        self.open = lru_cache(max_open_shards())(catalogue.open)

    def __reduce__(self) -> tuple:
        return type(self), (self.catalogue, self.caption_key)

    @property
    def remotes(self) -> dict[int, RemoteShard]:
        """Remote shards that have samples, by number."""
        return {number: remote for number, remote in self.catalogue.remotes.items() if self.sizes[number]}

    def captions(self, members: Mapping[str, bytes]) -> list[str]:
        return read_captions(members, self.caption_key, self.caption_per_line)

    def keys(self, shard: int) -> np.ndarray:
        return self.open(shard).samples[KEY]

    def row(self, sample: int) -> tuple[OpenShard | CachedShard, np.void]:
        shard = int(np.searchsorted(self.ends, sample, side="right"))
        tar = self.open(shard)
        return tar, tar.samples[sample - int(self.ends[shard]) + self.sizes[shard]]

    def locate(self, sample: int) -> str:
        tar, row = self.row(sample)
        return f"{tar.path.name}/{row[KEY].decode('utf-8', 'replace')}"

    def origin(self, sample: int) -> Origin:
        tar, row = self.row(sample)
        where = os.path.abspath(tar.path) if isinstance(tar, OpenShard) else tar.remote.url.partition("?")[0]
        return Origin(row[KEY].decode("utf-8", "replace"), where, None)  # a query may hold credentials

    def read(self, sample: int) -> Sample:
        tar, row = self.row(sample)
        members = checked_ranges(tar, row)
        picture = picture_range(members)
        captions = self.captions_among(tar, members)
        return Sample(row[KEY].decode("utf-8", "replace"), tar.read(*picture), captions)

    def read_captions(self, sample: int) -> list[str]:
        tar, row = self.row(sample)
        return self.captions_among(tar, checked_ranges(tar, row))

    def captions_among(self, tar: OpenShard | CachedShard, members: Mapping[str, tuple[int, int]]) -> list[str]:
        """Read the captions of a sample; ``members`` are its byte ranges."""
        kind = next((kind for kind in self.kinds if kind in members), None)
        if kind:
            check_bytes(f"its caption (.{kind})", members[kind][1], MAX_CAPTION_FILE)
        return self.captions({kind: tar.read(*members[kind])} if kind else {})


def checked_ranges(tar: OpenShard | CachedShard, row: np.void) -> dict[str, tuple[int, int]]:
    """Return the byte ranges of a sample's members, which lie within the tar.

    Raises:
        BadSample: one does not.
    """
    members = byte_ranges(row)
    if min(map(min, members.values()), default=0) < 0:
        raise BadSample("its index points outside the shard; delete the index")
    if max(map(sum, members.values()), default=0) > tar.size:
        raise BadSample("is lost: its shard is cut short")
    return members


def picture_range(members: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Return the byte range of the picture among a sample's members.

    Raises:
        BadSample: there is none, or it is too large.
    """
    picture = next((members[kind] for kind in IMAGE_KINDS if kind in members), None)
    if picture is None:
        kinds = ", ".join(f".{kind}" for kind in IMAGE_KINDS)
        raise BadSample(f"has no picture ({kinds}){dotted_key_hint(members)}")
    check_bytes("its picture", picture[1], MAX_IMAGE_BYTES)
    return picture


def dotted_key_hint(kinds: Iterable[str]) -> str:
    """Explain members that look like pictures but have a dot in their key."""
    dotted = next((kind for kind in kinds if kind.rpartition(".")[2] in IMAGE_KINDS), None)
    return (
        f" but .{dotted}: everything after the first dot of a name is its extension; rename the members so that "
        "keys have no dots"
        if dotted
        else ""
    )


def open_shards(
    root: str | None = None,
    shards: str | list[str] | None = None,
    val_shards: str | list[str] | None = None,
    val: float | str = 0.02,
    caption_key: str | None = None,
    index_dir: str = INDEX_DIR,
    cache: str = "~/.cache/clipx/shards",
    cache_gb: PositiveFloat = 100,
    allow_pipe: bool = False,
    made_by: str | None = None,
    **options: Unpack[DataOptions],
) -> Data:
    """Open training and validation shards; missing indexes are made.

    Args:
        root: directory with train/*.tar and val/*.tar (or another name in ``VALIDATION``), or with *.tar.
        shards: in place of ``root``: files, URLs, globs or brace lists, one or several.
        val_shards: the same for validation; these are left out of training.
        val: without validation shards, the share of the pictures to hold out, or a directory of shards.
        caption_key: the key of ``.json`` with the captions; None for ``.txt``, else json's ``caption``.
        index_dir: directory of indexes that cannot be written next to their shard.
        cache: directory of copies of remote shards; one run at a time.
        cache_gb: its largest size, 1e9 bytes.
        allow_pipe: whether ``pipe:COMMAND`` may be among the shards.
        made_by: the source of ``clipx.prepare`` that makes these shards, or img2dataset; for the error message.
        options: as in ``Data``.

    Raises:
        ValueError: there are no shards, or more samples are lost than ``max_skipped`` allows.
        DataError: one is not a tar, or a remote one cannot be copied.
    """
    train, val_paths, notes = select_shards(root, shards, val_shards, val, allow_pipe, made_by)
    copies = Cache(expand_home(cache), int(1e9 * cache_gb), expand_home(index_dir))
    source = Shards(open_all(train, copies), caption_key)
    split: tuple[Source, Source | None]
    if val_paths:
        split = source, open_validation(val_paths, copies, caption_key)
    else:
        assert not isinstance(val, str)  # would have given val_paths
        split = hold_out(source, val, copies.index_dir)
    data = Data(*split, **options, lost=lost_samples(source.catalogue), notes=notes)
    check_faults(source.catalogue, data)
    return data


def open_validation(paths: Sequence[Path | str], copies: Cache, caption_key: str | None) -> Shards:
    """Open validation shards; copies of remote ones stay in the cache.

    Raises:
        DataError: they hold no samples.
    """
    held = Shards(open_all(paths, copies), caption_key)
    if not sum(held.sizes):
        raise DataError(
            f"there are no samples in the validation shards, such as {paths[0]}; set others (data.val_shards=...), "
            "or leave them out"
        )
    copies.keep(list(held.catalogue.remotes.values()))
    return held


def select_shards(
    root: str | None,
    shards: str | list[str] | None,
    val_shards: str | list[str] | None,
    val: float | str,
    allow_pipe: bool,
    made_by: str | None,
) -> tuple[Sequence[Shard], Sequence[Shard], list[str]]:
    """Return the training shards, the validation shards and what to log about them; arguments as in ``open_shards``."""
    train: Sequence[Shard]
    val_paths: Sequence[Shard]
    beside: list[Path] = []
    if root is not None and shards is None:
        train, beside = find_shards(root, made_by)
    elif shards is not None and root is None:
        train = expand(shards, "shards", allow_pipe)
    else:
        raise ValueError(f"root={root} and shards={shards}: set exactly one of them")
    notes = []
    if val_shards is not None:
        val_paths = expand(val_shards, "val_shards", allow_pipe)
    elif isinstance(val, str):
        val_paths = list_shards(Path(val).expanduser())
        if not val_paths:
            raise ValueError(f"val={val} holds no shards (*.tar)")
    elif val and not all(isinstance(shard, Path) for shard in train):
        raise ValueError(
            f"val={val} would hold out pictures of all shards, but these are remote; set data.val_shards=URL, "
            "or data.val=0 for no validation"
        )
    else:
        val_paths = beside
        if beside:
            by_name = beside[0].parent == Path(str(root)).expanduser()
            notes.append(f"validating on {f'{beside[0]} and its like' if by_name else beside[0].parent}")
    kept = exclude_validation(train, val_paths)
    if shared := len(train) - len(kept):
        notes.append(f"{shared} of {len(train)} shards are validation shards and left out of training")
    return kept, val_paths, notes
