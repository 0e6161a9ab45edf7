"""Check whether this machine can do a run: device, workers, memory, disk."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor

from clipx.config.instantiate import build
from clipx.config.schema import TrainConfig
from clipx.data.features import FeatureFile, open_features
from clipx.data.loader import MAX_CHUNK
from clipx.data.sample import Data
from clipx.devices import autocast_dtype, available_cores, has_bf16, select_workers
from clipx.duration import Every
from clipx.loss.distill import Teacher
from clipx.models.clip import CLIP
from clipx.models.lora import adapter_state
from clipx.training.frozen import file_arguments, frozen_towers, unstored_because, unused_because
from clipx.training.loop import State
from clipx.training.memory import format_bytes, moment_bytes, trained_bytes
from clipx.training.parts import run_length
from clipx.training.teacher import describe_model
from clipx.training.teacher import file_arguments as teacher_file_arguments
from clipx.weights.checkpoint import size_on_disk

SHARED_MEMORY = Path("/dev/shm")  # workers pass their chunks through it
CHUNKS_PER_WORKER = 3  # two prefetched, one in use
OVERHEAD = 1.25  # memory of allocators and libraries, as a multiple of the tensors
FULL_CHECKPOINTS = 3  # at once: last, previous, and one being written; best is smaller


@dataclass(frozen=True)
class Finding:
    """One line of ``check``."""

    level: Literal["ok", "odd", "WRONG"]  # WRONG would stop the run
    message: str  # with the remedy, where something is odd or wrong


def check_device(device: torch.device, amp: str) -> Iterator[Finding]:
    yield Finding("ok", f"{device}, amp={amp}")
    if device.type == "cpu" and amp == "fp16":
        yield Finding(
            "odd", "amp=fp16 is many times slower than amp=none on a CPU; amp=bf16 is faster on a CPU with bf16 units"
        )
    if device.type == "cuda" and amp == "bf16" and not has_bf16(device):
        yield Finding("odd", f"amp=bf16 is slow on {torch.cuda.get_device_name(device)}; use amp=fp16")


def check_workers(requested: str | int, device: torch.device, batch_size: int, size: int) -> Iterator[Finding]:
    workers, cores = select_workers(requested, device), available_cores()
    yield Finding("ok", f"{workers} on {cores} cores")
    if workers > cores:
        auto = select_workers("auto", device)
        yield Finding("odd", f"workers={workers} is more than the {cores} cores; workers=auto uses {auto}")
    need = workers * CHUNKS_PER_WORKER * min(batch_size, MAX_CHUNK) * 3 * size**2
    if SHARED_MEMORY.is_dir() and need > (free := shutil.disk_usage(SHARED_MEMORY).free):
        yield Finding(
            "WRONG",
            f"their pictures need {format_bytes(need)} of {SHARED_MEMORY}, which has "
            f"{format_bytes(free)} free; give the container more (docker run --shm-size=8g), or set "
            "workers=0",
        )


def check_memory(
    config: TrainConfig, state: State, teacher: CLIP | None, tokens: int, device: torch.device | None
) -> Iterator[Finding]:
    """Compare the memory of a training step's tensors with the free memory."""
    loss_fn = build(config.loss, "loss", config.trust)
    if teacher:
        loss_fn = partial(taught_loss, loss_fn, teacher.visual.embed, tuple(state.projections.values()))
    kept = activations(state.model, loss_fn, autocast_dtype(config.amp), tokens, config.grad_checkpoint)
    gradients, size = trained_bytes(state.model), min(config.batch_size, config.micro_batch_size or config.batch_size)
    fixed = parameter_bytes(state, teacher) + gradients + moment_bytes(state.optimizer)
    message = (
        f"about {format_bytes(fixed + kept(size))}: {format_bytes(fixed)} for parameters, gradients and "
        f"optimiser, {format_bytes(kept(size))} for {size:,} pictures at once and captions of {tokens} tokens"
    )
    free = free_bytes(device) if device else math.inf
    if OVERHEAD * (fixed + kept(size)) <= free:
        yield Finding("ok", message)
        return
    # gradients are allocated while activations are freed
    least = fixed + kept(size) - min(gradients, kept(size))
    while size and OVERHEAD * (fixed + kept(size)) > free:
        size //= 2
    remedy = f"micro_batch_size={size} fits and gives the same gradient" if size else "a smaller model may fit"
    remedy += ", amp=bf16 needs less" * (config.amp == "none")
    remedy += ", grad_checkpoint=true needs less" * (config.grad_checkpoint is not True)
    yield Finding("WRONG" if least > free else "odd", f"{message}; {device} has {format_bytes(free)} free; {remedy}")


def check_disk(config: TrainConfig, directory: Path, state: State, length: int, samples: int) -> Iterator[Finding]:
    """Check that the run's directory is writable and has room for its checkpoints.

    Args:
        config: of the run.
        directory: of the run.
        state: at its start.
        length: steps; 0 if unknown.
        samples: of an epoch.
    """
    kept = kept_checkpoints(config, length, samples)
    home = next(path for path in (directory, *directory.parents) if path.exists())
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        yield Finding(
            "WRONG",
            f"{home.absolute()} is not writable, so {directory} cannot be made; start the run from a directory that is",
        )
        return
    merged = sum(tensor.nbytes for tensor in state.model.state_dict().values())
    adapters = sum(tensor.nbytes for tensor in adapter_state(state.model).values())
    averaged = merged if state.average.averaged is not None else 0
    size = merged + adapters + averaged + moment_bytes(state.optimizer)
    existing = size_on_disk(directory / "checkpoints")
    need, free = (FULL_CHECKPOINTS + kept) * size + merged - existing, shutil.disk_usage(home).free
    message = (
        f"{FULL_CHECKPOINTS + kept} checkpoints of {format_bytes(size)} and the best of {format_bytes(merged)}; "
        f"{format_bytes(free)} are free"
    )
    if need <= free:
        yield Finding("ok", message)
    else:
        yield Finding("WRONG", f"{message}; free some space, or keep fewer (keep_every=null)")


