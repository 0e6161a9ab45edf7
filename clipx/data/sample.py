"""What a source of data is: samples by number, whatever they are kept in."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol, TypedDict

import numpy as np
from PIL import Image
from pydantic import AfterValidator, Field, PositiveInt
from tqdm import tqdm

from clipx.data.plan import MixPlan, Plan

logger = logging.getLogger("clipx")

VALIDATION = ("val", "validation", "valid", "dev", "test")      # directories beside train/, the first that is there
MAX_HELD_OUT = 5000        # pictures; more tell nothing more
SHARES = (0.02, 0.1, 0.2, 0.5)      # to hold out, the more the fewer pictures there are
LARGE = 1_000_000           # samples of a source for which it is kept which of them are held out
MIN_BAD_LIMIT = 10              # bad samples that never end a run
MAX_IMAGE_BYTES = 256 << 20    # bytes of a picture's file: the most pixels that are decoded take no more as they are
# EPS would run a program
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
with suppress(ImportError):         # the extra heic
    from pillow_heif import register_heif_opener

    register_heif_opener()
DECODED = [name for name in FORMATS if name in Image.OPEN]
IMAGE_SUFFIXES = {ending for ending, format in Image.registered_extensions().items() if format in DECODED}


class BadSample(Exception):
    """A sample cannot be used, for what its bytes show."""


def check_bytes(what: str, size: int, most: int) -> None:
    """BadSample where there are too many."""
    if size > most:
        raise BadSample(f"{what} is too large: {size:,} bytes, more than {most:,}")


def describe_unreadable(file: bytes) -> str:
    """Of a file that nothing here decodes, what it is and what would; empty where that is not known."""
    brands = file[8:40] if file[4:8] == b"ftyp" else b""
    if b"avif" in brands and "AVIF" not in DECODED:
        return "is AVIF, which Pillow reads from 11.3 on; pip install --upgrade pillow"
    if b"hei" in brands and "HEIF" not in DECODED:
        return "is HEIC, which an extra reads; pip install 'clipx[heic]'"
    return ""


class Sample(NamedTuple):
    """One picture and what is said of it."""

    key: str
    picture: bytes          # an encoded file
    captions: list[str]     # one or more


class Source(Protocol):
    """Samples in shards, read by number.  (A folder is one shard.)"""

    sizes: Sequence[int]    # samples of each shard
    id: str                 # changes when the data do

    def locate(self, sample: int) -> str:
        """File and key of a sample, for people."""

    def read(self, sample: int) -> Sample:
        """Raises BadSample where its bytes do not hold a picture and a caption, OSError where they cannot be read."""


class KeyedSource(Source, Protocol):
    """A source whose samples can be told apart without reading them."""

    def keys(self, shard: int) -> np.ndarray:
        """(samples of the shard,) bytes; the key of each."""


def validate_crop(crop: tuple[float, float]) -> tuple[float, float]:
    if not 0 < crop[0] <= crop[1] <= 1:
        raise ValueError("expected the least and the most of the area that is kept, above 0 and up to 1")
    return crop


Crop = Annotated[tuple[float, float], AfterValidator(validate_crop)]


class DataOptions(TypedDict, total=False):
    """How any data are used: the keys that every data config has; the defaults are those of ``Data``."""

    shuffle_window: PositiveInt
    max_skipped: Annotated[float, Field(ge=0, le=1)]
    crop: Crop
    caption: Literal["random", "first"]
    decode: Literal["fast", "exact"]


@dataclass(frozen=True)
class Data:
    """What a data config makes: the two sources of a run, and how they are used."""

    train: Source
    val: Source | None
    shuffle_window: int = 131_072                   # samples among which the plan shuffles
    max_skipped: float = 0.01                       # share of the samples that may be bad, though ten always may
    crop: tuple[float, float] = (0.9, 1.0)          # share of a training picture's area that is kept, least and most
    caption: Literal["random", "first"] = "random"  # which caption of a picture trains: drawn each epoch, or its first
    decode: Literal["fast", "exact"] = "fast"       # fast: a JPEG larger than needed is decoded at half its size

    further: Mapping[str, Source] = field(default_factory=dict)     # validation sets besides the first
    lost: Mapping[str, int] = field(default_factory=dict)           # samples that shards have lost, by shard
    notes: Sequence[str] = field(default_factory=list)              # what was decided about them, for the user to know

    @property
    def vals(self) -> dict[str, Source]:
        """All validation sets by name; the first has none."""
        return ({"": self.val} if self.val is not None else {}) | dict(self.further)

    def plan(self, seed: int) -> Plan | MixPlan:
        """The order of training."""
        return Plan(self.train.sizes, seed, self.shuffle_window)

    @property
    def bad_limit(self) -> int:
        """How many distinct bad samples the run survives, those among them that are lost."""
        return max(MIN_BAD_LIMIT, int(self.max_skipped * (sum(self.train.sizes) + sum(self.lost.values()))))


class Subset:
    """Some samples of a source, as a source.

    Args:
        source: the whole.
        ids: (n,) of samples in it, rising.
        without: the subset is all others; costs no memory for them.
    """

    def __init__(self, source: Source, ids: np.ndarray, without: bool = False):
        self.source, self.ids, self.without = source, ids, without
        there = np.diff(np.searchsorted(ids, np.cumsum(source.sizes)), prepend=0)
        self.sizes = np.asarray(source.sizes) - there if without else there
        self.before = ids - np.arange(len(ids))         # how many others stand before each of them
        self.id = f"{source.id} {without} {blake2b(ids.tobytes(), digest_size=8).hexdigest()}"

    def whole(self, sample: int) -> int:
        """The id in the whole source."""
        if self.without:
            return sample + int(np.searchsorted(self.before, sample, side="right"))
        return int(self.ids[sample])

    def locate(self, sample: int) -> str:
        return self.source.locate(self.whole(sample))

    def read(self, sample: int) -> Sample:
        return self.source.read(self.whole(sample))


def hold_out(source: KeyedSource, share: float, kept: Path | None = None) -> tuple[Source, Source | None]:
    """Split a source into training and validation by a hash of the keys alone.

    Args:
        source: all samples.
        share: of the pictures that validate, at most 5,000 of them; 0 holds out nothing.
        kept: directory where the choice is kept if the source is large.

    Returns:
        The training part, and the held-out part or None.

    Raises:
        ValueError: that is no share.
    """
    if not 0 <= share < 1:
        raise ValueError(f"val={share}: expected a share of the pictures (0.02 is 2 %; 0 is none), or a directory")
    samples = sum(source.sizes)
    count = min(round(share * samples), MAX_HELD_OUT)
    if count == 0:
        if share:
            logger.warning("val=%s of %d pictures is none, so there is no validation set; %s", share, samples,
                           suggest_share(samples))
        return source, None
    file = kept / f"held-{blake2b(f'{source.id} {count}'.encode(), digest_size=8).hexdigest()}.npy" if kept else None
    ids = load_held_out(file, count) if file and samples >= LARGE else None
    if ids is None:
        ids = smallest_hashes(source, count)
        if file and samples >= LARGE:
            with suppress(OSError):         # it only saves the next run the time
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, ids)
    return Subset(source, ids, without=True), Subset(source, ids)


def suggest_share(samples: int, least: int = 10) -> str:
    """The share to hold out of so many pictures that leaves at least so many to score, if one does."""
    share = next((share for share in SHARES if share * samples >= least), SHARES[-1])
    return f"data.val={share} holds out {round(share * samples):,}"


def load_held_out(file: Path, count: int) -> np.ndarray | None:
    """The ids that ``hold_out`` kept, where they are whole."""
    try:
        ids = np.lib.format.open_memmap(file, mode="r")     # reads no pickle, and makes no room for what is not there
    except (OSError, ValueError):
        return None
    return np.asarray(ids) if (ids.shape, ids.dtype) == ((count,), np.int64) else None


def smallest_hashes(source: KeyedSource, count: int) -> np.ndarray:
    """(count,) the ids of the samples whose keys have the smallest hashes, rising."""
    hashes, ids, start = np.empty(0, "u8"), np.empty(0, "i8"), 0
    sizes = [int(size) for size in source.sizes]
    with tqdm(total=sum(sizes), unit="key", unit_scale=True, desc="hold out", disable=None, delay=2) as bar:
        for shard, size in enumerate(sizes):
            digests = [blake2b(key, digest_size=8).digest() for key in source.keys(shard).tolist()]
            hashes = np.concatenate([hashes, np.frombuffer(b"".join(digests), "<u8")])
            ids = np.concatenate([ids, np.arange(start, start + size)])
            if len(hashes) > count:
                chosen = np.argsort(hashes, kind="stable")[:count]
                hashes, ids = hashes[chosen], ids[chosen]
            start += size
            bar.update(size)
    return np.sort(ids)
