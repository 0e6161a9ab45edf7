"""Write shards of synthetic photographs for measuring loaders: 640 x 480, about 85 kB of JPEG, one caption
with COCO's lengths (12 tokens on average, one in fifty of 23 to 50).

    python experiments/loader/photos.py DIR [SHARDS] [SAMPLES]

Clouds of noise at seven scales, a little grain, quality 92: as much work for a decoder and a resizer as a real picture.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

WIDTH, HEIGHT, QUALITY = 640, 480, 92
WORDS = [
    "a",
    "the",
    "old",
    "red",
    "small",
    "man",
    "woman",
    "dog",
    "street",
    "table",
    "on",
    "under",
    "beside",
    "with",
    "two",
    "birds",
    "near",
    "water",
    "green",
    "house",
]


def photo(seed: int) -> bytes:
    """Return a JPEG."""
    draw = np.random.default_rng(seed)
    clouds = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for scale in (4, 8, 16, 32, 64, 128, 240):
        coarse = draw.normal(size=(HEIGHT // scale + 2, WIDTH // scale + 2, 3)).astype(np.float32)
        planes = [Image.fromarray(coarse[..., colour]).resize((WIDTH, HEIGHT), Image.BICUBIC) for colour in range(3)]
        clouds += np.stack(planes, -1) * scale**0.8
    clouds = (clouds - clouds.min()) / np.ptp(clouds) * 255 + draw.normal(size=clouds.shape) * 6
    file = io.BytesIO()
    Image.fromarray(clouds.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=QUALITY)
    return file.getvalue()


def main(root: str, shards: int = 8, samples: int = 500) -> None:
    """Write the shards."""
    Path(root).mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for shard in range(shards):
        with open(Path(root) / f"photos-{shard:03d}.tar", "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for number in range(shard * samples, (shard + 1) * samples):
                words = draw.integers(20, 48) if draw.random() < 0.02 else draw.integers(6, 12)
                caption = " ".join(draw.choice(WORDS, words)) + "."
                tar.write({"__key__": f"{number:06d}", "jpg": photo(number % 400), "txt": caption.encode()})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
