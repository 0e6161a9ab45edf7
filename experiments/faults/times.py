"""Measure how long a save of ViT-B/32 stops the loop, and how long resuming takes at distant positions.

python experiments/faults/times.py
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from clipx import clip_vit_b32
from clipx.data.dummy import Dummy
from clipx.data.images import TrainCrop
from clipx.data.loader import load_chunks, train_ranges
from clipx.data.plan import Plan
from clipx.data.readers import TrainReader
from clipx.data.sample import Sample
from clipx.optim import adamw
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer
from clipx.training.loop import State
from clipx.training.memory import keep_freed_memory
from clipx.weights.checkpoint import AsyncSaver, read

SHARDS, WINDOW, BATCH, WORKERS = 41_455, 131_072, 256, 2


class LargeDummy(Dummy):
    """As many shards and samples as LAION-400M, all samples the same."""

    def __init__(self) -> None:
        super().__init__(1, 64, 0)
        self.sizes = np.random.default_rng(0).integers(9_000, 10_300, SHARDS)
        self.sample = super().read(0)

    def read(self, sample: int) -> Sample:
        return self.sample


def time_saves(directory: Path) -> None:
    keep_freed_memory()
    model = clip_vit_b32()
    optimizer = adamw(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = State(model, optimizer, torch.amp.GradScaler("cpu"))
    blocked, written = [], []
    with AsyncSaver(directory, {}, previous=True) as saver:
        for _ in range(5):
            start = time.perf_counter()
            saver(state.state_dict(), ["last"])
            blocked.append(time.perf_counter() - start)
            saver.wait()
            written.append(time.perf_counter() - start)
    size = (directory / "clip_last.pt").stat().st_size
    start = time.perf_counter()
    read(directory / "clip_last.pt")
    loaded = time.perf_counter() - start
    print(
        f"save of {size / 1e9:.2f} GB: {statistics.median(blocked):.2f} s of the loop (first {blocked[0]:.2f} s), "
        f"{statistics.median(written):.2f} s until it is on disk; read and verified in {loaded:.2f} s"
    )


def time_resumes() -> None:
    source = LargeDummy()
    print(f"{SHARDS:,} shards of {source.sizes.sum():,} samples, {WORKERS} workers")
    for position in (0, 1_000_000, 400_000_000):
        start = time.perf_counter()
        plan = Plan(source.sizes, 0, WINDOW)
        reader = TrainReader(source, plan, TrainCrop(Preprocessing(32), (0.9, 1.0), "fast"), SimpleTokenizer())
        batches = load_chunks(reader, train_ranges(position, BATCH), WORKERS, pin=False)
        (chunk,) = itertools.islice(batches, 1)
        print(f"position {position:>11,}: first batch after {time.perf_counter() - start:.2f} s")
        assert chunk.position == position
        batches.close()


if __name__ == "__main__":
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        time_saves(Path(folder))
    time_resumes()
