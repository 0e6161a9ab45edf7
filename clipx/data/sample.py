"""The data interface: a source gives samples by number."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from PIL import Image
from pydantic import AfterValidator, Field, PositiveInt
from tqdm import tqdm

from clipx.data.draw_captions import CaptionDraw, Choice
from clipx.data.origin import Origin, origin_of
from clipx.data.plan import MixPlan, Plan

logger = logging.getLogger("clipx")

VALIDATION = ("val", "validation", "valid", "dev", "test")  # next to train/; the first that exists
MAX_HELD_OUT = 5000  # pictures; more would not sharpen the estimate
SHARES = (0.02, 0.1, 0.2, 0.5)  # suggested held-out shares; small sets need larger ones
LARGE = 1_000_000  # samples; the held-out ids of larger sources are cached
MIN_BAD_LIMIT = 10  # bad samples that any run tolerates
NUM_PROBED = 32  # samples whose bytes are part of the key of cached features
MAX_IMAGE_BYTES = 256 << 20  # about the size of MAX_PIXELS uncompressed
# without EPS, which runs Ghostscript
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
with suppress(ImportError):  # pip install "clipx[heic]"
    from pillow_heif import register_heif_opener

    register_heif_opener()
DECODED = [name for name in FORMATS if name in Image.OPEN]
IMAGE_SUFFIXES = {ending for ending, format in Image.registered_extensions().items() if format in DECODED}


class BadSample(Exception):
    """A sample whose bytes cannot be used."""


def check_bytes(what: str, size: int, most: int) -> None:
    """Raise BadSample if ``size`` exceeds ``most`` bytes."""
    if size > most:
        raise BadSample(f"{what} is too large: {size:,} bytes, more than {most:,}")


def describe_unreadable(file: bytes) -> str:
    """Name the format of an undecodable file and the package that reads it; empty if unknown."""
    brands = file[8:40] if file[4:8] == b"ftyp" else b""
    if b"avif" in brands and "AVIF" not in DECODED:
        return "is AVIF, which needs Pillow 11.3; pip install --upgrade pillow"
    if b"hei" in brands and "HEIF" not in DECODED:
        return "is HEIC, which needs an extra; pip install 'clipx[heic]'"
    return ""


class Sample(NamedTuple):
    """One picture and its captions."""

    key: str
    picture: bytes  # an encoded file
    captions: list[str]  # one or more


class Source(Protocol):
    """Samples in shards, read by number. A folder is one shard."""

    id: str  # changes when the data do

    @property
    def sizes(self) -> Sequence[int]:
        """Samples of each shard."""

    def locate(self, sample: int) -> str:
        """Return file and key of a sample, for messages."""

    def read(self, sample: int) -> Sample:
        """Read one sample.

        Raises:
            BadSample: it has no picture or no caption.
            OSError: it cannot be read.
        """


@runtime_checkable
class CaptionSource(Source, Protocol):
    """A source that reads captions without their picture."""

    def read_captions(self, sample: int) -> list[str]:
        """Return the captions of one sample.  Raises as ``read``."""


def captions_of(source: Source, sample: int) -> list[str]:
    """Return the captions of a sample, without reading its picture if the source can.  Raises as ``Source.read``."""
    return source.read_captions(sample) if isinstance(source, CaptionSource) else source.read(sample).captions


def probe_samples(source: Source) -> list[str]:
    """Hash the bytes of a few samples, spread over a source: its id leaves out directories, and bytes of a folder."""
    count = int(sum(source.sizes))
    return [sample_digest(source, sample) for sample in range(0, count, max(1, count // NUM_PROBED))]


def sample_digest(source: Source, sample: int) -> str:
    """Hash the bytes of a sample."""
    try:
        found = source.read(sample)
    except BadSample as error:
        return f"{sample} {error}"
    captions = "\n".join(found.captions).encode()
    return blake2b(found.picture + b"\n" + captions, digest_size=16).hexdigest()


class KeyedSource(Source, Protocol):
    """A source that knows its keys without reading samples."""

    def keys(self, shard: int) -> np.ndarray:
        """Return the key of each sample, (samples,) bytes."""


def validate_crop(crop: tuple[float, float]) -> tuple[float, float]:
    if not 0 < crop[0] <= crop[1] <= 1:
        raise ValueError("expected the smallest and the largest share of the area to keep, above 0 and up to 1")
    return crop


Crop = Annotated[tuple[float, float], AfterValidator(validate_crop)]


class DataOptions(TypedDict, total=False):
    """Keys of every data config; ``Data`` has their defaults."""

    shuffle_window: PositiveInt
    max_skipped: Annotated[float, Field(ge=0, le=1)]
    crop: Crop
    caption: Choice
    caption_weights: Sequence[Annotated[float, Field(gt=0)]] | None
    word_dropout: Annotated[float, Field(ge=0, lt=1)]
    captions_per_picture: PositiveInt
    decode: Literal["fast", "exact"]


@dataclass(frozen=True)
class Data:
    """Training and validation sources of a run, and how they are used."""

    train: Source
    val: Source | None
    shuffle_window: int = 131_072  # samples among which the plan shuffles
    max_skipped: float = 0.01  # share of the samples that may be bad; ten always may
    crop: tuple[float, float] = (0.9, 1.0)  # smallest and largest share of a picture's area in a training crop
    caption: Choice = "random"  # as ``CaptionDraw`` has them, and so have the next three
    caption_weights: Sequence[float] | None = None
    word_dropout: float = 0.0
    captions_per_picture: int = 1
    decode: Literal["fast", "exact"] = "fast"  # fast: a large JPEG is decoded at reduced size

    further: Mapping[str, Source] = field(default_factory=dict)  # more validation sets
    lost: Mapping[str, int] = field(default_factory=dict)  # number of lost samples, by shard
    notes: Sequence[str] = field(default_factory=list)  # decisions to log

    def __post_init__(self) -> None:
        self.draw_captions()  # fails now if the keys do not fit

    def draw_captions(self) -> CaptionDraw:
        """Draws the captions of training pictures.  Raises as ``CaptionDraw``."""
        return CaptionDraw(self.caption, self.caption_weights, self.word_dropout, self.captions_per_picture)

    @property
    def vals(self) -> dict[str, Source]:
        """All validation sets by name; the first is named ``""``."""
        return ({"": self.val} if self.val is not None else {}) | dict(self.further)

    def plan(self, seed: int) -> Plan | MixPlan:
        """The order of training."""
        return Plan(self.train.sizes, seed, self.shuffle_window)

    @property
    def bad_limit(self) -> int:
        """Number of distinct bad samples, lost ones included, at which the run does not end yet."""
        return max(MIN_BAD_LIMIT, int(self.max_skipped * (sum(self.train.sizes) + sum(self.lost.values()))))


class Subset:
    """A subset of a source.

    Args:
        source: the full source.
        ids: (n,) sample ids in it, ascending.
        without: use all samples except ``ids``, without storing their ids.
    """

    def __init__(self, source: Source, ids: np.ndarray, without: bool = False):
        self.source, self.ids, self.without = source, ids, without
        there = np.diff(np.searchsorted(ids, np.cumsum(source.sizes)), prepend=0)
        self.sizes: list[int] = (np.asarray(source.sizes) - there if without else there).tolist()
        self.before = ids - np.arange(len(ids))  # samples of the subset before each id
        self.id = f"{source.id} {without} {blake2b(ids.tobytes(), digest_size=8).hexdigest()}"

    def full_id(self, sample: int) -> int:
        """Return the sample's id in the full source."""
        if self.without:
            return sample + int(np.searchsorted(self.before, sample, side="right"))
        return int(self.ids[sample])

    def locate(self, sample: int) -> str:
        return self.source.locate(self.full_id(sample))

    def read(self, sample: int) -> Sample:
        return self.source.read(self.full_id(sample))

    def read_captions(self, sample: int) -> list[str]:
        return captions_of(self.source, self.full_id(sample))

    def origin(self, sample: int) -> Origin:
        return origin_of(self.source, self.full_id(sample))


