"""From the bytes of a file to the pixels that the image tower sees."""

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

MEAN = (0.48145466, 0.4578275, 0.40821073)      # RGB, of OpenAI's training pictures
STD = (0.26862954, 0.26130258, 0.27577711)
RATIO = (3 / 4, 4 / 3)                          # width to height of a training crop
MAX_PIXELS = Image.MAX_IMAGE_PIXELS            # 89 million; Pillow warns of a decompression bomb above it
JPEG = b"\xff\xd8"
ORIENTATION = 0x0112                            # EXIF's tag
SEGMENTS = [bytes([mark]) for mark in (*range(0xE0, 0xF0), 0xFE)]      # APP0 to APP15, and comments
# what Pillow raises for bad bytes
DECODE_ERRORS = (Image.DecompressionBombError, Image.DecompressionBombWarning, OSError, SyntaxError, ValueError,
                 EOFError, IndexError, OverflowError, struct.error, zlib.error)


def decode(file: bytes) -> Image.Image:
    """The picture in a file, RGB, as a viewer shows it: rotated as EXIF says, alpha on white.

    Raises:
        BadSample: it does not decode, or is too large.
    """
    try:
        image = Image.open(BytesIO(file), formats=DECODED)
        check_size(image.width, image.height)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise BadSample(f"does not decode: it {describe_unreadable(file) or 'is no picture'}") from error
    except DECODE_ERRORS as error:
        raise BadSample(f"does not decode: {error}") from error


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSample(f"has {width} x {height} pixels, more than {MAX_PIXELS:,}")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; what is transparent becomes white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":        # 16 bits of grey
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class TrainCrop:
    """A random part of a picture (RandomResizedCrop, bicubic), straight from its file to the pixels that train.

    A JPEG is decoded at a half, a quarter or an eighth of its size where the crop then still has the pixels that it
    needs, unless ``decode`` is ``exact``.  Between Pillow's bicubic filter and this one lies at most one grey level.

    Args:
        size: side of what comes out, pixels.
        scale: least and largest share of the area that is kept.
        decode: ``fast`` or ``exact``.
    """

    def __init__(self, size: int, scale: tuple[float, float], decode: str):
        self.size, self.scale, self.exact = size, scale, decode == "exact"
        self.memory = [np.empty(0, np.uint8), np.empty(0, np.uint8)]     # of the decoded picture, and of its part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "memory": [np.empty(0, np.uint8), np.empty(0, np.uint8)]}

    def __call__(self, file: bytes, rng: random.Random, out: Tensor) -> None:
        """Fill ``out``, (S, S, 3) uint8.

        Raises:
            BadSample: it does not decode, or is too large.
        """
        part = self.cut(file, rng)
        whole = self.room(1, part.size).reshape(part.shape)         # the filter wants its rows side by side
        np.copyto(whole, part)
        resize(whole, out)

    def room(self, number: int, size: int) -> np.ndarray:
        """(size,) bytes that are used again and again; new ones for each picture take a third of the time."""
        if self.memory[number].size < size:
            self.memory[number] = np.empty(size, np.uint8)
        return self.memory[number][:size]

    def cut(self, file: bytes, rng: random.Random) -> np.ndarray:
        """The part that is kept, decoded: (H, W, 3), a view of memory that the next call uses again."""
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
        """How many times smaller a crop may be decoded."""
        return next(shrink for shrink in (8, 4, 2, 1) if shrink == 1 or min(width, height) // shrink >= self.size)

    def decode_jpeg(self, file: bytes, size: tuple[int, int], turn: int, shrink: int) -> tuple[np.ndarray, int]:
        """The picture as a viewer shows it, (H, W, 3), and how many times smaller it is than the file says."""
        width, height = (-(-side // shrink) for side in size)
        room = self.room(0, 3 * width * height)
        try:
            pixels = simplejpeg.decode_jpeg(
                file, "RGB", min_width=width, min_height=height, min_factor=shrink, buffer=room
            )
        except ValueError:              # odd in some way: Pillow judges whether it can be shown
            return np.array(decode(file)), 1
        return apply_orientation(pixels, turn), shrink


def jpeg_size(file: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG before it is rotated; None of any other file, and of CMYK, which is Pillow's.

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
    """Whether one of the segments in front of a JPEG's tables is EXIF's."""
    place = 2
    while file[place : place + 1] == b"\xff" and file[place + 1 : place + 2] in SEGMENTS:
        if file[place + 4 : place + 10] == b"Exif\0\0":
            return True
        place += 2 + int.from_bytes(file[place + 2 : place + 4], "big")
    return False


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) as EXIF's orientation wants it shown; a view."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def resize(pixels: np.ndarray, out: Tensor) -> None:
    """(H, W, 3) into (S, S, 3) uint8, bicubic with antialias; ``out`` is filled without a copy in between."""
    planes, filled = torch.from_numpy(pixels).permute(2, 0, 1)[None], out.permute(2, 0, 1)[None]    # channels last
    torch.ops.aten._upsample_bicubic2d_aa.out(planes, out.shape[:2], False, None, None, out=filled)


def crop_box(width: int, height: int, scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop, as torchvision's RandomResizedCrop chooses it.

    Where ten tries do not fit into the picture, it is the middle, as large as ``RATIO`` allows.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1)), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def eval_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle of a picture whose shorter side is resized to ``size`` pixels (bicubic), as torchvision cuts it.

    Raises:
        BadSample: it is so narrow that it would grow too large.
    """
    width, height = (int(size * side / min(image.size)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise BadSample(f"is too narrow: {image.width} x {image.height} pixels")
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """(S, S, 3) uint8."""
    return torch.from_numpy(np.array(image))


class Normalise:
    """(..., 3, S, S) uint8 -> float32 of about zero mean and unit variance, on the device where it is made."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(STD, device=device).view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


class ImageTransform:
    """PIL image -> (3, size, size) normalised float32; can be pickled, for workers that are spawned.

    Args:
        size: side, pixels.
        is_train: a random crop in place of the middle.
    """

    def __init__(self, size: int, is_train: bool):
        self.size, self.is_train, self.normalise = size, is_train, Normalise()

    def __call__(self, image: Image.Image) -> Tensor:
        rgb = to_rgb(ImageOps.exif_transpose(image))
        if self.is_train:
            left, top, width, height = crop_box(*rgb.size, (0.9, 1.0), random.Random(random.random()))
            pixels = torch.empty(self.size, self.size, 3, dtype=torch.uint8)
            resize(np.array(rgb.crop((left, top, left + width, top + height))), pixels)
        else:
            pixels = to_tensor(eval_crop(rgb, self.size))
        return self.normalise(pixels.permute(2, 0, 1))


def get_image_transform(size: int = 224, is_train: bool = False) -> ImageTransform:
    """The transform of one picture, for use outside the loader: PIL image -> (3, size, size) normalised float32.

    Args:
        size: side, pixels; the model's ``visual.size``.
        is_train: a random crop of 90 to 100 % of the area in place of the middle; drawn from Python's ``random``.
    """
    return ImageTransform(size, is_train)
