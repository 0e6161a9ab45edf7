"""From the bytes of a file to the pixels of the image tower."""

import math
import random
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from clipx.data.sample import DECODED, BadSample, describe_unreadable
from clipx.preprocessing import Interpolation, Preprocessing

RATIO = (3 / 4, 4 / 3)  # width to height of a training crop
MAX_PIXELS = 89_478_485  # Pillow's limit, above which it warns about decompression bombs
JPEG = b"\xff\xd8"
ORIENTATION = 0x0112  # EXIF's tag
SEGMENTS = [bytes([mark]) for mark in (*range(0xE0, 0xF0), 0xFE)]  # APP0 to APP15, and comments
# what Pillow raises for bad bytes
DECODE_ERRORS = (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
)


def decode(file: bytes) -> Image.Image:
    """Decode a file to RGB as a viewer shows it: EXIF rotation applied, alpha on white.

    Raises:
        BadSample: it does not decode, or is too large.
    """
    try:
        image = Image.open(BytesIO(file), formats=DECODED)
        check_size(image.width, image.height)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise BadSample(f"does not decode: it {describe_unreadable(file) or 'is not a picture'}") from error
    except DECODE_ERRORS as error:
        raise BadSample(f"does not decode: {error}") from error


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSample(f"has {width} x {height} pixels, more than {MAX_PIXELS:,}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; transparency becomes white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits of grey
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class TrainCrop:
    """Random crop of a picture (RandomResizedCrop), from file bytes to resized pixels.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop still has enough pixels, unless ``decode`` is
    ``exact``.  The filter differs from Pillow's by at most one grey level.

    Args:
        preprocessing: of the image tower.
        scale: smallest and largest share of the area to keep.
        decode: ``fast`` or ``exact``.
    """

    def __init__(self, preprocessing: Preprocessing, scale: tuple[float, float], decode: str):
        self.size, self.interpolation = preprocessing.size, preprocessing.interpolation
        self.scale, self.exact = scale, decode == "exact"
        self.buffers: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "buffers": {}}

    def __call__(self, file: bytes, rng: random.Random, out: Tensor) -> None:
        """Fill ``out``, (S, S, 3) uint8.

        Raises:
            BadSample: it does not decode, or is too large.
        """
        part = self.cut(file, rng)
        contiguous = self.buffer("crop", part.size).reshape(part.shape)  # as the filter needs
        np.copyto(contiguous, part)
        resize(contiguous, out, self.interpolation)

    def buffer(self, name: str, size: int) -> np.ndarray:
        """Return a reused buffer of (size,) bytes; allocating one per picture takes a third of the time."""
        if name not in self.buffers or self.buffers[name].size < size:
            self.buffers[name] = np.empty(size, np.uint8)
        return self.buffers[name][:size]

    def cut(self, file: bytes, rng: random.Random) -> np.ndarray:
        """Return the decoded crop, (H, W, 3), a view of memory that the next call overwrites."""
        size = jpeg_size(file)
        if size is None:
            pixels, shrink = np.array(decode(file)), 1
            left, top, width, height = crop_box(pixels.shape[1], pixels.shape[0], self.scale, rng)
        else:
            turn = orientation(file)
            shown = size if turn < 5 else size[::-1]
            left, top, width, height = crop_box(*shown, self.scale, rng)
            shrink = 1 if self.exact else self.shrink(width, height)
            pixels, shrink = self.decode_jpeg(file, size, turn, shrink)
        rows = slice(round(top / shrink), round((top + height) / shrink))
        columns = slice(round(left / shrink), round((left + width) / shrink))
        return pixels[rows, columns]

    def shrink(self, width: int, height: int) -> int:
        """Return the factor by which a crop may be decoded smaller."""
        return next(shrink for shrink in (8, 4, 2, 1) if shrink == 1 or min(width, height) // shrink >= self.size)

    def decode_jpeg(self, file: bytes, size: tuple[int, int], turn: int, shrink: int) -> tuple[np.ndarray, int]:
        """Return the upright picture, (H, W, 3), and the factor by which it was decoded smaller."""
        width, height = (-(-side // shrink) for side in size)
        buffer = self.buffer("picture", 3 * width * height)
        try:
            pixels = simplejpeg.decode_jpeg(
                file, "RGB", min_width=width, min_height=height, min_factor=shrink, buffer=buffer
            )
        except ValueError:  # unusual: let Pillow decide whether it decodes
            return np.array(decode(file)), 1
        return apply_orientation(pixels, turn), shrink


def jpeg_size(file: bytes) -> tuple[int, int] | None:
    """Return width and height of a JPEG before rotation; None for other files, and for CMYK.

    Raises:
        BadSample: it is too large.
    """
    if file[:2] != JPEG:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(file)
    except ValueError:
        return None
    check_size(width, height)
    return None if colours in ("CMYK", "YCCK") else (width, height)


def orientation(file: bytes) -> int:
    """EXIF orientation of a JPEG, 1 to 8; 1 is upright."""
    if not has_exif(file):
        return 1
    try:
        found = Image.open(BytesIO(file), formats=DECODED).getexif().get(ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1
    return found if found in range(1, 9) else 1


def has_exif(file: bytes) -> bool:
    """Whether a JPEG has an EXIF segment before its tables."""
    place = 2
    while file[place : place + 1] == b"\xff" and file[place + 1 : place + 2] in SEGMENTS:
        if file[place + 4 : place + 10] == b"Exif\0\0":
            return True
        place += 2 + int.from_bytes(file[place + 2 : place + 4], "big")
    return False


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return (H, W, 3) rotated upright, as a view."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def resize(pixels: np.ndarray, out: Tensor, interpolation: Interpolation) -> None:
    """Resize (H, W, 3) into ``out``, (S, S, 3) uint8; with antialias, without a copy."""
    planes, filled = torch.from_numpy(pixels).permute(2, 0, 1)[None], out.permute(2, 0, 1)[None]  # channels last
    aten = torch.ops.aten
    upsample = {"bicubic": aten._upsample_bicubic2d_aa.out, "bilinear": aten._upsample_bilinear2d_aa.out}
    upsample[interpolation](planes, out.shape[:2], False, None, None, out=filled)


def crop_box(width: int, height: int, scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random crop, as torchvision's RandomResizedCrop does.

    If ten tries do not fit into the picture, it is the largest center crop that ``RATIO`` allows.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1)), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def eval_crop(image: Image.Image, size: int, interpolation: Interpolation = "bicubic") -> Image.Image:
    """Resize the shorter side to ``size`` pixels and crop the center, as torchvision does.

    Raises:
        BadSample: it is too narrow to be resized.
    """
    width, height = (int(size * side / min(image.size)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise BadSample(f"is too narrow: {image.width} x {image.height} pixels")
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling[interpolation.upper()])
    return resized.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """(S, S, 3) uint8."""
    return torch.from_numpy(np.array(image))


class Normalise:
    """(..., 3, S, S) uint8 -> float32 of about zero mean and unit variance."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device | str = "cpu"):
        self.mean = torch.tensor(preprocessing.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(preprocessing.std, device=device).view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


class ImageTransform:
    """PIL image -> (3, size, size) normalised float32; picklable, for spawned workers.

    Args:
        preprocessing: of the image tower.
        is_train: random crop instead of center crop.
    """

    def __init__(self, preprocessing: Preprocessing, is_train: bool):
        self.preprocessing, self.is_train, self.normalise = preprocessing, is_train, Normalise(preprocessing)

    def __call__(self, image: Image.Image) -> Tensor:
        rgb, (size, *_, interpolation) = to_rgb(ImageOps.exif_transpose(image)), self.preprocessing
        if self.is_train:
            left, top, width, height = crop_box(*rgb.size, (0.9, 1.0), random.Random(random.random()))
            pixels = torch.empty(size, size, 3, dtype=torch.uint8)
            resize(np.array(rgb.crop((left, top, left + width, top + height))), pixels, interpolation)
        else:
            pixels = to_tensor(eval_crop(rgb, size, interpolation))
        return self.normalise(pixels.permute(2, 0, 1))


def get_image_transform(preprocessing: Preprocessing | int = 224, is_train: bool = False) -> ImageTransform:
    """Return the transform of a PIL image to (3, size, size) normalised float32, for use outside the loader.

    Args:
        preprocessing: of the model, ``visual.preprocessing``; or the size in pixels, with OpenAI's values.
        is_train: random crop of 90 to 100% of the area, from Python's ``random``, instead of center crop.
    """
    if isinstance(preprocessing, int):
        preprocessing = Preprocessing(preprocessing)
    return ImageTransform(preprocessing, is_train)
