"""Measure a run: its loader by stage and as a whole; its step on batches in memory, from the loader, and by part."""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from clipx.config.instantiate import build
from clipx.config.schema import TrainConfig
from clipx.data.augment import apply
from clipx.data.images import resize
from clipx.data.loader import group_steps, load_chunks, train_ranges
from clipx.data.pixels import shared_pixels
from clipx.data.plan import Place
from clipx.data.readers import Chunk, TrainReader
from clipx.data.sample import Data
from clipx.devices import autocast_dtype, limit_threads, select_amp, select_device, select_workers
from clipx.models.packed import grid_edges
from clipx.training.batch import split_micro_batches
from clipx.training.frozen import FeatureModel, FrozenTowers, frozen_towers, in_turn
from clipx.training.loop import State, StepOutput, fit
from clipx.training.memory import keep_freed_memory, peak_memory
from clipx.training.parts import build_forward, initial_state, train_reader
from clipx.training.step import Forward, MicroBatchEncoder, PixelModel, backward
from clipx.training.teacher import NAMES, TeacherTowers, load_teacher, teacher_reader

TOP = 10  # operations in a profile's summary
NUM_STAGED = 256  # pictures for timing the loader's stages
NUM_BATCHES = 4  # in memory
PEAKS = {           # dense FLOP/s in bf16 and fp16, from the vendors' data sheets
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
    "RTX 4090": 165e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def make_reader(config: TrainConfig, teacher: TeacherTowers | None = None) -> TrainReader:
    """Make the training reader of a run."""
    with torch.device("meta"):
        model = build(config.model, "model", config.trust)
    data: Data = build(config.data, "data", config.trust)
    plan = data.plan(config.seed)
    return train_reader(config, data, plan, model, teacher=teacher_reader(data, plan, teacher))


def load_batches(config: TrainConfig, teacher: TeacherTowers | None = None) -> Iterator[list[Chunk]]:
    """Yield the batches of a run from its loader."""
    ranges = train_ranges(0, config.batch_size, config.micro_batch_size)
    device = select_device(config.device)
    workers, pin = select_workers(config.workers, device), device.type == "cuda"
    return group_steps(load_chunks(make_reader(config, teacher), ranges, workers, pin), config.batch_size)


def time_stages(config: TrainConfig) -> dict[str, float]:
    """Seconds per picture in each stage of the loader, on one thread as in a worker, and bytes per picture."""
    reader, threads = make_reader(config), torch.get_num_threads()
    torch.set_num_threads(1)
    places = [reader.plan[position] for position in range(NUM_STAGED)]
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        work(items[0])  # warm-up
        start = time.perf_counter()
        done = [work(item) for item in items]
        seconds[stage] = (time.perf_counter() - start) / NUM_STAGED
        return done

    def resize_and_augment(item: tuple[Place, np.ndarray]) -> None:
        resize(item[1], pixels, reader.crop.interpolation)
        if augment := reader.augmentation(item[0]):
            apply(augment, pixels, seed=0)

    samples = timed("read", lambda place: reader.source.read(place.sample), places)
    cuts = timed("decode", lambda sample: reader.crop.cut(sample.picture, random.Random(0)).copy(), samples)
    pixels = shared_pixels(1, reader.crop.size)[0]
    timed("augment", resize_and_augment, list(zip(places, cuts, strict=True)))
    drawn = [reader.draw_captions(place, sample.captions) for place, sample in zip(places, samples, strict=True)]
    timed("tokenise", reader.tokenizer.flat, [[one.text for one in several] for several in drawn])
    chunk = shared_pixels(NUM_STAGED, reader.crop.size)
    timed("collate", lambda row: chunk[row].copy_(pixels), list(range(NUM_STAGED)))
    torch.set_num_threads(threads)
    return {"bytes": statistics.mean(len(sample.picture) for sample in samples), **seconds}


def measure_loader(batches: Iterable[Any], batch_size: int, seconds: float) -> dict[str, float]:
    """Measure pictures/s after the first batch, and a worker's private memory beyond that of an idle one.

    Args:
        batches: a loader with workers.
        batch_size: pictures in a batch.
        seconds: minimum time to measure.
    """
    idle = worker_memory(iter(DataLoader(TensorDataset(torch.zeros(2)), num_workers=1)))
    batches = iter(batches)
    next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    rate = count * batch_size / (time.perf_counter() - start)
    return {"pictures_per_s": rate, "worker_mb": (worker_memory(batches) - idle) / 1e6}


def worker_memory(_alive: Iterable[Any]) -> int:
    """Private bytes of the largest child process; the argument keeps its loader alive."""
    return max(child.memory_full_info().uss for child in psutil.Process().children())


class PhaseTimer:
    """Seconds spent in each phase; synchronizes the device at each change."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.phase, self.since = device, dict[str, float](), "start", time.perf_counter()

    def enter(self, phase: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now


class TimedScaler(torch.amp.GradScaler):
    """GradScaler that marks the end of the backward pass for a timer."""

    def __init__(self, timer: PhaseTimer, scaler: torch.amp.GradScaler):
        super().__init__(timer.device.type, scaler.get_scale())
        self.timer = timer

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.timer.enter("optimiser")
        super().unscale_(optimizer)


class StepBenchmark:
    """A run's own training loop and model, from step 0."""

    def __init__(self, config: TrainConfig):
        keep_freed_memory()
        limit_threads()
        self.device = select_device(config.device)
        self.config = config = replace(config, amp=select_amp(config.amp, self.device))
        teacher = load_teacher(config, self.device)
        self.state = initial_state(config, self.device, teacher)
        self.loss_fn = build(config.loss, "loss", config.trust)
        names = frozen_towers(config, self.state.model)
        self.frozen = FrozenTowers(self.state.model, names, autocast_dtype(config.amp)) if names else None
        self.teacher = TeacherTowers(teacher, NAMES, autocast_dtype(config.amp)) if teacher else None
        self.encode = in_turn(self.frozen, self.teacher)
        self.forward = build_forward(config, self.state, names)
        self.multiplier = build(config.sched, "sched", config.trust)(1000)
        self.batches = [*itertools.islice(load_batches(config, self.teacher), NUM_BATCHES)]

    def fit(
        self,
        batches: Iterator[list[Chunk]],
        count: int,
        forward: Forward,
        loss_fn: Callable[..., Tensor],
        encode_frozen: Callable[[Sequence[Chunk]], Sequence[Chunk]] | None = None,
    ) -> None:
        end = self.state.step + count
        fit(
            self.state,
            forward,
            loss_fn,
            batches,
            self.config.micro_batch_size,
            lambda step: step >= end,
            self.multiplier,
            autocast_dtype(self.config.amp),
            self.config.clip_norm,
            no_callbacks,
            encode_frozen or self.encode,
        )
        synchronize(self.device)

    def from_memory(self, count: int) -> float:
        """Samples/s on batches in memory."""
        start = time.perf_counter()
        self.fit(itertools.cycle(self.batches), count, self.forward, self.loss_fn)
        return count * self.config.batch_size / (time.perf_counter() - start)

    def from_data(self, count: int) -> float:
        """Samples/s from the loader, after its first step."""
        batches = load_batches(self.config, self.teacher)
        self.fit(batches, 1, self.forward, self.loss_fn)
        start = time.perf_counter()
        self.fit(batches, count, self.forward, self.loss_fn)
        return count * self.config.batch_size / (time.perf_counter() - start)

    def shares(self, count: int) -> dict[str, float]:
        """Share of time in each part of a step, without compile, with data from the loader."""
        timer, model, scaler = PhaseTimer(self.device), self.state.model, self.state.scaler
        once = {name: towers for name, towers in (("frozen towers", self.frozen), ("teacher", self.teacher)) if towers}
        projections = self.state.projections
        forward = FeatureModel(model, self.frozen.names, projections) if self.frozen else PixelModel(model, projections)
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: timer.enter(name))
            for name, module in {"image tower": model.visual, "text tower": model.text}.items()
        ]
        hooks.append(model.text.register_forward_hook(lambda *_: timer.enter("backward")))

        def timed_batches() -> Iterator[list[Chunk]]:
            for chunks in load_batches(self.config, self.teacher):
                timer.enter("copy")
                yield chunks
                timer.enter("wait")

        def encode_frozen(chunks: Sequence[Chunk]) -> Sequence[Chunk]:
            for part, towers in once.items():
                timer.enter(part)
                chunks = towers(chunks)
                timer.enter("copy")
            return chunks

        def loss_fn(*args: Any, **further: Any) -> Tensor:
            timer.enter("loss")
            loss = self.loss_fn(*args, **further)
            timer.enter("backward")
            return loss

        self.state.scaler = TimedScaler(timer, scaler)
        self.fit(batches := timed_batches(), 1, forward, loss_fn, encode_frozen)
        timer.enter("start")
        timer.seconds.clear()  # drop the first step
        self.fit(batches, count, forward, loss_fn, encode_frozen)
        timer.enter("end")
        self.state.scaler = scaler
        for hook in hooks:
            hook.remove()
        parts = ["wait", "copy", "image tower", "text tower", "loss", "backward", "optimiser"]
        parts += once
        seconds = {part: timer.seconds.get(part, 0.0) for part in parts}
        return {part: spent / sum(seconds.values()) for part, spent in seconds.items()}

    def figures(self) -> dict[str, float]:
        """FLOPs per sample, forward and backward, counted by operation; and the device's peak, if known."""
        amp = autocast_dtype(self.config.amp)
        edges = grid_edges(self.device, amp)
        chunks = self.teacher(self.batches[0]) if self.teacher else self.batches[0]
        micro_batch = split_micro_batches(chunks, self.config.micro_batch_size, edges)[0]
        encoder = MicroBatchEncoder(PixelModel(self.state.model, self.state.projections), self.device, amp)
        with FlopCounterMode(display=False) as counter:
            backward(encoder, self.loss_fn, [micro_batch], self.state.scaler)
        self.state.optimizer.zero_grad()
        found = {"flops_per_sample": counter.get_total_flops() / len(micro_batch)}
        if self.device.type == "cuda" and self.config.amp != "none":
            name = torch.cuda.get_device_name(self.device)
            known = [peak for device, peak in PEAKS.items() if device in name]
            found |= {"peak_flops": known[0]} if known else {}
        return found

    def memory(self) -> float:
        """Peak memory so far, in GB."""
        return peak_memory(self.device)

    def trace(self, path: Path) -> dict[str, float]:
        """Profile three steps; return the most expensive kernels, or operations on a CPU, with their share of the time.

        Args:
            path: file for the trace, in Chrome's format.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() as profile:
            self.from_memory(3)
        profile.export_chrome_trace(str(path))
        cuda = self.device.type == "cuda"
        events = [event for event in profile.key_averages() if not cuda or event.device_type == DeviceType.CUDA]
        times = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in events}
        total = sum(times.values())
        return {name: times[name] / total for name in sorted(times, key=times.__getitem__, reverse=True)[:TOP]}


def no_callbacks(_state: State, _output: StepOutput) -> None:
    """Do nothing between steps."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