def hold_out(source: KeyedSource, share: float, cache_dir: Path | None = None) -> tuple[Source, Source | None]:
    """Split a source into training and validation by a hash of the keys alone.

    Args:
        source: all samples.
        share: fraction of the pictures to hold out, at most 5,000; 0 holds out nothing.
        cache_dir: cache directory for the held-out ids of a large source.

    Returns:
        The training source, and the validation source or None.

    Raises:
        ValueError: ``share`` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"val={share}: expected a share of the pictures (0.02 is 2 %; 0 is none), or a directory")
    samples = sum(source.sizes)
    count = min(round(share * samples), MAX_HELD_OUT)
    if count == 0:
        if share:
            logger.warning(
                "val=%s of %d pictures rounds to 0, so there is no validation set; %s",
                share,
                samples,
                suggest_share(samples),
            )
        return source, None
    choice = blake2b(f"{source.id} {count}".encode(), digest_size=8).hexdigest()
    file = cache_dir / f"held-{choice}.npy" if cache_dir else None
    ids = load_held_out(file, count) if file and samples >= LARGE else None
    if ids is None:
        ids = smallest_hashes(source, count)
        if file and samples >= LARGE:
            with suppress(OSError):  # only a cache
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, ids)
    return Subset(source, ids, without=True), Subset(source, ids)


def suggest_share(samples: int, least: int = 10) -> str:
    """Suggest a held-out share that leaves at least ``least`` pictures to score, if there is one."""
    share = next((share for share in SHARES if share * samples >= least), SHARES[-1])
    return f"data.val={share} holds out {round(share * samples):,}"


def load_held_out(file: Path, count: int) -> np.ndarray | None:
    """Load the ids cached by ``hold_out``; None if missing or damaged."""
    try:
        ids = np.lib.format.open_memmap(file, mode="r")  # no pickle, no allocation from a forged header
    except (OSError, ValueError):
        return None
    return np.asarray(ids) if (ids.shape, ids.dtype) == ((count,), np.int64) else None


def smallest_hashes(source: KeyedSource, count: int) -> np.ndarray:
    """Return the ids of the samples whose keys have the smallest hashes, (count,) ascending."""
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
