import io
import pickle
import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from clipx.data.images import (
    ORIENTATION,
    Normalise,
    TrainCrop,
    crop_box,
    decode,
    eval_crop,
    get_image_transform,
)
from clipx.data.sample import BadSample
from clipx.preprocessing import MEAN, STD, Preprocessing

RED, BLUE = (200, 30, 40), (10, 60, 220)


def halves(mode: str = "RGB") -> Image.Image:
    """60 x 40 pixels, red on the left and blue on the right."""
    image = Image.new("RGB", (60, 40), RED)
    image.paste(BLUE, (30, 0, 60, 40))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corner_colours(file: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    image = decode(file)
    assert image.mode == "RGB"
    return image.getpixel((3, 3)), image.getpixel((image.width - 4, image.height - 4))


@pytest.mark.parametrize(
    "file",
    [
        encoded(halves(), "png"),
        encoded(halves().quantize(4), "png"),
        encoded(halves(), "webp", lossless=True),
        encoded(halves(), "jpeg", quality=95),
        encoded(halves("CMYK"), "jpeg", quality=95),
        encoded(halves("RGBA"), "png"),
    ],
    ids=["png", "palette", "webp", "jpeg", "cmyk", "rgba"],
)
def test_every_kind_of_file_shows_its_colours(file: bytes) -> None:
    for actual, expected in zip(corner_colours(file), (RED, BLUE), strict=True):
        assert np.abs(np.subtract(actual, expected)).max() <= 12


def test_grey_of_8_and_16_bits_is_grey() -> None:
    eight = Image.new("L", (8, 8), 100)
    sixteen = Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))
    for image in (eight, sixteen, Image.new("LA", (8, 8), (100, 255))):
        assert decode(encoded(image, "png")).getpixel((4, 4)) == (100, 100, 100)


def test_what_is_transparent_is_white() -> None:
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    translucent = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9])
    assert decode(encoded(transparent, "png")).getpixel((4, 4)) == (255, 255, 255)
    assert decode(encoded(translucent, "webp", lossless=True)).getpixel((4, 4)) == (127, 127, 127)
    assert decode(encoded(palette, "png", transparency=0)).getpixel((4, 4)) == (255, 255, 255)
    keyed = encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "png", transparency=(1, 2, 3))
    assert decode(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_is_turned_as_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise
    image = decode(encoded(halves(), "jpeg", exif=exif, quality=95))
    assert image.size == (40, 60)
    assert np.abs(np.subtract(image.getpixel((20, 5)), RED)).max() <= 12


@pytest.mark.parametrize("file", [b"", b"no picture", encoded(halves(), "png")[:90], encoded(halves(), "jpeg")[:300]])
def test_what_does_not_decode_is_a_bad_sample(file: bytes) -> None:
    with pytest.raises(BadSample, match="does not decode"):
        decode(file)


def test_a_bomb_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="400000000 pixels"):
        decode(encoded(Image.new("1", (20_000, 20_000)), "png"))


