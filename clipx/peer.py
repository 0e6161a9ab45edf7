"""open_clip's own data pipeline, as its training command makes it, and how any loader is measured.

Runs in a process of its own: ``python -m clipx.peer '{"shards": ..., ...}'``, with an older webdataset on its path.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader

ENOUGH = 10**9          # samples; the pipeline goes round the shards until nobody asks any more


def measure(batches: Iterable[Any], batch_size: int, seconds: float) -> dict[str, float]:
    """Pictures a second behind the first batch, and the private memory of a worker beyond that of an idle one.

    Args:
        batches: a loader with workers.
        batch_size: pictures of a batch.
        seconds: how long, at least.
    """
    idle = worker_memory(iter(DataLoader(range(2), num_workers=1)))
    waiting = iter(batches)
    next(waiting)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(waiting)
        count += 1
    rate = count * batch_size / (time.perf_counter() - began)
    return {"pictures_per_s": rate, "worker_mb": (worker_memory(waiting) - idle) / 1e6}


def worker_memory(_alive: Iterable[Any]) -> int:
    """Bytes that the largest child of this process shares with no other; the loader given is kept alive meanwhile."""
    return max(child.memory_full_info().uss for child in psutil.Process().children())


def open_clip_batches(shards: str, batch_size: int, workers: int, size: int) -> Iterable[Any]:
    """The loader of open_clip's training command."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    args = Namespace(
        train_data=shards, train_num_samples=ENOUGH, train_data_upsampling_factors=None, dataset_resampled=False,
        batch_size=batch_size, workers=workers, world_size=1, seed=0,
    )  # fmt: skip
    transform = open_clip.image_transform((size, size), is_train=True)
    return get_wds_dataset(args, transform, True, tokenizer=open_clip.SimpleTokenizer()).dataloader


def main() -> None:
    """Measure open_clip's loader and write the figures to standard output, as JSON."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    seconds = given.pop("seconds")
    sys.stdout.write(json.dumps(measure(open_clip_batches(**given), given["batch_size"], seconds)) + "\n")


if __name__ == "__main__":
    main()
