"""Read the rows of a table: .csv, .tsv, .jsonl or .parquet."""

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from clipx.data.files import open_text
from clipx.data.prepare.cells import Cell, holds_images
from clipx.data.sample import MIN_BAD_LIMIT
from clipx.data.tar.headers import DataError

logger = logging.getLogger("clipx")

TEXT = "tables of text (.csv, .tsv)"


@dataclass(frozen=True)
class TextFormat:
    """Format of text tables."""

    sep: str | None = None  # None: a tab in .tsv, else a comma
    quote: str | None = None  # None: none with tabs, else "
    encoding: str = "utf-8"

    def of(self, path: Path) -> dict[str, Any]:
        """Return the arguments of csv.reader for a file."""
        sep = "\t" if self.sep == r"\t" else self.sep or ("\t" if path.suffix == ".tsv" else ",")
        quote = self.quote if self.quote is not None else "" if sep == "\t" else '"'
        return {"delimiter": sep, "quotechar": quote or None, "quoting": csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE}


def read_rows(
    path: Path, columns: tuple[str, str], form: TextFormat, max_bad: float
) -> tuple[list[tuple[str | Cell, list[str]]], list[dict[str, str]]]:
    """Read the rows of a table that have a picture.

    Args:
        path: of the table.
        columns: of the picture and the caption.
        form: format of text tables.
        max_bad: share of the rows that may be unreadable; ten always may.

    Returns:
        Picture and captions of each row, and a report of each unreadable row.

    Raises:
        DataError: the table has another format, or too many unreadable rows.
    """
    bad: list[dict[str, str]] = []
    if path.suffix == ".parquet":
        rows = list(parquet_rows(path, columns))
    elif path.suffix == ".jsonl":
        rows = list(jsonl_rows(path, columns, bad))
    else:
        rows = list(csv_rows(path, columns, form, bad))
    if len(bad) > max(MIN_BAD_LIMIT, max_bad * (len(rows) + len(bad))):
        raise DataError(
            f"{path}: {len(bad):,} of {len(rows) + len(bad):,} rows cannot be read, such as "
            f"{bad[0]['picture']}, which {bad[0]['reason']}; check the separator and quotation marks "
            "(source=csv has source.sep and source.quote), or leave such rows out with source.max_bad=1"
        )
    named = [row for row in rows if row[0]]
    if len(named) < len(rows):
        logger.warning("%s: %d rows have no picture and are left out", path, len(rows) - len(named))
    unmatched = next((name for name, _ in named if not isinstance(name, str | Cell)), None)
    if unmatched is not None:
        raise DataError(
            f"source.image={columns[0]} holds {type(unmatched).__name__} in {path}, not paths, URLs or pictures"
        )
    return [(name, texts(said, f"source.caption={columns[1]} holds %s in {path}")) for name, said in named], bad


def check_effect(of: Callable[..., Any], given: Mapping[str, Any], place: object, only: str) -> None:
    """Refuse keys of a source that have no effect.

    Args:
        of: the source, whose signature has the defaults.
        given: values by key.
        place: the data they have no effect on.
        only: the data they apply to.

    Raises:
        DataError: a value is not the default.
    """
    for key, value in given.items():
        if value != signature(of).parameters[key].default:
            raise DataError(f"source.{key}={value} has no effect on {place}, only on {only}; leave it out")


def csv_rows(
    path: Path, columns: tuple[str, str], form: TextFormat, bad: list[dict[str, str]]
) -> Iterator[tuple[str, str]]:
    """Yield picture and caption of each row; add unreadable rows to ``bad``."""
    how, long = form.of(path), []  # first line of each multi-line row
    try:
        with open_text(path, form.encoding) as file:
            reader = csv.reader(file, strict=True, **how)
            header = next(reader, [])
            check_columns(path, columns, header)
            places = [header.index(column) for column in columns]
            while True:
                line = reader.line_num + 1
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    if str(error) == "unexpected end of data":
                        raise DataError(
                            f"{path}, line {line}: a quotation mark is never closed; close it, or read "
                            "quotation marks as text: source.quote=''"
                        ) from error
                    bad.append(bad_row(path, line, f"cannot be parsed: {error}"))
                    continue
                if row is None:
                    break
                if reader.line_num > line:
                    long.append(line)
                if any(row[len(header) :]):
                    bad.append(bad_row(path, line, f"has more fields than the header: {len(row)}, not {len(header)}"))
                elif row and max(places) >= len(row):
                    bad.append(bad_row(path, line, f"has fewer fields than the header: {len(row)}, not {len(header)}"))
                elif row:
                    yield row[places[0]], row[places[1]]
    except (csv.Error, TypeError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read with source.sep={how['delimiter']!r} and "
            f"source.quote={how['quotechar'] or ''!r}: {error}"
        ) from error
    if long:
        logger.warning(
            "%s: %d rows have multi-line fields, the first at line %d; if quotation marks are plain text "
            "there, add source.quote=''",
            path,
            len(long),
            long[0],
        )


def bad_row(path: Path, line: int, reason: str) -> dict[str, str]:
    return {"split": "train", "picture": f"{path.name}, line {line}", "reason": reason}


def jsonl_rows(path: Path, columns: tuple[str, str], bad: list[dict[str, str]]) -> Iterator[tuple[Any, Any]]:
    """Yield picture and caption of each line's object; add unreadable lines to ``bad``."""
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
    """Yield picture and caption of each row; a picture inside the table is a Cell."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow to be read: pip install 'clipx[parquet]'") from error
    image, caption = columns
    try:
        with ParquetFile(path) as file:
            check_columns(path, columns, file.schema_arrow.names)
            inside = holds_images(file.schema_arrow.field(image).type)
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(row_groups=[group], columns=[caption] if inside else [image, caption]):
                    rows = range(row, row + len(batch))
                    pictures = (
                        [Cell(path.name, image, group, number) for number in rows]
                        if inside
                        else batch.column(image).to_pylist()
                    )
                    yield from zip(pictures, batch.column(caption).to_pylist(), strict=True)
                    row += len(batch)
    except ArrowException as error:
        raise DataError(f"{path} is not a complete parquet file: {str(error).splitlines()[0]}") from error


def check_columns(path: Path, columns: tuple[str, str], there: Iterable[str]) -> None:
    for key, column in zip(("image", "caption"), columns, strict=True):
        if column not in there:
            raise DataError(f"source.{key}={column}: {path} has no such column; there are {', '.join(there) or 'none'}")


def texts(value: Any, where: str) -> list[str]:
    """Return the captions in a cell; none if it is empty or NaN.

    Raises:
        DataError: it is neither text nor a list of texts.
    """
    several = value if isinstance(value, list) else [value]
    there = [text for text in several if text is not None and text == text]  # NaN is unequal to itself
    unmatched = next((text for text in there if not isinstance(text, str)), None)
    if unmatched is not None:
        raise DataError(f"{where % type(unmatched).__name__}, not text or lists of text; choose a text column")
    return there
