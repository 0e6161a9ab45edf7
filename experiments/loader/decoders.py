"""Time libraries that decode, crop and resize a 640 x 480 JPEG, on one core, alternating.

pip install opencv-python-headless
python experiments/loader/decoders.py
"""

import io
import random
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import open_clip
import simplejpeg
import torch
import torchvision
from photos import photo
from PIL import Image

from clipx.data.images import TrainCrop
from clipx.preprocessing import Preprocessing

SIZE, BOX = 224, (10, 12, 600, 460)  # left, top, width, height of the crop
ROUNDS, FILES = 9, 48


def region(pixels: np.ndarray, shrink: int = 1) -> np.ndarray:
    left, top, width, height = (side // shrink for side in BOX)
    return pixels[top : top + height, left : left + width]


def pillow_resize(image: Image.Image, shrink: int = 1) -> Image.Image:
    left, top, width, height = (side / shrink for side in BOX)
    return image.resize((SIZE, SIZE), Image.BICUBIC, box=(left, top, left + width, top + height))


def torch_bicubic(pixels: np.ndarray) -> torch.Tensor:
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bicubic", antialias=True)


def opencv_area(pixels: np.ndarray) -> np.ndarray:
    return cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def pillow_decode(file: bytes, draft: bool = False) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    if draft:
        image.draft("RGB", (320, 240))
    return image.convert("RGB")


def simplejpeg_decode(file: bytes, shrink: int = 1) -> np.ndarray:
    return simplejpeg.decode_jpeg(file, "RGB", min_height=480 // shrink, min_width=640 // shrink, min_factor=shrink)


def torchvision_decode(file: bytes) -> np.ndarray:
    return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8)).permute(1, 2, 0).numpy()


def opencv_decode(file: bytes, flags: int) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(file, np.uint8), flags)


def clipx_crop(decode: str) -> Callable[[bytes], None]:
    crop, out = TrainCrop(Preprocessing(SIZE), (0.9, 1.0), decode), torch.empty(SIZE, SIZE, 3, dtype=torch.uint8)
    return lambda file: crop(file, random.Random(0), out)


def main() -> None:
    """Print a line for each combination."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    peer = open_clip.image_transform((SIZE, SIZE), is_train=True)
    ways: dict[str, Callable[[bytes], object]] = {
        "open_clip's transform": lambda file: peer(Image.open(io.BytesIO(file))),
        "decode: Pillow": pillow_decode,
        "decode: torchvision": torchvision_decode,
        "decode: OpenCV": lambda file: opencv_decode(file, cv2.IMREAD_COLOR_RGB),
        "decode: simplejpeg": simplejpeg_decode,
        "decode: Pillow at half size": lambda file: pillow_decode(file, draft=True),
        "decode: simplejpeg at half size": lambda file: simplejpeg_decode(file, 2),
        "Pillow, Pillow": lambda file: pillow_resize(pillow_decode(file)),
        "simplejpeg, Pillow": lambda file: pillow_resize(Image.fromarray(simplejpeg_decode(file))),
        "OpenCV, OpenCV area": lambda file: opencv_area(region(opencv_decode(file, cv2.IMREAD_COLOR_RGB))),
        "simplejpeg, torch uint8 bicubic": lambda file: torch_bicubic(region(simplejpeg_decode(file))),
        "Pillow half, Pillow": lambda file: pillow_resize(pillow_decode(file, draft=True), 2),
        "OpenCV half, OpenCV area": lambda file: opencv_area(
            region(opencv_decode(file, cv2.IMREAD_REDUCED_COLOR_2), 2)
        ),
        "simplejpeg half, OpenCV area": lambda file: opencv_area(region(simplejpeg_decode(file, 2), 2)),
        "simplejpeg half, torch uint8 bicubic": lambda file: torch_bicubic(region(simplejpeg_decode(file, 2), 2)),
        "clipx, decode=exact": clipx_crop("exact"),
        "clipx, decode=fast": clipx_crop("fast"),
    }
    files = [photo(seed) for seed in range(FILES)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            for file in files:
                way(file)
            seconds[name].append((time.perf_counter() - start) / FILES)
    base = statistics.median(seconds["open_clip's transform"])
    print(f"{statistics.mean(map(len, files)) / 1e3:.0f} kB a picture")
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"{name:<38} {1e6 * median:6.0f} us  {1 / median:6.0f}/s  {base / median:5.2f}")


if __name__ == "__main__":
    main()
