"""Pictures inside parquet files, as bytes or as Hugging Face's {bytes, path}."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clipx.data.prepare.encode import read_file
from clipx.data.sample import MAX_IMAGE_BYTES, BadSample, check_bytes

if TYPE_CHECKING:
    from pyarrow import DataType

BATCH_ROWS = 16  # rows in memory at once


class Cell(NamedTuple):
    """A picture inside a table."""

    file: str  # relative to the layout's root
    column: str
    group: int  # of rows, which are compressed together
    row: int  # of the file

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


def holds_images(type: DataType) -> bool:
    """Whether a column holds picture bytes rather than paths or URLs."""
    from pyarrow import types

    if types.is_struct(type):
        return type.get_field_index("bytes") >= 0
    return types.is_binary(type) or types.is_large_binary(type)


def read_cells(root: Path, cells: Sequence[Cell]) -> list[Any]:
    """Return the value of each cell of one row group, for ``read_cell``; a BadSample if it cannot be had.

    Args:
        root: directory of the table.
        cells: all of the same file and group, in any order.

    Raises:
        OSError: the file cannot be read.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    path, group = root / cells[0].file, cells[0].group
    wanted = {cell.row for cell in cells}
    found: dict[int, Any] = {}
    broken = BadSample("there is no such row")
    try:
        with ParquetFile(path) as file:
            row = sum(file.metadata.row_group(before).num_rows for before in range(group))
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[cells[0].column]):
                for number in wanted.intersection(range(row, row + len(batch))):
                    found[number] = batch.column(0)[number - row].as_py()
                row += len(batch)
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        broken = BadSample(f"its part of the parquet file is corrupt: {str(error).splitlines()[0]}")
    return [found.get(cell.row, broken) for cell in cells]


def read_cell(root: Path, value: Any) -> bytes:
    """Return the bytes of a picture from the value of its cell, or from the path in it, which is relative to ``root``.

    Raises:
        BadSample: there are none.
    """
    if isinstance(value, BadSample):
        raise value
    file, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if file is not None:
        check_bytes("its picture", len(file), MAX_IMAGE_BYTES)
        return file
    if path is not None:
        return read_file(root, path)
    raise BadSample("its cell is empty")
