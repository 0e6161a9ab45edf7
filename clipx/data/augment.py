"""Augmentation: random changes of a training picture after its crop, (3, S, S) uint8 -> (3, S, S) uint8.

Everything is drawn from torch's generator, which ``drawing_from`` seeds for each picture.  The geometric changes are
one resampling and the colour changes one matrix, several times as fast as torchvision's operations one by one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor

from clipx.errors import UserError

Augmentation = Callable[[Tensor], Tensor]  # (3, S, S) uint8 -> (3, S, S) uint8

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey (ITU-R BT.601), as in Pillow and torchvision
YIQ = torch.tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])  # grey and two axes of colour
RGB = torch.linalg.inv(YIQ)


def validate_scale(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1]:
        raise ValueError("expected the smallest and the largest size, above 0")
    return scale


Share = Annotated[float, Field(ge=0, le=1)]
Degrees = Annotated[float, Field(ge=0, lt=90)]
Level = Annotated[int, Field(ge=0, le=255)]
Scale = Annotated[tuple[float, float], AfterValidator(validate_scale)]


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed torch's generator and compute on one thread, as a worker does; afterwards both are as before."""
    generator, threads = torch.default_generator, torch.get_num_threads()
    state = generator.get_state()
    generator.manual_seed(seed)
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        generator.set_state(state)
        if threads > 1:
            torch.set_num_threads(threads)


def apply(augment: Augmentation, pixels: Tensor, seed: int) -> None:
    """Augment a picture in place.

    Args:
        augment: the augmentation.
        pixels: (S, S, 3) uint8.
        seed: of what it draws.

    Raises:
        UserError: it does not return a picture of the same kind.
    """
    image = pixels.permute(2, 0, 1)  # channels last in memory
    with drawing_from(seed):
        changed = augment(image)
    if not isinstance(changed, Tensor) or changed.shape != image.shape or changed.dtype != torch.uint8:
        found = f"{tuple(changed.shape)} {changed.dtype}" if isinstance(changed, Tensor) else type(changed).__name__
        raise UserError(f"augment returns {found}; it should return {tuple(image.shape)} torch.uint8, as it is given")
    image.copy_(changed)


def between(low: float, high: float, u: float) -> float:
    """Map u in [0, 1) to [low, high)."""
    return low + (high - low) * u


class Chain:
    """Several augmentations in turn.

    Args:
        steps: by name, in their order.

    Raises:
        ValueError: a step is no augmentation.
    """

    def __init__(self, **steps: Augmentation):
        self.steps = [step for name, step in steps.items() if is_augmentation(name, step)]

    def __call__(self, image: Tensor) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image


class BySource:
    """An augmentation for each source of a mix.

    Args:
        sources: by name of the source; those that are not named keep the crop alone.

    Raises:
        ValueError: one is no augmentation.
    """

    def __init__(self, **sources: Augmentation):
        self.names = [*sources]
        self.sources = {name: built for name, built in sources.items() if is_augmentation(name, built)}


def is_augmentation(name: str, built: Any) -> bool:
    """Whether a node builds an augmentation; an empty one, that of ``augment=none``, does not.

    Raises:
        ValueError: it builds something else.
    """
    if built != {} and not callable(built):
        raise ValueError(f"{name}={built!r}: expected a config node with a _target_, such as that of augment=flip")
    return bool(built)


def for_sources(augment: Augmentation | BySource | None, names: Sequence[str]) -> list[Augmentation | None]:
    """The augmentation of each source.

    Args:
        augment: one for all, or ``BySource``.
        names: of the sources of a mix; empty for other data.

    Raises:
        UserError: ``BySource`` names another source, or the one for all is no function.
    """
    if not isinstance(augment, BySource):
        if augment is not None and not callable(augment):
            raise UserError(
                f"augment is {augment!r}; its _target_ should return a function of a picture, or have _partial_: true"
            )
        return [augment] * max(1, len(names))
    if not names:
        raise UserError("augment=by_source is for the sources of data=mix; other data take one, such as augment=color")
    if wrong := [name for name in augment.names if name not in names]:
        raise UserError(f"augment.{wrong[0]}: the mix has no such source; there are {', '.join(names)}")
    return [augment.sources.get(name) for name in names]


class Flip:
    """Mirror left and right.

    Args:
        p: probability.
    """

    def __init__(self, p: Share = 0.5):
        self.p = p

    def __call__(self, image: Tensor) -> Tensor:
        return image.flip(-1) if torch.rand(()).item() < self.p else image


