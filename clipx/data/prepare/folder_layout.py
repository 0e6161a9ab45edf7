"""Folders of pictures to pack: with captions.txt, with one .txt per picture, or a Hugging Face imagefolder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from clipx.data.files import below, open_text
from clipx.data.folder import IMAGE_KINDS, match_names, read_listing
from clipx.data.prepare.layouts import Item, Layout, directory
from clipx.data.prepare.rows import TextFormat, check_effect, read_rows
from clipx.data.sample import VALIDATION
from clipx.data.tar.headers import DataError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an imagefolder


def folder(
    src: str,
    image: str = "file_name",
    caption: str = "text",
    encoding: str = "utf-8",
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01,
) -> Layout:
    """A folder, or train/ with val/ (or a name in ``VALIDATION``) and optionally test/.

    Args:
        src: has images/ and captions.txt with lines FILENAME<TAB>CAPTION; or, at any depth, pictures, each with a .txt
            of the same name, one caption per line; or is a Hugging Face imagefolder with metadata.csv, metadata.jsonl
            or metadata.parquet.
        image: metadata column of the picture's path.
        caption: metadata column of the caption or a list of captions.
        encoding: of captions.txt, .txt and metadata.csv.
        max_bad: share of the rows of metadata.csv and metadata.jsonl that may be unreadable; ten always may.

    Raises:
        DataError: the layout is another one, or a key has no effect on it.
    """
    root = directory(src)
    how = {"image": image, "caption": caption, "encoding": encoding, "max_bad": max_bad}
    splits, left_out = {}, []
    for split, part in find_parts(root).items():
        splits[split], without = read_part(root, part, how)
        left_out += [{**row, "split": split} for row in without]
    return Layout(root, splits, left_out=left_out)


def find_parts(root: Path) -> dict[str, Path]:
    """Return the directory of each split, or the root as training split."""
    train, others = root / "train", [name for name in VALIDATION if (root / name).is_dir()]
    if not train.is_dir() or not (others or has_listing(train)) or has_listing(root):
        return {"train": root}
    parts = {"train": train, **({"val": root / others[0]} if others else {})}
    return {**parts, "test": root / "test"} if "test" in others[1:] else parts


def has_listing(part: Path) -> bool:
    return any((part / name).is_file() for name in ("captions.txt", *METADATA))


def read_part(root: Path, part: Path, how: Mapping[str, Any]) -> tuple[list[Item], list[dict[str, str]]]:
    """Return the items of a folder, and a report of unlisted pictures and bad rows."""
    metadata = [part / name for name in METADATA if (part / name).is_file()]
    listing = part / "captions.txt"
    if metadata and not listing.is_file():
        return read_metadata(root, metadata[0], how)
    if listing.is_file() and (part / "images").is_dir():
        refuse_metadata_keys(listing, how)
        captions = read_listing(listing, how["encoding"])
        return match(root, part / "images", captions, listing.name)
    pictures = sorted(path for path in below(part) if path.suffix.lower() in IMAGE_KINDS)
    texts = [path.with_suffix(".txt") for path in pictures]
    if not any(text.is_file() for text in texts):
        raise DataError(
            f"{part} has neither images/ and captions.txt (lines FILENAME<TAB>CAPTION), nor pictures with "
            f"a .txt of the same name, nor {', '.join(METADATA)}"
        )
    refuse_metadata_keys(f"{part} with a .txt for each picture", how)
    return [
        Item(path.relative_to(root).as_posix(), lines_of(text, how["encoding"]) if text.is_file() else [])
        for path, text in zip(pictures, texts, strict=True)
    ], []


def refuse_metadata_keys(place: object, how: Mapping[str, Any]) -> None:
    given = {key: how[key] for key in ("image", "caption", "max_bad")}
    check_effect(folder, given, place, f"imagefolders ({', '.join(METADATA)})")


def read_metadata(root: Path, file: Path, how: Mapping[str, Any]) -> tuple[list[Item], list[dict[str, str]]]:
    """Like ``read_part``, for an imagefolder."""
    if file.suffix != ".csv":
        check_effect(folder, {"encoding": how["encoding"]}, file, "captions.txt, .txt and metadata.csv")
    if file.suffix == ".parquet":
        check_effect(folder, {"max_bad": how["max_bad"]}, file, "metadata.csv and metadata.jsonl")
    columns = (how["image"], how["caption"])
    rows, bad = read_rows(file, columns, TextFormat(encoding=how["encoding"]), how["max_bad"])
    captions: dict[str, list[str]] = {}
    for name, said in rows:
        if not isinstance(name, str):
            raise DataError(
                f"source.image={columns[0]} holds the bytes of pictures in {file}; pack it with: "
                f"source=csv src={file} source.image={columns[0]} source.caption={columns[1]}"
            )
        captions.setdefault(name, []).extend(said)
    items, unlisted = match(root, file.parent, captions, file.name)
    return items, [*bad, *unlisted]


def match(
    root: Path, images: Path, captions: Mapping[str, list[str]], listing: str
) -> tuple[list[Item], list[dict[str, str]]]:
    """Return the items of a listing by their names on disk, and the unlisted pictures."""
    where = images.relative_to(root)
    names, unlisted = match_names(images, captions)
    return [Item((where / names[name]).as_posix(), said) for name, said in captions.items()], [
        {"picture": (where / name).as_posix(), "reason": f"is not in {listing}"} for name in unlisted
    ]


def lines_of(path: Path, encoding: str) -> list[str]:
    """Return the non-empty lines of a text file."""
    with open_text(path, encoding) as file:
        return [line.strip() for line in file.read().split("\n") if line.strip()]
