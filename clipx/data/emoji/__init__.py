"""The embedded default: drawings of things by different houses, with their names.  See LICENSES.md beside this file."""

from pathlib import Path

from clipx.data.sample import Data
from clipx.data.shards import open_shards

HERE = Path(__file__).parent
THINGS = HERE / "things.txt"        # all names, one a line


def open_emoji(
    shuffle_window: int = 131_072, max_skipped: float = 0.01, crop: tuple[float, float] = (0.9, 1.0)
) -> Data:
    """The embedded shards.

    Args:
        shuffle_window: samples among which the plan shuffles.
        max_skipped: share of the samples that may be bad before the run ends.
        crop: share of a training picture's area that is kept, least and most.
    """
    return open_shards(str(HERE), shuffle_window=shuffle_window, max_skipped=max_skipped, crop=crop)
