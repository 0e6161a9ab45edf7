"""The embedded data set: emoji of several vendors, with their names. See LICENSES.md in this folder."""

from pathlib import Path

from typing_extensions import Unpack

from clipx.data.sample import Data, DataOptions
from clipx.data.shards import open_shards

HERE = Path(__file__).parent
THINGS = HERE / "things.txt"  # all names, one per line


def open_emoji(**options: Unpack[DataOptions]) -> Data:
    """Open the embedded shards.

    Args:
        options: as in ``Data``.
    """
    return open_shards(str(HERE), **options)
