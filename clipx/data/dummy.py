"""Generated pictures of coloured shapes with captions; needs no files."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw
from pydantic import NonNegativeInt, PositiveInt
from typing_extensions import Unpack

from clipx.data.plan import digest
from clipx.data.sample import Data, DataOptions, Sample

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("circle", "square", "triangle", "bar")
PLACES = {"upper left": (0, 0), "upper right": (1, 0), "lower left": (0, 1), "lower right": (1, 1)}


class Dummy:
    """Deterministic pictures of coloured shapes on a grey background.

    Args:
        samples: number of pictures.
        size: side of a picture, pixels.
        seed: of the pictures.
    """

    def __init__(self, samples: int, size: int, seed: int):
        self.size, self.seed = size, seed
        self.sizes = [samples]
        self.id = f"dummy {samples} {size} {seed}"

    def keys(self, shard: int) -> np.ndarray:
        return np.array([f"{self.seed}-{sample}".encode() for sample in range(self.sizes[0])])

    def locate(self, sample: int) -> str:
        return f"dummy/{self.seed}-{sample}"

    def read(self, sample: int) -> Sample:
        colour, shape, place = self.draw(sample)
        grey = 96 + digest(self.seed, "dummy", sample) // 128 % 64
        image = Image.new("RGB", (self.size, self.size), (grey, grey, grey))
        paint(ImageDraw.Draw(image), shape, colour, PLACES[place], self.size / 2)
        file = BytesIO()
        image.save(file, "png")
        return Sample(f"{self.seed}-{sample}", file.getvalue(), self.read_captions(sample))

    def read_captions(self, sample: int) -> list[str]:
        colour, shape, place = self.draw(sample)
        return [f"a {colour} {shape} in the {place}"]

    def draw(self, sample: int) -> tuple[str, str, str]:
        """Return colour, shape and place of a picture."""
        drawn = digest(self.seed, "dummy", sample)
        return COLOURS[drawn % 8], SHAPES[drawn // 8 % 4], list(PLACES)[drawn // 32 % 4]


def paint(draw: ImageDraw.ImageDraw, shape: str, colour: str, place: tuple[int, int], half: float) -> None:
    """Draw a shape into one quadrant of the picture; ``half`` is the quadrant's side in pixels."""
    left, top = (half * (corner + 0.15) for corner in place)
    right, bottom = left + 0.7 * half, top + 0.7 * half
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        draw.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=colour)
    else:
        draw.rectangle((left, top, right, bottom if shape == "square" else top + 0.2 * half), fill=colour)


def open_dummy(
    samples: PositiveInt = 4096,
    val_samples: NonNegativeInt = 256,
    size: PositiveInt = 64,
    **options: Unpack[DataOptions],
) -> Data:
    """Generate training and validation pictures.

    Args:
        samples: number of training pictures.
        val_samples: number of validation pictures, different ones; 0 for none.
        size: side of a picture, pixels.
        options: as in ``Data``.
    """
    return Data(Dummy(samples, size, seed=0), Dummy(val_samples, size, seed=1) if val_samples else None, **options)