class Affine:
    """Rotation, shear, stretch, zoom and shift, in one bilinear resampling.

    Args:
        degrees: largest rotation, either way.
        shear: largest angle of the shear, degrees, either way.
        scale: smallest and largest size of what is shown.
        aspect: largest factor by which the ratio of width to height changes, either way; drawn on a log scale.
        translate: largest shift, as a share of the side.
        fill: grey level outside the picture.

    The order is that of torchvision's RandomAffine, which has no ``aspect``.
    """

    def __init__(
        self,
        degrees: Annotated[float, Field(ge=0, le=180)] = 15,
        shear: Degrees = 10,
        scale: Scale = (0.9, 1.3),
        aspect: Annotated[float, Field(ge=1)] = 1.16,
        translate: Share = 0.1,
        fill: Level = 255,
    ):
        self.degrees, self.shear, self.scale = degrees, shear, scale
        self.aspect, self.translate, self.fill = aspect, translate, fill

    def __call__(self, image: Tensor) -> Tensor:
        turn, lean, size, ratio, right, down = torch.rand(6).tolist()
        angle = math.radians(between(-self.degrees, self.degrees, turn))
        slope = math.tan(math.radians(between(-self.shear, self.shear, lean)))
        zoom, stretch = between(*self.scale, size), self.aspect ** between(-0.5, 0.5, ratio)
        shift = [between(-2 * self.translate, 2 * self.translate, u) for u in (right, down)]
        return warp(image, angle, slope, (zoom * stretch, zoom / stretch), shift, self.fill)


def warp(
    image: Tensor, angle: float, slope: float, zoom: tuple[float, float], shift: list[float], fill: float
) -> Tensor:
    """Zoom, shear, rotate (clockwise) and shift a picture about its center. (3, S, S) uint8 -> (3, S, S) uint8.

    Args:
        image: the picture.
        angle: radians.
        slope: tangent of the shear.
        zoom: factor of the width and of the height.
        shift: to the right and down, in halves of the side.
        fill: value outside the picture.
    """
    cos, sin, (x, y) = math.cos(angle), math.sin(angle), shift
    # the inverse of rotation @ [[1, -slope], [0, 1]] @ diag(zoom), as the grid says where each pixel comes from
    a, b = (cos - slope * sin) / zoom[0], (sin + slope * cos) / zoom[0]
    c, d = -sin / zoom[1], cos / zoom[1]
    side = image.shape[-1]
    axis = torch.arange(1 - side, side, 2) / side  # (S,), centers of the pixels, from -1 to 1
    right, down = axis - x, (axis - y)[:, None]
    grid = torch.stack([a * right + b * down, c * right + d * down])  # (2, S, S)
    filled = F.grid_sample(to_float(image)[None] - fill, grid.permute(1, 2, 0)[None], align_corners=False)[0]
    return to_uint8(filled + fill)  # outside the picture, the grid finds 0


class Color:
    """Brightness, contrast, saturation and hue in one matrix; sometimes no colour at all.

    Args:
        brightness: the factor is within 1 - brightness and 1 + brightness.
        contrast: the same, of the distance to the picture's mean grey.
        saturation: the same, of the distance to grey.
        hue: largest turn of the colours about the grey axis, either way, as a share of a full turn.
        grayscale: probability of a grey picture.

    Source: Chen et al. 2020, SimCLR, appendix A (arXiv 2002.05709).  As in torchvision's ColorJitter, but in a fixed
    order; hue is a rotation in YIQ, which keeps the brightness that HSV does not.
    """

    def __init__(
        self,
        brightness: Share = 0.4,
        contrast: Share = 0.4,
        saturation: Share = 0.4,
        hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1,
        grayscale: Share = 0.05,
    ):
        self.ranges, self.hue, self.grayscale = (brightness, contrast, saturation), hue, grayscale

    def __call__(self, image: Tensor) -> Tensor:
        *factors, turn, grey = torch.rand(5).tolist()
        brightness, contrast, saturation = (between(1 - r, 1 + r, u) for r, u in zip(self.ranges, factors, strict=True))
        angle = 2 * math.pi * between(-self.hue, self.hue, turn)
        return recolor(image, brightness, contrast, 0.0 if grey < self.grayscale else saturation, angle)


def recolor(image: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Change the colours of a picture; 1, 1, 1 and 0 radians change nothing. (3, S, S) uint8 -> (3, S, S) uint8."""
    sums = image.sum((1, 2)).tolist()
    mean = sum(weight * part for weight, part in zip(LUMA, sums, strict=True)) / image[0].numel()
    cos, sin = saturation * math.cos(hue), saturation * math.sin(hue)
    turn = RGB @ torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]) @ YIQ
    offset = brightness * (1 - contrast) * mean  # grey, which the turn leaves as it is
    changed = torch.addmm(torch.tensor(offset), brightness * contrast * turn, to_float(image).flatten(1))
    return to_uint8(changed).view(image.shape)


def to_float(image: Tensor) -> Tensor:
    """uint8 -> float32, each colour in a piece of memory of its own."""
    return image.to(torch.float32, memory_format=torch.contiguous_format)


def to_uint8(x: Tensor) -> Tensor:
    return x.round_().clamp_(0, 255).to(torch.uint8)


def randaugment(
    num_ops: PositiveInt = 2, magnitude: Annotated[int, Field(ge=0, le=30)] = 9, fill: Level = 255
) -> Augmentation:
    """torchvision's RandAugment.

    Args:
        num_ops: operations on each picture.
        magnitude: their strength.
        fill: grey level outside the picture.
    """
    from torchvision.transforms.v2 import RandAugment  # takes seconds to import

    return RandAugment(num_ops, magnitude, fill=fill)


def trivial(fill: Level = 255) -> Augmentation:
    """torchvision's TrivialAugmentWide.

    Args:
        fill: grey level outside the picture.
    """
    from torchvision.transforms.v2 import TrivialAugmentWide

    return TrivialAugmentWide(fill=fill)
