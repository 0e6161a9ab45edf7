"""Build the emoji data set: the same things drawn by three houses, as WebDataset shards.

Fetch the four packages, then build it into the package:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    python experiments/emoji/build.py . clipx/data/emoji

With the library versions of versions.json the shards come out the same to the byte.
phrases.json says how names read in a sentence; who drew what, and under which licence: LICENSES.md.
"""

import argparse
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from PIL import Image, features
from webdataset import TarWriter


@dataclass(frozen=True)
class House:
    """Where a package keeps its drawings, and how much of their canvas is margin."""

    archive: str
    folder: str
    margin: float  # of the width, on each side


# The first two fill 97 to 100 % of the canvas, Fluent 87.5 %: cutting a margin makes it 97 % as well.
HOUSES = {
    "noto": House("emoji-datasource-google-16.0.0.tgz", "package/img/google/64/", 0.0),
    "twemoji": House("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/", 0.0),
    "fluent": House("lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets/", 12 / 256),
}
NAMES = "emojibase-data-17.0.0.tgz"
GROUPS = (3, 4, 5, 6, 7)  # emojibase: animals & nature, food & drink, travel & places, activities, objects
SIZE = 64  # pixels
FAINT = 24  # alpha, of 255; fainter pixels are the soft edge of a shadow
TRAIN_SHARDS = 4

# All lossless would be 11 MB.  Tar blocks have 512 bytes, so each picture gets the best step of this
# ladder that fits two blocks, or the last step if none does: 6.7 MB.
LADDER = (
    {"lossless": True, "quality": 90},  # effort here: 100 is ten times slower and 2 % smaller
    {"quality": 95},
    {"quality": 90},
    {"quality": 85},
    {"quality": 80},
)
TWO_BLOCKS = 1024  # bytes

LEADS = (
    "a drawing of {phrase}, on a page about {theme}",
    "a small picture of {phrase}, from a set about {theme}",
    "an illustration of {phrase} for a book about {theme}",
)
MAX_TAGS = 6


@dataclass(frozen=True)
class Thing:
    """One row of emojibase, with ``phrase`` ("an ox", "grapes") and ``theme`` ready for a sentence."""

    name: str
    hexcode: str
    group: str
    phrase: str
    theme: str
    tags: tuple[str, ...]


def read_members(archive: Path, folder: str) -> dict[str, bytes]:
    """Read the files of ``archive`` directly inside ``folder``, by file name."""
    members = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.rpartition("/")[0] + "/" == folder:
                members[member.name.removeprefix(folder)] = tar.extractfile(member).read()
    return members


def plain_hexcode(hexcode: str) -> str:
    """Lower case, without the variation selector, which not all houses write."""
    return hexcode.lower().replace("-fe0f", "")


def read_drawings(packages: Path, house: House) -> dict[str, bytes]:
    """Read every drawing of a house, by hexcode."""
    members = read_members(packages / house.archive, house.folder)
    return {plain_hexcode(name.partition(".")[0]): data for name, data in members.items()}


def read_things(packages: Path) -> list[Thing]:
    """Read the rows of GROUPS in emojibase's order; skin tones are nested in a row, so none is included."""
    files = read_members(packages / NAMES, "package/en/")
    messages = json.loads(files["messages.json"])
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    # Two subgroups carry number 46, seafood and then sweets; seafood is empty, and the later one wins.
    subgroups = {subgroup["order"]: subgroup["message"] for subgroup in messages["subgroups"]}
    wording = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))
    rows = [row for row in json.loads(files["data.json"]) if row.get("group") in GROUPS]
    check_wording(wording, {row["label"] for row in rows}, set(subgroups.values()))
    return [
        Thing(
            name=row["label"],
            hexcode=plain_hexcode(row["hexcode"]),
            group=groups[row["group"]],
            phrase=noun_phrase(row["label"], wording),
            theme=theme(subgroups[row["subgroup"]], wording),
            tags=tuple(informative_tags(row["label"], row["tags"], wording["unsaid"])),
        )
        for row in sorted(rows, key=lambda row: row["order"])
    ]


def check_wording(wording: dict, names: set[str], subgroups: set[str]) -> None:
    """Check that every entry of phrases.json belongs to a name or subgroup."""
    unknown = {*wording["bare"], *wording["phrases"]} - names | wording["themes"].keys() - subgroups
    if unknown:
        raise ValueError(f"phrases.json: not in {NAMES}: {', '.join(sorted(unknown))}")


def noun_phrase(name: str, wording: dict) -> str:
    """The name as in a sentence: with a/an, unless phrases.json says otherwise."""
    if name in wording["phrases"]:
        return wording["phrases"][name]
    if name in wording["bare"]:
        return name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def theme(subgroup: str, wording: dict) -> str:
    return wording["themes"].get(subgroup, subgroup.replace("&", "and"))


def informative_tags(name: str, tags: list[str], unsaid: list[str]) -> Iterator[str]:
    """Informative tags: without the name's own words, slang, single letters and signs."""
    skipped = {name.lower(), *re.split(r"[^\w’]+", name.lower()), *unsaid}
    return (tag for tag in tags if tag.lower() not in skipped and re.fullmatch(r"[\w’: -]{2,}", tag))


