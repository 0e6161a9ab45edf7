"""Measuring a run: its loader by stages and as a whole, its step on batches in memory, from the loader, by parts."""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from clipx.config.instantiate import build
from clipx.config.schema import TrainConfig
from clipx.cores import limit_threads
from clipx.data.images import resize
from clipx.data.loader import group_steps, load_chunks, train_ranges
from clipx.data.readers import Chunk, TrainReader, shared_pixels
from clipx.data.sample import Data
from clipx.devices import PRECISIONS, select_device, select_workers
from clipx.training.batch import split_micro_batches
from clipx.training.loop import State, StepOutput, fit
from clipx.training.memory import keep_freed_memory, peak_memory
from clipx.training.parts import build_forward, initial_state, train_reader
from clipx.training.step import Forward, MicroBatchEncoder, backward

STAGED = 256        # pictures whose stages are timed one by one
HELD = 4            # batches in memory
PEAKS = {           # dense FLOP/s of bf16 and fp16, from the makers' data sheets
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
    "RTX 4090": 165e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def reader_of(config: TrainConfig) -> TrainReader:
    """The training reader of a run."""
    with torch.device("meta"):
        model = build(config.model, "model", config.trust)
    data: Data = build(config.data, "data", config.trust)
    return train_reader(config, data, data.plan(config.seed), model)


def loaded(config: TrainConfig) -> Iterator[list[Chunk]]:
    """The steps of a run, from its loader."""
    ranges = train_ranges(0, config.batch_size, config.micro_batch_size)
    pin = select_device(config.device).type == "cuda"
    return group_steps(load_chunks(reader_of(config), ranges, select_workers(config.workers), pin), config.batch_size)


def stages(config: TrainConfig) -> dict[str, float]:
    """Seconds a picture for each stage of the loader, on one thread as in a worker, and bytes a picture."""
    reader, threads = reader_of(config), torch.get_num_threads()
    torch.set_num_threads(1)
    places = [reader.plan[position] for position in range(STAGED)]
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[Any], Any], what: list[Any]) -> list[Any]:
        work(what[0])                           # what is made at the first use does not count
        began = time.perf_counter()
        done = [work(one) for one in what]
        seconds[stage] = (time.perf_counter() - began) / STAGED
        return done

    samples = timed("read", lambda place: reader.source.read(place.sample), places)
    cuts = timed("decode", lambda sample: reader.crop.cut(sample.picture, random.Random(0)).copy(), samples)
    pixels = shared_pixels(1, reader.crop.size)[0]
    timed("augment", lambda cut: resize(cut, pixels), cuts)
    timed("tokenise", reader.tokenizer, [sample.captions[:1] for sample in samples])
    chunk = shared_pixels(STAGED, reader.crop.size)
    timed("collate", lambda row: chunk[row].copy_(pixels), list(range(STAGED)))
    torch.set_num_threads(threads)
    return {"bytes": statistics.mean(len(sample.picture) for sample in samples), **seconds}


def measure_loader(config: TrainConfig, seconds: float) -> dict[str, float]:
    """Pictures/s of the loader alone, and the private memory of a worker."""
    return measure(loaded(config), config.batch_size, seconds)


def measure(batches: Iterable[Any], batch_size: int, seconds: float) -> dict[str, float]:
    """Pictures/s after the first batch, and the private memory of a worker beyond that of an idle one.

    Args:
        batches: a loader with workers.
        batch_size: pictures in a batch.
        seconds: how long to measure, at least.
    """
    idle = worker_memory(iter(DataLoader(range(2), num_workers=1)))
    waiting = iter(batches)
    next(waiting)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(waiting)
        count += 1
    rate = count * batch_size / (time.perf_counter() - start)
    return {"pictures_per_s": rate, "worker_mb": (worker_memory(waiting) - idle) / 1e6}


def worker_memory(_alive: Iterable[Any]) -> int:
    """Bytes that the largest child of this process shares with no other; the argument keeps its loader alive."""
    return max(child.memory_full_info().uss for child in psutil.Process().children())


