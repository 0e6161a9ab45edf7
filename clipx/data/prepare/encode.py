"""Encode a picture for a shard; its bytes are kept unless a change is requested."""

from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from PIL import Image, UnidentifiedImageError

from clipx.data.sample import DECODED, MAX_IMAGE_BYTES, BadSample, check_bytes, describe_unreadable
from clipx.data.tar.headers import DataError

KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's names; other formats become png
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


class Encoded(NamedTuple):
    """A picture as stored in a shard."""

    kind: str  # jpg, png or webp
    file: bytes
    width: int  # pixels
    height: int


def encode(
    file: bytes, resize: int | None, wanted: str | None, quality: int,
    min_size: int, max_aspect: float | None, verify: bool,
) -> Encoded:  # fmt: skip
    """Encode a picture for a shard.

    Args:
        file: in any format that Pillow reads.
        resize: largest short side, pixels; larger pictures are shrunk.
        wanted: jpg, png or webp; None keeps the bytes, but shrunk pictures become jpg and odd formats png.
        quality: of jpg and webp.
        min_size: smallest short side, pixels.
        max_aspect: largest ratio of the long side to the short one.
        verify: decode it even if the bytes are kept.

    Raises:
        BadSample: it does not decode, or is too small, too narrow or too large; details follow a colon.
    """
    kind, width, height = look(file)
    short = min(width, height)
    if short < min_size:
        raise BadSample(f"is too small: {width} x {height} pixels")
    if max_aspect is not None and max(width, height) > max_aspect * short:
        raise BadSample(f"is too narrow: {width} x {height} pixels")
    size = resize if resize is not None and resize < short else short
    keep = kind if wanted is None and size == short else None
    if keep and not verify:
        return Encoded(keep, file, width, height)
    from clipx.data.images import decode  # brings torch

    image = decode(file)
    if keep:
        return Encoded(keep, file, width, height)
    wanted = wanted or ("jpg" if size < short else "png")
    if size < short:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    try:
        image.save(buffer, FORMATS[wanted], quality=quality)
    except (OSError, ValueError) as error:  # a side is too long for the format
        raise BadSample(f"cannot be written as {wanted}: {error}") from error
    return Encoded(wanted, buffer.getvalue(), *image.size)


def look(file: bytes) -> tuple[str | None, int, int]:
    """Return kind (None if shards do not store it), width and height, from the head of a file."""
    try:
        with Image.open(BytesIO(file), formats=DECODED) as image:
            width, height = image.size
            kind = KINDS.get(image.format or "")
    except UnidentifiedImageError as error:
        raise BadSample(describe_unreadable(file) or "is not a picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(f"is too large: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BadSample(f"does not decode: {error}") from error
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise BadSample(f"is too large: {width} x {height} pixels")
    return kind, width, height


def read_file(root: Path, name: str) -> bytes:
    """Read the bytes of a picture.

    Raises:
        BadSample: there is none, or it is too large.
        DataError: it exists but cannot be read.
    """
    try:
        spellings = (name, normalize("NFC", name), normalize("NFD", name))  # files may come from another system
        path = next(path for path in (root / spelling for spelling in spellings) if path.is_file())
        check_bytes("its picture", path.stat().st_size, MAX_IMAGE_BYTES)
        return path.read_bytes()
    except (StopIteration, FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        raise BadSample("there is no such file") from error
    except OSError as error:
        raise DataError(
            f"{root / name} cannot be read ({error.strerror}); fix that and rerun the same command to resume"
        ) from error
