"""Layouts of published data sets: their pictures and captions."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from pydantic import PositiveFloat, PositiveInt

from clipx.data.files import open_text
from clipx.data.prepare.cells import Cell
from clipx.data.prepare.download import Download
from clipx.data.prepare.members import Member
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import INDEX_DIR, expand_home

logger = logging.getLogger("clipx")

COCO = "train2017/, val2017/ and annotations/captions_train2017.json, captions_val2017.json"
FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
FLICKR_FILES = ("results.csv", "results_20130124.token", "results.token")
FLICKR_ROW = re.compile(r"([^|#]+)[|#] *\d+ *[|\t]? *(.*)")  # of either file; one published row has no second |
CC3M_ROW = re.compile(r"([^\t]+)\t(https?://\S+)(?:\t.*)?")  # labels may follow


Picture: TypeAlias = str | Cell | Member  # path relative to the layout's root, or URL; table cell; member of a tar


class Item(NamedTuple):
    """A picture and its captions."""

    picture: Picture
    captions: list[str]


class Layout(NamedTuple):
    """Contents of a source."""

    root: Path
    splits: dict[str, list[Item]]  # train, val, test, as far as they exist
    download: Download = Download()  # how to fetch pictures given as URLs
    left_out: Sequence[Mapping[str, str]] = ()  # split, picture and reason of what was left out
    scores: Mapping[str, float] = {}  # quantiles of the scores of a curated source


class Tars(NamedTuple):
    """Existing shards."""

    root: Path
    shards: list[Path]
    caption_key: str | None
    index_dir: Path


def coco(src: str, karpathy: str | None = None) -> Layout:
    """COCO captions.

    Args:
        src: has train2017/, val2017/ and annotations/captions_train2017.json, captions_val2017.json, or those of one
            split.
        karpathy: dataset_coco.json, for its split; the pictures may also be in train2014/ and val2014/.

    Raises:
        DataError: the layout is another one.
    """
    root = directory(src)
    if karpathy:
        return Layout(root, read_karpathy(root, karpathy, ("train2014", "val2014", "train2017", "val2017")))
    splits = [split for split in ("train", "val") if (root / f"{split}2017").is_dir()]
    if not splits:
        raise DataError(f"src={src} has neither train2017/ nor val2017/; COCO's layout is {COCO}")
    return Layout(root, {split: read_coco(root, f"{split}2017") for split in splits})


def read_coco(root: Path, folder: str) -> list[Item]:
    """Return the pictures in order, with captions in the order of their ids."""
    with published_json(root / "annotations" / f"captions_{folder}.json") as content:
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        unmatched = []
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            if annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(annotation["caption"])
            else:
                unmatched.append(annotation["image_id"])
        if unmatched:
            logger.warning(
                "%s: %d captions belong to pictures that are not listed, such as image_id %s, and are left out",
                root / "annotations" / f"captions_{folder}.json",
                len(unmatched),
                unmatched[0],
            )
        return [Item(f"{folder}/{image['file_name']}", captions[image["id"]]) for image in content["images"]]


def flickr30k(src: str, karpathy: str | None = None) -> Layout:
    """Flickr30k.

    Args:
        src: has flickr30k-images/, flickr30k_images/ or images/, and results.csv or results_20130124.token.
        karpathy: dataset_flickr30k.json, for its captions and split; without it, all pictures are for training.

    Raises:
        DataError: the layout is another one.
    """
    root = directory(src)
    folders = [name for name in FLICKR_FOLDERS if (root / name).is_dir()]
    listings = [root / name for name in FLICKR_FILES if (root / name).is_file()]
    if not folders or not (listings or karpathy):
        raise DataError(
            f"src={src} does not have Flickr30k's layout: pictures in one of {', '.join(FLICKR_FOLDERS)}, "
            f"captions in one of {', '.join(FLICKR_FILES)}"
        )
    if karpathy:
        return Layout(root, read_karpathy(root, karpathy, folders))
    rows = match_lines(listings[0], FLICKR_ROW, "PICTURE|NUMBER|CAPTION", header="image_name|")
    return Layout(root, {"train": gather((f"{folders[0]}/{name.strip()}", caption) for name, caption in rows)})


def read_karpathy(root: Path, file: str, folders: Iterable[str]) -> dict[str, list[Item]]:
    """Read Karpathy's split of COCO or Flickr30k: train (with restval), val, test."""
    places = {name: folder for folder in folders if (root / folder).is_dir() for name in os.listdir(root / folder)}
    splits: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    with published_json(Path(file).expanduser()) as content:
        for image in content["images"]:
            name = image["filename"]
            if name not in places:
                name = name.rpartition("_")[2]  # COCO_val2014_000000391895.jpg was renamed 000000391895.jpg in 2017
            split = "train" if image["split"] == "restval" else image["split"]
            captions = [sentence["raw"] for sentence in image["sentences"]]
            splits[split].append(Item(f"{places.get(name, image.get('filepath', '.'))}/{name}", captions))
    return {split: items for split, items in splits.items() if items}


