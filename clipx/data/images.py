"""From the bytes of a file to the pixels that the image tower sees."""

import math
import random
from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as TF

from clipx.data.sample import BadSample

MEAN = (0.48145466, 0.4578275, 0.40821073)      # RGB, of OpenAI's training pictures
STD = (0.26862954, 0.26130258, 0.27577711)
RATIO = (3 / 4, 4 / 3)                          # width to height of a training crop
MOST_PIXELS = Image.MAX_IMAGE_PIXELS            # 89 million; Pillow warns of a decompression bomb above it
BICUBIC = TF.InterpolationMode.BICUBIC


def decode(file: bytes) -> Image.Image:
    """The picture in a file, RGB, as a viewer shows it: turned as EXIF says, alpha on white.

    Raises:
        BadSample: it does not decode, or is too large.
    """
    try:
        image = Image.open(BytesIO(file))
        if image.width * image.height > MOST_PIXELS:
            raise BadSample(f"has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise BadSample("does not decode: it is no picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, OSError, SyntaxError, ValueError) as error:
        raise BadSample(f"does not decode: {error}") from error


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


def train_crop(image: Image.Image, size: int, scale: tuple[float, float], rng: random.Random) -> Image.Image:
    """A random part of a picture, resized to ``size`` pixels square (RandomResizedCrop, bicubic).

    Args:
        image: RGB.
        size: side, pixels.
        scale: least and largest share of the area that is kept.
        rng: decides which part.
    """
    left, top, width, height = crop_box(*image.size, scale, rng)
    return TF.resized_crop(image, top, left, height, width, [size, size], BICUBIC)


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
    """The middle of a picture whose shorter side is resized to ``size`` pixels (bicubic)."""
    return TF.center_crop(TF.resize(image, size, BICUBIC), [size, size])


def to_tensor(image: Image.Image) -> Tensor:
    """(3, S, S) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Normalise:
    """(..., 3, S, S) uint8 -> float32 of about zero mean and unit variance, on the device where it is made."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(STD, device=device).view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


def get_image_transform(size: int = 224, is_train: bool = False) -> Callable[[Image.Image], Tensor]:
    """The transform of one picture, for use outside the loader: PIL image -> (3, size, size) normalised float32.

    Args:
        size: side, pixels; the model's ``visual.size``.
        is_train: a random crop of 90 to 100 % of the area in place of the middle; drawn from Python's ``random``.
    """

    normalise = Normalise()

    def transform(image: Image.Image) -> Tensor:
        rgb = to_rgb(ImageOps.exif_transpose(image))
        cut = train_crop(rgb, size, (0.9, 1.0), random.Random(random.random())) if is_train else eval_crop(rgb, size)
        return normalise(to_tensor(cut))

    return transform
