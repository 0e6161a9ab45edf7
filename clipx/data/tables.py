"""Tables of pictures and captions: .csv, .tsv, .jsonl and .parquet."""

import csv
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from clipx.data.download import Download
from clipx.data.layouts import Layout, gather
from clipx.data.sample import LEAST_BAD
from clipx.data.tar import DataError

logger = logging.getLogger("clipx")


def table(
    src: str, image: str, caption: str, sep: str | None = None, quote: str | None = None, encoding: str = "utf-8",
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01, connections: PositiveInt = 64, timeout: PositiveFloat = 10.0,
) -> Layout:
    """Any table.

    Args:
        src: a .csv, .tsv, .jsonl or .parquet file, or a directory of .parquet files.
        image: its column with the picture: a path from where the table stands, or a URL.
        caption: its column with the caption, or with a list of them; rows of one picture are put together.
        sep: the separator of columns; None: a tab in .tsv, else a comma.
        quote: the quotation mark around fields, or an empty string; None: none between tabs, else ``"``.
        encoding: of .csv and .tsv.
        max_bad: share of the rows that may be unreadable, though ten always may.
        connections: downloads at once.
        timeout: seconds that a server may be silent.

    Raises:
        DataError: it is not such a table, or too many of its rows cannot be read.
    """
    path = Path(src).expanduser()
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise DataError(f"src={src} is neither a .csv, .tsv, .jsonl or .parquet file nor a directory of .parquet files")
    columns, rows, bad = (image, caption), [], []
    for file in files:
        if file.suffix == ".parquet":
            rows += parquet_rows(file, columns)
        elif file.suffix == ".jsonl":
            rows += jsonl_rows(file, columns, bad)
        else:
            rows += csv_rows(file, columns, csv_format(file, sep, quote), encoding, bad)
    if len(bad) > max(LEAST_BAD, max_bad * (len(rows) + len(bad))):
        raise DataError(f"{path}: {len(bad):,} of {len(rows) + len(bad):,} rows cannot be read, such as "
                        f"{bad[0]['picture']}, which {bad[0]['reason']}; check source.sep and source.quote, or leave "
                        "such rows out with source.max_bad=1")
    named = [row for row in rows if row[0]]
    if len(named) < len(rows):
        logger.warning("%s: %d rows name no picture and are left out", path, len(rows) - len(named))
    strange = next((name for name, _ in named if not isinstance(name, str)), None)
    if strange is not None:
        raise DataError(f"source.image={image} holds {type(strange).__name__} in {path}, not paths or URLs")
    checked = ((name, texts(value, f"source.caption={caption} holds %s in {path}")) for name, value in named)
    root = path if path.is_dir() else path.parent
    return Layout(root, {"train": gather(checked)}, Download(connections, timeout), bad)


def csv_format(path: Path, sep: str | None, quote: str | None) -> dict[str, Any]:
    """What csv.reader is told of a file's separator and quotation mark."""
    sep = "\t" if sep == r"\t" else sep or ("\t" if path.suffix == ".tsv" else ",")
    quote = quote if quote is not None else "" if sep == "\t" else '"'
    return {"delimiter": sep, "quotechar": quote or None, "quoting": csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE}


def csv_rows(
    path: Path, columns: tuple[str, str], form: dict[str, Any], encoding: str, bad: list[dict[str, str]]
) -> Iterator[tuple[str, str]]:
    """Picture and caption of each row; the rows that cannot be read go to ``bad``."""
    long = []       # first lines of rows of several lines
    try:
        with path.open(encoding="utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding, newline="") as file:
            reader = csv.reader(file, strict=True, **form)
            header = next(reader, [])
            check_columns(path, columns, header)
            places = [header.index(column) for column in columns]
            while True:
                line = reader.line_num + 1
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    if str(error) == "unexpected end of data":
                        raise DataError(f"{path}, line {line}: a quotation mark opens there and is never closed; close "
                                        "it, or read quotation marks as text: source.quote=''") from error
                    bad.append(bad_row(path, line, f"cannot be parsed: {error}"))
                    continue
                if row is None:
                    break
                if reader.line_num > line:
                    long.append(line)
                if any(row[len(header):]):
                    bad.append(bad_row(path, line, f"has more fields than the header: {len(row)}, not {len(header)}"))
                elif row and max(places) >= len(row):
                    bad.append(bad_row(path, line, f"has fewer fields than the header: {len(row)}, not {len(header)}"))
                elif row:
                    yield row[places[0]], row[places[1]]
    except (UnicodeError, LookupError) as error:
        raise DataError(f"{path} cannot be read as source.encoding={encoding} ({error}); give the encoding that it has,"
                        " such as source.encoding=cp1252") from error
    except (csv.Error, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read with source.sep={form['delimiter']!r} and "
                        f"source.quote={form['quotechar'] or ''!r}: {error}") from error
    if long:
        logger.warning("%s: %d rows have a field of several lines, the first in line %d; if quotation marks are only "
                       "text there, add source.quote=''", path, len(long), long[0])


def bad_row(path: Path, line: int, reason: str) -> dict[str, str]:
    return {"split": "train", "picture": f"{path.name}, line {line}", "reason": reason}


def jsonl_rows(path: Path, columns: tuple[str, str], bad: list[dict[str, str]]) -> Iterator[tuple[Any, Any]]:
    """Picture and caption of each line's object; the lines that cannot be read go to ``bad``."""
    first = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if first:
                    check_columns(path, columns, row.keys())
                    first = False
                yield row[columns[0]], row.get(columns[1])
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                bad.append(bad_row(path, number, f"is not an object with {columns[0]!r}: {error}"))


def parquet_rows(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow to be read: pip install 'clipx[parquet]'") from error
    try:
        with ParquetFile(path) as file:
            check_columns(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(columns=list(columns)):
                yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
    except ArrowException as error:
        raise DataError(f"{path} is not a whole parquet file: {str(error).splitlines()[0]}") from error


def check_columns(path: Path, columns: tuple[str, str], there: Iterable[str]) -> None:
    for key, column in zip(("image", "caption"), columns, strict=True):
        if column not in there:
            raise DataError(f"source.{key}={column}: {path} has no such column; there are {', '.join(there) or 'none'}")


def texts(value: Any, where: str) -> list[str]:
    """The captions in a cell: none where it is empty or NaN.

    Raises:
        DataError: it holds something else than text or a list of texts.
    """
    several = value if isinstance(value, list) else [value]
    there = [text for text in several if text is not None and text == text]     # NaN is unequal to itself
    strange = next((text for text in there if not isinstance(text, str)), None)
    if strange is not None:
        raise DataError(f"{where % type(strange).__name__}, not text or lists of text; name a column of text")
    return there
