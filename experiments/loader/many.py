"""Time opening 41,455 shards with 414 million samples, looking up positions, and indexing headers.

    python experiments/loader/many.py DIR

The shards are sparse files with synthetic sizes; their catalogue is the one that opening writes.
"""

import os
import random
import statistics
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil

from clipx.data.catalogue import ROW, catalogue_paths
from clipx.data.shards import open_shards
from clipx.data.tar.index import FORMAT, scan, write_table

SHARDS = 41_455


def make(root: Path) -> None:
    """Write sparse shards and their catalogue."""
    root.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    shards, rows = [], np.zeros(SHARDS, ROW)
    for number, samples in enumerate(draw.integers(9_900, 10_100, SHARDS).tolist()):
        shard = root / f"{number:05d}.tar"
        shard.touch()
        os.truncate(shard, samples * 30_720)
        stat = shard.stat()
        rows[number] = (stat.st_size, stat.st_mtime_ns, samples, samples, samples, 0)
        shards.append(shard)
    write_table(catalogue_paths(shards, root), {"format": FORMAT}, rows)


def time_opening(root: Path) -> None:
    """Open the set, then look up positions in windows that are not cached."""
    process = psutil.Process()
    before, start = process.memory_full_info().uss, time.perf_counter()
    data = open_shards(str(root), val=0)
    plan = data.plan(seed=0)
    seconds, memory = time.perf_counter() - start, process.memory_full_info().uss - before
    print(f"{len(data.train.sizes):,} shards, {plan.samples:,} samples: open in {seconds:.2f} s, {memory / 1e6:.0f} MB")
    found = []
    for _ in range(40):
        position = random.Random(len(found)).randrange(100 * plan.samples)
        start = time.perf_counter()
        plan[position]
        found.append(1e3 * (time.perf_counter() - start))
    print(f"a position of any epoch: {statistics.median(found):.1f} ms, at most {max(found):.1f} ms")


def time_headers(shard: Path) -> None:
    """Index a tar of 50,000 samples with two members each, twenty times."""
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(50_000):
            for kind, size in (("jpg", 8_000), ("txt", 60)):
                info = tarfile.TarInfo(f"{number:09d}.{kind}")
                info.size = size
                tar.addfile(info, BytesIO(bytes(size)))
    rates = []
    for _ in range(20):
        start = time.perf_counter()
        scan(shard)
        rates.append(50_000 / (time.perf_counter() - start))
    print(f"headers: {statistics.median(rates):,.0f} samples a second on one core, at least {min(rates):,.0f}")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    if not any(root.glob("*.tar")):
        make(root)
    time_opening(root)
    time_headers(root.with_name(f"{root.name}-headers.tar"))
