"""How pictures are prepared for an image tower."""

from typing import Literal, NamedTuple

MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB, of OpenAI's training pictures
STD = (0.26862954, 0.26130258, 0.27577711)

Channels = tuple[float, float, float]  # red, green and blue
Interpolation = Literal["bicubic", "bilinear"]


class Preprocessing(NamedTuple):
    """Resize to ``size`` pixels, then subtract ``mean`` and divide by ``std``; OpenAI's values by default."""

    size: int  # side S, pixels
    mean: Channels = MEAN  # of pixels in [0, 1]
    std: Channels = STD
    interpolation: Interpolation = "bicubic"

    @classmethod
    def of(cls, size: int, mean: Channels, std: Channels, interpolation: Interpolation) -> "Preprocessing":
        """From the values of a config, which holds lists."""
        (red, green, blue), (red_std, green_std, blue_std) = mean, std
        return cls(size, (red, green, blue), (red_std, green_std, blue_std), interpolation)