class Clock:
    """Seconds by what they were spent on; waits for the device at each change."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.now, self.since = device, dict[str, float](), "start", time.perf_counter()

    def enter(self, what: str) -> None:
        settle(self.device)
        moment = time.perf_counter()
        self.seconds[self.now] = self.seconds.get(self.now, 0.0) + moment - self.since
        self.now, self.since = what, moment


class ClockedScaler(torch.amp.GradScaler):
    """Tells a clock where the backward pass ends."""

    def __init__(self, clock: Clock, scaler: torch.amp.GradScaler):
        super().__init__(clock.device.type, scaler.get_scale())
        self.clock = clock

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.clock.enter("optimiser")
        super().unscale_(optimizer)


class Steps:
    """A run's own loop, on its own model, from step 0."""

    def __init__(self, config: TrainConfig):
        keep_freed_memory()
        limit_threads()
        self.config, self.device = config, select_device(config.device)
        self.state = initial_state(config, self.device)
        self.loss_fn = build(config.loss, "loss", config.trust)
        self.forward = build_forward(config, self.state.model)
        self.multiplier = build(config.sched, "sched", config.trust)(1000)
        self.held = [*itertools.islice(loaded(config), HELD)]

    def fit(self, batches: Iterator[list[Chunk]], count: int, forward: Forward, loss_fn: Callable[..., Tensor]) -> None:
        end = self.state.step + count
        fit(self.state, forward, loss_fn, batches, self.config.micro_batch_size, lambda step: step >= end,
            self.multiplier, PRECISIONS[self.config.amp], self.config.clip_norm, nothing)
        settle(self.device)

    def from_memory(self, count: int) -> float:
        """Samples a second on batches that are there."""
        began = time.perf_counter()
        self.fit(itertools.cycle(self.held), count, self.forward, self.loss_fn)
        return count * self.config.batch_size / (time.perf_counter() - began)

    def from_data(self, count: int) -> float:
        """Samples a second from the loader, behind its first step."""
        batches = loaded(self.config)
        self.fit(batches, 1, self.forward, self.loss_fn)
        began = time.perf_counter()
        self.fit(batches, count, self.forward, self.loss_fn)
        return count * self.config.batch_size / (time.perf_counter() - began)

    def shares(self, count: int) -> dict[str, float]:
        """The share of time in each part of a step, the model not compiled, its data from the loader."""
        clock, model, scaler = Clock(self.device), self.state.model, self.state.scaler
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: clock.enter(name))
            for name, module in {"image tower": model.visual, "text tower": model.text}.items()
        ]
        hooks.append(model.text.register_forward_hook(lambda *_: clock.enter("backward")))

        def batches() -> Iterator[list[Chunk]]:
            for chunks in loaded(self.config):
                clock.enter("copy")
                yield chunks
                clock.enter("wait")

        def loss_fn(*given: Any) -> Tensor:
            clock.enter("loss")
            loss = self.loss_fn(*given)
            clock.enter("backward")
            return loss

        self.state.scaler = ClockedScaler(clock, scaler)
        self.fit(waiting := batches(), 1, model, loss_fn)
        clock.enter("start")
        clock.seconds.clear()           # of the first step
        self.fit(waiting, count, model, loss_fn)
        clock.enter("end")
        self.state.scaler = scaler
        for hook in hooks:
            hook.remove()
        parts = ("wait", "copy", "image tower", "text tower", "loss", "backward", "optimiser")
        total = sum(clock.seconds[part] for part in parts)
        return {part: clock.seconds[part] / total for part in parts}

    def figures(self) -> dict[str, float]:
        """FLOPs a sample, forward and back, counted operation by operation; the device's peak, where it is known."""
        part = split_micro_batches(self.held[0], self.config.micro_batch_size)[0]
        encoder = MicroBatchEncoder(self.state.model, self.device, PRECISIONS[self.config.amp])
        with FlopCounterMode(display=False) as counter:
            backward(encoder, self.loss_fn, [part], self.state.scaler)
        self.state.optimizer.zero_grad()
        found = {"flops_per_sample": counter.get_total_flops() / len(part)}
        if self.device.type == "cuda" and self.config.amp != "none":
            name = torch.cuda.get_device_name(self.device)
            known = [peak for device, peak in PEAKS.items() if device in name]
            found |= {"peak_flops": known[0]} if known else {}
        return found

    def memory(self) -> float:
        """The most memory so far, 1e9 bytes."""
        return peak_memory(self.device)

    def trace(self, directory: Path) -> None:
        """Three steps as torch's profiler sees them, for TensorBoard's profiler."""
        with torch.profiler.profile(
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(directory)), profile_memory=True
        ):
            self.from_memory(3)


def nothing(_state: State, _numbers: StepOutput) -> None:
    """What happens between two steps that are measured."""


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
