"""Tables of pictures and captions."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from clipx.data.prepare.cells import Cell
from clipx.data.prepare.download import Download, is_url
from clipx.data.prepare.layouts import Layout, gather
from clipx.data.prepare.rows import TEXT, TextFormat, check_effect, read_rows
from clipx.data.tar.headers import DataError

Share = Annotated[float, Field(ge=0, le=1)]


def table(
    src: str,
    image: str,
    caption: str,
    sep: str | None = None,
    quote: str | None = None,
    encoding: str = "utf-8",
    max_bad: Share = 0.01,
    connections: PositiveInt = 64,
    timeout: PositiveFloat = 10.0,
) -> Layout:
    """A table of pictures and captions.

    Args:
        src: a .csv, .tsv, .jsonl or .parquet file, or a directory of .parquet files.
        image: column of the picture: a path relative to the table, a URL or, in .parquet, its bytes.
        caption: column of the caption or a list of captions; rows of the same picture are merged.
        sep: column separator; None: a tab in .tsv, else a comma.
        quote: quotation mark, empty for none; None: none with tabs, else ``"``.
        encoding: of .csv and .tsv.
        max_bad: share of the rows that may be unreadable; ten always may.
        connections: parallel downloads.
        timeout: seconds to wait for a server.

    Raises:
        DataError: the table has another format or too many unreadable rows, or a key has no effect on it.
    """
    path = Path(src).expanduser()
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise DataError(f"src={src} is neither a .csv, .tsv, .jsonl or .parquet file nor a directory of .parquet files")
    kind = files[0].suffix
    if kind in (".jsonl", ".parquet"):
        check_effect(table, {"sep": sep, "quote": quote, "encoding": encoding}, path, TEXT)
    if kind == ".parquet":
        check_effect(table, {"max_bad": max_bad}, path, f"{TEXT} and .jsonl")
    rows, bad = [], []
    for file in files:
        named, unreadable = read_rows(file, (image, caption), TextFormat(sep, quote, encoding), max_bad)
        rows += named
        bad += unreadable
    if not any(is_url(picture) for picture, _ in rows):
        check_effect(table, {"connections": connections, "timeout": timeout}, path, "pictures that are URLs")
    if len({isinstance(picture, Cell) for picture, _ in rows}) > 1:
        raise DataError(
            f"source.image={image} holds pictures in some files of {path} and paths or URLs in others; "
            "pack them separately"
        )
    root = path if path.is_dir() else path.parent
    return Layout(root, {"train": gather(rows)}, Download(connections, timeout), bad)