def cc3m(src: str, connections: PositiveInt = 64, timeout: PositiveFloat = 10.0) -> Layout:
    """Conceptual Captions.

    Args:
        src: has Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv with lines CAPTION<TAB>URL; or is such
            a file, for training.
        connections: parallel downloads.
        timeout: seconds to wait for a server.

    Raises:
        DataError: the layout is another one.
    """
    path = Path(src).expanduser()
    found = (
        {"train": [path]}
        if path.is_file()
        else {
            "train": sorted(path.glob("Train*.tsv")),
            "val": sorted(path.glob("Validation*.tsv")),
        }
    )
    splits = {
        split: gather((url, caption) for caption, url in match_lines(file, CC3M_ROW, "CAPTION<TAB>URL"))
        for split, files in found.items()
        for file in files[:1]
    }
    if not splits:
        raise DataError(f"src={src} has neither Train_GCC-training.tsv nor Validation_GCC-1.1.0-Validation.tsv")
    return Layout(path if path.is_dir() else path.parent, splits, Download(connections, timeout))


def shards(src: str, caption_key: str | None = None, index_dir: str = INDEX_DIR) -> Tars:
    """Existing shards, of clipx or any other tool.

    Args:
        src: has *.tar, or train/*.tar, val/*.tar, test/*.tar; or is a tar.
        caption_key: the key of ``.json`` with the captions; None for ``.txt``, else json's ``caption``.
        index_dir: directory of indexes that cannot be written next to their shard.

    Raises:
        DataError: there are none.
    """
    root = Path(src).expanduser()
    places = (root, root / "train", root / "val", root / "test")
    found = [root] if root.is_file() else [shard for place in places for shard in sorted(place.glob("*.tar"))]
    if not found:
        raise DataError(f"src={src} holds no shards (*.tar, train/*.tar, val/*.tar)")
    return Tars(root.parent if root.is_file() else root, found, caption_key, expand_home(index_dir))


def directory(src: str) -> Path:
    path = Path(src).expanduser()
    if not path.is_dir():
        raise DataError(f"src={src} is not a directory")
    return path


@contextmanager
def published_json(path: Path) -> Iterator[Any]:
    """Load a json file; errors in the ``with`` block mean that its structure is wrong."""
    try:
        yield json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not the published json: {type(error).__name__} {error}") from error


def match_lines(path: Path, pattern: re.Pattern[str], meant: str, header: str = "\0") -> list[tuple[str, str]]:
    """Return the two groups of each matching line; other lines are reported and left out, except a header."""
    found, unmatched = [], []
    with open_text(path) as file:
        for line in filter(None, map(str.strip, file)):
            if match := pattern.fullmatch(line):
                found.append((match[1], match[2]))
            elif not line.startswith(header):
                unmatched.append(line)
    if not found:
        raise DataError(f"{path} has no line of the form {meant}; its first line is {(unmatched or [''])[0][:60]!r}")
    if unmatched:
        logger.warning("%s: %d lines are not %s and are left out: %r", path, len(unmatched), meant, unmatched[0])
    return found


def gather(rows: Iterable[tuple[Picture, str | list[str]]]) -> list[Item]:
    """Group rows by picture, in the order of first appearance."""
    found: dict[Picture, list[str]] = {}
    for picture, said in rows:
        found.setdefault(picture, []).extend(said if isinstance(said, list) else [said])
    return [Item(picture, captions) for picture, captions in found.items()]