def captions(thing: Thing, key: str) -> list[str]:
    """The name as emojibase spells it, a sentence, and the name with its tags (or where it belongs)."""
    lead = LEADS[rank(key)[-1] % len(LEADS)]
    about = thing.tags[:MAX_TAGS] or (thing.theme, thing.group)
    sentence = lead.format(phrase=thing.phrase, theme=thing.theme)
    return [thing.name, *(plain_text(text) for text in (sentence, f"{thing.name}: {', '.join(about)}"))]


def plain_text(text: str) -> str:
    return text.lower().replace("’", "'")


def rank(key: str) -> bytes:
    """A hash of a key, which orders, splits and varies the data set."""
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def square(image: Image.Image) -> Image.Image:
    """Centre the image on a transparent square canvas."""
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def cut_margin(image: Image.Image, margin: float) -> Image.Image:
    """Cut ``margin`` of the width from all four sides, or less if it would cut into the drawing."""
    left, top, right, bottom = image.getchannel("A").point(lambda alpha: 255 * (alpha > FAINT)).getbbox()
    room = min(left, top, image.width - right, image.height - bottom)
    edge = min(room, round(margin * image.width))
    return image.crop((edge, edge, image.width - edge, image.height - edge))


def flatten(drawing: bytes, margin: float) -> Image.Image:
    """Put a drawing on white, SIZE pixels a side."""
    image = cut_margin(square(Image.open(io.BytesIO(drawing)).convert("RGBA")), margin)
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def encode(image: Image.Image) -> bytes:
    for step in LADDER:
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", method=6, **step)
        if buffer.tell() <= TWO_BLOCKS:
            break
    return buffer.getvalue()


def make_sample(thing: Thing, house: str, drawing: bytes) -> dict[str, str | bytes]:
    key = f"{house}-{thing.hexcode}"
    text = {"caption": captions(thing, key), "house": house, "group": thing.group, "hexcode": thing.hexcode}
    return {
        "__key__": key,
        "webp": encode(flatten(drawing, HOUSES[house].margin)),
        "json": json.dumps(text, ensure_ascii=False).encode(),
    }


def write_shard(path: Path, samples: list[dict[str, str | bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file, user="clipx", group="clipx", encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)


def write_shards(out: Path, samples: list[dict[str, str | bytes]]) -> dict[str, int]:
    """Hold out the lowest tenth by rank and write both splits in that order; return samples by shard."""
    ranked = sorted(samples, key=lambda sample: rank(sample["__key__"]))
    held_out = round(len(ranked) / 10)
    shards = {"val/emoji-val-000000.tar": ranked[:held_out]}
    for i in range(TRAIN_SHARDS):
        shards[f"train/emoji-train-{i:06d}.tar"] = ranked[held_out + i :: TRAIN_SHARDS]
    for name, part in shards.items():
        write_shard(out / name, part)
    return {name: len(part) for name, part in shards.items()}


def write_versions(out: Path, shards: list[str]) -> None:
    """Write the versions that the bytes depend on, and their checksums."""
    archives = [*(house.archive for house in HOUSES.values()), NAMES]
    versions = {
        "packages": dict(archive.removesuffix(".tgz").rsplit("-", 1) for archive in archives),
        "libraries": {name: version(name) for name in ("Pillow", "webdataset", "numpy")}
        | {"libwebp": features.version("webp")},
        "sha256": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in sorted(shards)},
    }
    (out / "versions.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")


def shared_things(things: list[Thing], drawings: dict[str, dict[str, bytes]]) -> list[Thing]:
    """Return the things that every house has drawn.

    Raises:
        ValueError: two of them have the same name.
    """
    shared = [thing for thing in things if all(thing.hexcode in house for house in drawings.values())]
    twice = [name for name, count in Counter(thing.name for thing in shared).items() if count > 1]
    if twice:
        raise ValueError(f"{NAMES}: more than one thing is called {', '.join(twice)}")
    return shared


def build(packages: Path, out: Path) -> dict[str, int]:
    """Write shards, things.txt and versions.json below ``out``; return samples by shard."""
    drawings = {name: read_drawings(packages, house) for name, house in HOUSES.items()}
    things = shared_things(read_things(packages), drawings)
    samples = [make_sample(thing, house, drawings[house][thing.hexcode]) for thing in things for house in HOUSES]
    shards = write_shards(out, samples)
    (out / "things.txt").write_text("".join(f"{thing.name}\n" for thing in things), encoding="utf-8")
    write_versions(out, list(shards))
    return shards


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the emoji data set from four npm packages.")
    parser.add_argument("packages", type=Path, help="folder with the .tgz files of npm pack")
    parser.add_argument("out", type=Path, help="folder for train/, val/, things.txt and versions.json")
    args = parser.parse_args()
    shards = build(args.packages, args.out)
    print(f"{sum(shards.values()) // len(HOUSES)} things, {sum(shards.values())} pictures")
    for name, count in sorted(shards.items()):
        print(f"{name}: {count} samples, {(args.out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
