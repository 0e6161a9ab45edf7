"""Spoil the embedded data set: a third of the captions go to other pictures, and a tenth of the pictures come twice.

    python experiments/curate/spoil.py OUT            writes OUT/train/*.tar
    python experiments/curate/spoil.py OUT CURATED    counts what prepare left out of it, from CURATED/dropped.jsonl

The key of a spoilt sample says what was done to it: shuffled-NUMBER or copy-NUMBER.
"""

import json
import random
import sys
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageEnhance
from webdataset import TarWriter

from clipx.data import emoji
from clipx.data.sample import Sample
from clipx.data.shards import open_shards

SHUFFLED, COPIED = 1 / 3, 1 / 10


def copy(file: bytes, draw: random.Random) -> bytes:
    """Another size, a slightly cut margin, another brightness, JPEG: what a picture goes through on the web."""
    image = Image.open(BytesIO(file)).convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    left, top, right, bottom = (draw.randint(0, 2) for _ in range(4))
    cut = white.crop((left, top, white.width - right, white.height - bottom))
    scale = draw.uniform(0.8, 1.25)
    resized = cut.resize((round(cut.width * scale), round(cut.height * scale)), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    ImageEnhance.Brightness(resized).enhance(draw.uniform(0.95, 1.05)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def spoil(out: Path) -> None:
    draw = random.Random(0)
    source = open_shards(str(Path(emoji.__file__).parent), val=0.0).train
    samples: list[Sample] = [source.read(number) for number in range(sum(source.sizes))]
    order = draw.sample(range(len(samples)), len(samples))
    shuffled = order[: round(SHUFFLED * len(order))]
    moved = set(shuffled)
    captions = {number: sample.captions for number, sample in enumerate(samples)}
    captions |= {one: samples[other].captions for one, other in zip(shuffled, shuffled[1:] + shuffled[:1], strict=True)}
    copied = sorted(order[-round(COPIED * len(order)) :])  # none of them shuffled
    (out / "train").mkdir(parents=True)
    with TarWriter(str(out / "train/000000.tar"), encoder=False) as tar:
        for number, sample in enumerate(samples):
            key = f"shuffled-{number}" if number in moved else f"true-{number}"
            write(tar, key, sample.picture, captions[number])
        for number in copied:
            write(tar, f"copy-{number}", copy(samples[number].picture, draw), captions[number])


def write(tar: TarWriter, key: str, picture: bytes, captions: list[str]) -> None:
    kind = "png" if picture.startswith(b"\x89PNG") else "webp" if picture[8:12] == b"WEBP" else "jpg"
    tar.write({"__key__": key, kind: picture, "json": json.dumps({"caption": captions}).encode()})


def count(out: Path, curated: Path) -> None:
    with tarfile.open(out / "train/000000.tar") as tar:
        totals = Counter(name.split("-")[0] for name in tar.getnames() if name.endswith(".json"))
    rows = map(json.loads, (curated / "dropped.jsonl").read_text().splitlines())
    found = Counter((row["reason"].partition(":")[0], Path(row["picture"]).name.split("-")[0]) for row in rows)
    for (reason, kind), number in sorted(found.items()):
        print(f"{reason}: {number} of {totals[kind]} {kind} ({number / totals[kind]:.1%})")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        spoil(Path(sys.argv[1]))
    else:
        count(Path(sys.argv[1]), Path(sys.argv[2]))