@pytest.mark.parametrize("size", [(60, 40), (41, 97), (32, 32), (300, 31)])
def test_the_eval_transform_equals_that_of_open_clip(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    expected = open_clip.image_transform(32, is_train=False)(image)
    torch.testing.assert_close(get_image_transform(32)(image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_evaluation_sees_is_what_open_clip_sees_to_one_grey_level(kind: str, mode: str) -> None:
    file = encoded(photo(333, 247).convert(mode), kind)
    transform = open_clip.image_transform(64, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    expected = transform(Image.open(io.BytesIO(file)))
    actual = np.asarray(eval_crop(decode(file), 64)).astype(int)
    assert np.abs(actual - 255 * expected.permute(1, 2, 0).numpy()).max() < 1.01


def test_normalised_pixels_have_the_published_mean_and_deviation() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in (MEAN, STD))
    expected = (pixels.double() / 255 - mean) / std
    torch.testing.assert_close(Normalise(Preprocessing(32))(pixels).double(), expected, atol=1e-5, rtol=0)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(64, 192, (12, 16, 3), np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((soft + rng.integers(-8, 9, soft.shape)).clip(0, 255).astype(np.uint8))


def cropped(file: bytes, size: int, scale: tuple[float, float], seed: int = 0, decode: str = "exact") -> np.ndarray:
    return apply(TrainCrop(Preprocessing(size), scale, decode), file, seed).numpy().astype(int)


def apply(crop: TrainCrop, file: bytes, seed: int) -> torch.Tensor:
    image = torch.empty(crop.size, crop.size, 3, dtype=torch.uint8)
    crop(file, random.Random(seed), image)
    return image


def test_a_training_crop_keeps_the_area_that_was_asked_for() -> None:
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100)[None], np.arange(100)[:, None]
    file, shares = encoded(Image.fromarray(ramp), "png"), []
    for seed in range(200):
        crop = cropped(file, 64, (0.3, 0.6), seed)
        width, height = np.ptp(crop[..., 0]) + 1, np.ptp(crop[..., 1]) + 1
        shares.append(width * height / 10_000)
        assert 0.7 < width / height < 1.45
    assert 0.27 < min(shares) < 0.35 and 0.55 < max(shares) < 0.65


def test_a_crop_depends_on_its_generator_alone() -> None:
    crop = TrainCrop(Preprocessing(32), (0.5, 1.0), "fast")
    big, small = encoded(photo(300, 200), "jpeg"), encoded(photo(90, 70), "jpeg")
    first = apply(crop, small, 5)
    apply(crop, big, 6)  # fills the buffer that both crops share
    assert torch.equal(first, apply(crop, small, 5))
    assert torch.equal(first, apply(pickle.loads(pickle.dumps(crop)), small, 5))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("size", [(640, 480), (131, 177), (40, 30)])
def test_a_training_crop_is_pillows_to_one_grey_level(size: tuple[int, int], kind: str, mode: str) -> None:
    if (kind, mode) == ("png", "CMYK"):
        pytest.skip("PNG has no CMYK")
    file = encoded(photo(*size).convert(mode), kind)
    left, top, width, height = crop_box(*size, (0.5, 1.0), random.Random(3))
    expected = Image.open(io.BytesIO(file)).convert("RGB").crop((left, top, left + width, top + height))
    expected = np.asarray(expected.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(cropped(file, 64, (0.5, 1.0), 3) - expected).max() <= 1


@pytest.mark.parametrize("size", [(640, 480), (641, 479), (1999, 1500)])
def test_a_jpeg_decoded_smaller_looks_the_same(size: tuple[int, int]) -> None:
    file = encoded(photo(*size), "jpeg", quality=92)
    for seed in range(5):
        exact, fast = (cropped(file, 128, (0.6, 1.0), seed, decode) for decode in ("exact", "fast"))
        assert 0 < np.abs(exact - fast).mean() < 2.5


def test_a_jpeg_is_decoded_as_small_as_the_crop_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    crop = TrainCrop(Preprocessing(100), (0.9, 1.0), "fast")
    assert [crop.shrink(side, 2000) for side in (99, 199, 200, 399, 400, 799, 800, 1600)] == [1, 1, 2, 2, 4, 4, 8, 8]
    for shrink in (1, 2, 4, 8):
        pixels, actual = crop.decode_jpeg(encoded(photo(330, 250), "jpeg"), (330, 250), 1, shrink)
        assert actual == shrink and pixels.shape == (-(-250 // shrink), -(-330 // shrink), 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_training_crop_is_turned_as_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = encoded(photo(90, 60), "jpeg", exif=exif, quality=95)
    upright = encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(file))), "png")
    assert np.abs(cropped(file, 32, (0.5, 1.0)) - cropped(upright, 32, (0.5, 1.0))).max() <= 1


@pytest.mark.parametrize("size", [1, 2, 20, 400, 3000])
def test_a_jpeg_that_is_cut_short_is_a_bad_sample(size: int) -> None:
    with pytest.raises(BadSample, match="does not decode"):
        cropped(encoded(photo(200, 200), "jpeg")[:size], 32, (0.5, 1.0))


def test_a_jpeg_bomb_is_a_bad_sample() -> None:
    file = bytearray(encoded(photo(64, 64), "jpeg"))
    frame = file.find(b"\xff\xc0")
    file[frame + 5 : frame + 9] = b"\x4e\x20\x4e\x20"  # height and width
    with pytest.raises(BadSample, match="20000 x 20000 pixels"):
        cropped(bytes(file), 32, (0.5, 1.0))


def test_a_very_narrow_picture_still_gives_a_square() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 200, 3), np.uint8))
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        expected = np.asarray(RandomResizedCrop(16, (0.9, 1.0), interpolation=InterpolationMode.BICUBIC)(turned))
        assert np.abs(cropped(encoded(turned, "png"), 16, (0.9, 1.0)) - expected.astype(int)).max() <= 1
    assert eval_crop(Image.new("RGB", (400, 4)), 16).size == (16, 16)


def test_the_training_transform_varies() -> None:
    transform = get_image_transform(32, is_train=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    assert len({transform(image).numpy().tobytes() for _ in range(20)}) > 1  # some of the twenty may be equal
