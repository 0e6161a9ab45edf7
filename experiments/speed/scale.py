"""Measure how the cost of a step and of the loss scales with batch, tokens and ranks.

    python experiments/speed/scale.py OUT.json [batch|tokens|ranks|loss ...]

Each figure is measured in a new process.  ``small`` at 64 pixels on synthetic pictures, two threads, float32.
``python experiments/speed/scale.py OUT.json plot`` draws OUT.png from OUT.json.
"""

import gc
import json
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from against_open_clip import in_process
from hydra import compose, initialize_config_module
from torch import Tensor
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from clipx.config.resolve import resolve
from clipx.config.schema import TrainConfig
from clipx.loss import clip_loss
from clipx.models.packed import pack, unpad
from clipx.tools.measure import StepBenchmark, make_reader
from clipx.training.batch import split_micro_batches
from clipx.training.memory import keep_freed_memory
from clipx.training.parts import initial_state
from clipx.training.step import MicroBatchEncoder, PixelModel, backward

SMALL = ["model=small", "model.image.size=64", "data=dummy", "data.size=64", "data.samples=8192", "workers=0"]
CPU = torch.device("cpu")


def config_of(*arguments: str) -> TrainConfig:
    with initialize_config_module("clipx.conf", version_base="1.3"):
        return resolve(compose("train", [*SMALL, *arguments]), TrainConfig)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def time_batches(batch: int, micro: int | None, count: int) -> dict[str, float]:
    """Steps of ``batch`` in micro-batches, on one batch in memory."""
    arguments = [f"batch_size={batch}", f"micro_batch_size={micro or 'null'}"]
    before = peak_mb()
    benchmark = StepBenchmark(config_of(*arguments))
    benchmark.batches = benchmark.batches[:1]
    benchmark.from_memory(1)
    return {"samples_per_s": benchmark.from_memory(count), "peak_mb": peak_mb(), "imports_mb": before}


def time_tokens(length: int) -> dict[str, float]:
    """The text tower of ViT-B/32, forward and backward, 32 captions of one length."""
    keep_freed_memory()
    text = initial_state(config_of("model=vit_b32", "data.size=224", "model.image.size=224"), CPU).model.text
    tokens = torch.randint(1, 49_000, (32, length))
    tokens[:, -1] = 49_407
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        text(pack(unpad(tokens))).sum().backward()
        seconds.append(time.perf_counter() - start)
    return {"captions_per_s": 32 / statistics.median(seconds[1:])}


def plain_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The whole matrix at once, as in figure 3 of the paper."""
    logits = scale * image @ text.T
    pairs = torch.arange(len(logits))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def time_loss(batch: int, plain: bool) -> dict[str, float]:
    """The loss alone, forward and backward, features of 512."""
    keep_freed_memory()
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(batch, 512), dim=-1).requires_grad_() for _ in range(2))
    scale, seconds = torch.tensor(50.0, requires_grad=True), []
    gc.collect()
    before = peak_mb()
    for _ in range(3 if batch < 20_000 else 1):
        start = time.perf_counter()
        (plain_loss if plain else clip_loss)(image, text, scale).backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "extra_mb": peak_mb() - before}


def rank_step(rank: int, world: int, batch: int, store: str) -> None:
    torch.set_num_threads(2 // world)
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=world)
    keep_freed_memory()
    config = config_of()
    state, share, seconds = initial_state(config, CPU), batch // world, []
    chunk = make_reader(config).chunk(range(rank * share, (rank + 1) * share))
    forward = PixelModel(state.model)
    encoder = MicroBatchEncoder(DistributedDataParallel(forward) if world > 1 else forward, CPU, None)
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        backward(encoder, clip_loss, split_micro_batches([chunk], None), state.scaler)
        state.optimizer.step()
        state.optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        Path(store, "found").write_text(json.dumps({"samples_per_s": batch / statistics.median(seconds[1:])}))
    dist.destroy_process_group()


def time_ranks(world: int, batch: int) -> dict[str, float]:
    """A step of processes that share two cores."""
    with tempfile.TemporaryDirectory() as store:
        spawn(rank_step, (world, batch, store), nprocs=world)
        return json.loads(Path(store, "found").read_text())


PARTS: dict[str, dict[str, Any]] = {
    "batch": {
        f"{batch} in {micro}": partial(time_batches, batch, micro, max(2, 1024 // batch))
        for batch, micro in [(32, None), (128, 32), (512, 32), (1024, 32), (4096, 32), (128, None), (512, None)]
    },
    "tokens": {str(length): partial(time_tokens, length) for length in (8, 12, 16, 24, 32, 48, 64, 77)},
    "loss": {
        f"{batch} {kind}": partial(time_loss, batch, kind == "plain")
        for batch in (1024, 4096, 8192, 32_768)
        for kind in ("tiled", "plain")
        if (batch, kind) != (32_768, "plain")
    },
    "ranks": {f"{world} of {batch}": partial(time_ranks, world, batch) for batch in (32, 128, 512) for world in (1, 2)},
}


def plot(found: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="tight")
    axes = figure.subplots(1, 4)
    for micro, mark in (("32", "o-"), ("None", "s--")):
        rows = {int(k.split()[0]): v for k, v in found["batch"].items() if k.split()[2] == micro or k == "32 in None"}
        for place, (name, label) in enumerate([("samples_per_s", "samples/s"), ("peak_mb", "peak MB")]):
            legend = "at once" if micro == "None" else "in 32s"
            axes[place].plot(sorted(rows), [rows[batch][name] for batch in sorted(rows)], mark, label=legend)
            axes[place].set(xscale="log", xlabel="batch", ylabel=label)
            axes[place].legend()
    rows = {int(length): 1000 / row["captions_per_s"] for length, row in found["tokens"].items()}
    axes[2].plot(list(rows), list(rows.values()), "o-")
    axes[2].set(xlabel="tokens of a caption", ylabel="ms a caption, text tower of ViT-B/32", ylim=0, xlim=0)
    for kind, mark in (("tiled", "o-"), ("plain", "s--")):
        rows = {int(k.split()[0]): row["seconds"] for k, row in found["loss"].items() if k.endswith(kind)}
        axes[3].plot(list(rows), list(rows.values()), mark, label=kind)
    axes[3].set(xscale="log", yscale="log", xlabel="batch", ylabel="seconds of the loss, forward and back")
    axes[3].legend()
    for part in axes[:2]:
        part.set_ylim(bottom=0)
    figure.savefig(path, dpi=90)


def main(out: str, *parts: str) -> None:
    """Measure, and write each figure to the file as it comes."""
    path = Path(out)
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in parts or PARTS:
        if part == "plot":
            plot(found, path.with_suffix(".png"))
            continue
        for name, measure in PARTS[part].items():
            found.setdefault(part, {})[name] = in_process(measure)
            print(part, name, found[part][name], flush=True)
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[2:])