def parameter_bytes(state: State, teacher: CLIP | None) -> int:
    """Bytes of the model, of the average of its weights if the run keeps one, and of the teacher."""
    models = filter(None, (state.model, state.average.averaged, teacher))
    return sum(p.nbytes for model in models for p in model.parameters())


def activations(
    model: CLIP,
    loss_fn: Callable[..., Tensor],
    amp: torch.dtype | None,
    tokens: int,
    grad_checkpoint: bool | Literal["image", "text"],
) -> Callable[[int], int]:
    """Return the bytes of activations as a function of batch size B: a + b B, fitted at 2 and 3.

    Args:
        model: on the CPU.
        loss_fn: as in ``fit``.
        amp: autocast dtype, or None for float32.
        tokens: length of the longest caption.
        grad_checkpoint: whether blocks are recomputed; then one block's activations are added.
    """
    model.set_grad_checkpoint(grad_checkpoint)
    model.visual.set_patch_dropout(0)  # the end of a run trains on all patches
    two, three = (saved_bytes(model, loss_fn, amp, tokens, tiny) for tiny in (2, 3))
    b = three - two
    a = two - 2 * b
    if not grad_checkpoint:
        return lambda size: a + b * size
    whole = activations(model, loss_fn, amp, tokens, grad_checkpoint=False)
    blocks = min(len(tower.stages()) - 2 for name, tower in model.towers.items() if grad_checkpoint in (True, name))
    return lambda size: a + b * size + whole(size) // blocks


def saved_bytes(model: CLIP, loss_fn: Callable[..., Tensor], amp: torch.dtype | None, tokens: int, size: int) -> int:
    """Bytes that the forward pass of ``size`` samples saves for backward: each storage once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # by address; referenced, so that no address is reused

    def record(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    image, ids = torch.zeros(size, 3, model.visual.size, model.visual.size), torch.arange(2 * size)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda saved: saved):
        with torch.autocast("cpu", amp, enabled=amp is not None):
            features = model(image, torch.arange(tokens).expand(size, tokens))
        loss_fn(*features, ids.view(size, 2))
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


def taught_loss(
    loss_fn: Callable[..., Tensor],
    width: int,
    projections: tuple[Tensor, ...],
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor,
) -> Tensor:
    """A loss with a teacher whose features, of ``width`` numbers, are zero."""
    teacher = Teacher(image.new_zeros(len(image), width), text.new_zeros(len(text), width), scale, projections)
    return loss_fn(image, text, scale, ids, teacher=teacher)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; devices other than CUDA use the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def kept_checkpoints(config: TrainConfig, length: int, samples: int) -> int:
    """Number of checkpoints that ``keep_every`` keeps in a run of ``length`` steps over ``samples`` an epoch."""
    every = Every(config.keep_every, length, samples / config.batch_size).in_steps
    return length // every if every else 0


def check_features(
    config: TrainConfig, data: Data, state: State, teacher: CLIP | None, device: torch.device | None
) -> Iterator[Finding]:
    """Check that the features of frozen towers and of a teacher are stored, or that there is room for them.

    Args:
        config: of the run.
        data: of the run.
        state: with the initial weights, on the CPU.
        teacher: on the CPU.
        device: of the run; None if it cannot be used.
    """
    model = state.model
    names, plan, device = frozen_towers(config, model), data.plan(config.seed), device or torch.device("cpu")
    epochs = run_length(config, plan) * config.batch_size / plan.samples
    files = {}
    if not (reason := unused_because(config, names, epochs)):
        files = {f"the {name} tower": file_arguments(config, data, model, name, device) for name in names}
    elif config.feature_cache not in (None, "auto") and not teacher:
        yield Finding("odd", f"no features are stored in feature_cache={config.feature_cache}: {reason}")
    if teacher:
        yield Finding("ok", f"teacher {describe_model(config, teacher)}")
    if teacher and (reason := unstored_because(config, epochs)):
        yield Finding("odd", f"the teacher's features are computed in each step: {reason}")
    elif teacher:
        arguments = teacher_file_arguments(config, data, teacher, device)
        files |= {f"the teacher's {name} tower": values for name, values in arguments.items()}
    for what, (path, rows, width, about) in files.items():
        if path.exists():
            there = open_features(path, rows, width, about).count()
            yield Finding("ok", f"{path} holds {there:,} of {rows:,} features of {what}")
            continue
        size = FeatureFile(path, rows, width).size
        free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
        message = f"{format_bytes(size)} for the features of {what} in {path.parent}"
        if size <= free:
            yield Finding("ok", message)
        else:
            remedy = "set fewer views, feature_cache=DIR on another disk, or feature_cache=null"
            yield Finding("WRONG", f"{message}; {format_bytes(free)} are free; {remedy}")
