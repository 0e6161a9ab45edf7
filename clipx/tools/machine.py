"""Whether this machine can do a run: device, processes, memory, disk."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from clipx.config.instantiate import build
from clipx.config.schema import TrainConfig
from clipx.cores import available_cores
from clipx.data.loader import MAX_CHUNK
from clipx.devices import PRECISIONS, select_workers
from clipx.models.clip import CLIP
from clipx.training.loop import State

Finding = tuple[str, str]       # "ok", "odd" or "WRONG", what would stop the run; and what is told, with the remedy

SHARED = Path("/dev/shm")       # where chunks pass from the workers
AHEAD = 3                       # chunks of each worker there: two read ahead, one in use
ROOM = 1.25                     # times its tensors: what allocators lose and libraries take
FILES = 3                       # whole checkpoints at once: last, previous, and one being written; best is smaller


def check_device(device: torch.device, amp: str) -> Iterator[Finding]:
    yield "ok", f"{device}, amp={amp}"
    if device.type == "cpu" and amp == "fp16":
        yield "odd", "amp=fp16 is many times slower than amp=none on a CPU; where it has bf16 units, amp=bf16 is faster"
    if device.type == "cuda" and amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "odd", f"amp=bf16 is slow on {torch.cuda.get_device_name(device)}; amp=fp16 is not"


def check_workers(wanted: str | int, batch_size: int, size: int) -> Iterator[Finding]:
    workers, cores = select_workers(wanted), available_cores()
    yield "ok", f"{workers} on {cores} cores"
    if workers > cores:
        yield "odd", f"workers={workers} wait for each other on {cores} cores; workers=auto: {select_workers('auto')}"
    need = workers * AHEAD * min(batch_size, MAX_CHUNK) * 3 * size**2
    if SHARED.is_dir() and need > (free := shutil.disk_usage(SHARED).free):
        yield "WRONG", (f"their pictures take {in_bytes(need)} of {SHARED}, where {in_bytes(free)} are free; give the "
                        "container more (docker run --shm-size=8g), or set workers=0")


def check_memory(config: TrainConfig, state: State, tokens: int, device: torch.device | None) -> Iterator[Finding]:
    """What the tensors of a training step take, against what is free."""
    loss_fn = build(config.loss, "loss", config.trust)
    kept = activations(state.model, loss_fn, PRECISIONS[config.amp], tokens, config.grad_checkpoint)
    one, size = trained_bytes(state), min(config.batch_size, config.micro_batch_size or config.batch_size)
    fixed = parameter_bytes(state) + one * (1 + moments(state.optimizer))
    told = (f"about {in_bytes(fixed + kept(size))}: {in_bytes(fixed)} for parameters, gradients and optimiser, "
            f"{in_bytes(kept(size))} for {size:,} pictures at once and captions of {tokens} tokens")
    free = free_bytes(device) if device else math.inf
    if ROOM * (fixed + kept(size)) <= free:
        yield "ok", told
        return
    least = fixed + kept(size) - min(one, kept(size))       # gradients come while activations go
    while size and ROOM * (fixed + kept(size)) > free:
        size //= 2
    remedy = f"micro_batch_size={size} fits and gives the same gradient" if size else "a smaller model may fit"
    remedy += ", amp=bf16 needs less" * (config.amp == "none")
    remedy += ", grad_checkpoint=true needs less" * (config.grad_checkpoint is not True)
    yield "WRONG" if least > free else "odd", f"{told}; {device} has {in_bytes(free)} free; {remedy}"


def check_disk(directory: Path, state: State, kept: int) -> Iterator[Finding]:
    """Whether the run's directory can be written, and has room for ``kept`` checkpoints besides the usual."""
    home = next(path for path in (directory, *directory.parents) if path.exists())
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        yield "WRONG", f"{home.absolute()} cannot be written for {directory}; start it from a directory of your own"
        return
    size = parameter_bytes(state) + moments(state.optimizer) * trained_bytes(state)
    standing = sum(file.stat().st_size for file in directory.glob("checkpoints/*.pt"))
    best = parameter_bytes(state)
    need, free = (FILES + kept) * size + best - standing, shutil.disk_usage(home).free
    told = f"{FILES + kept} checkpoints of {in_bytes(size)} and the best of {in_bytes(best)}; {in_bytes(free)} are free"
    yield ("ok", told) if need <= free else ("WRONG", f"{told}; make room, or let fewer stay (keep_every=null)")


def in_bytes(count: int) -> str:
    return tqdm.format_sizeof(count, "B")


def parameter_bytes(state: State) -> int:
    return sum(p.numel() * p.element_size() for p in state.model.parameters())


def trained_bytes(state: State) -> int:
    """Of the parameters that are not frozen."""
    return sum(p.numel() * p.element_size() for p in state.model.parameters() if p.requires_grad)


def moments(optimizer: torch.optim.Optimizer) -> int:
    """How many tensors an optimiser keeps beside each parameter, told by a step of the smallest matrix alone."""
    p = min((p for group in optimizer.param_groups for p in group["params"]), key=lambda p: (p.ndim < 2, p.numel()))
    before, p.grad = p.detach().clone(), torch.zeros_like(p)
    optimizer.step()
    kept = [value for value in optimizer.state.pop(p, {}).values() if getattr(value, "shape", None) == p.shape]
    p.detach().copy_(before)
    p.grad = None
    return len(kept)


def activations(
    model: CLIP, loss_fn: Callable[..., Tensor], amp: torch.dtype | None, tokens: int,
    grad_checkpoint: bool | Literal["image", "text"],
) -> Callable[[int], int]:
    """Bytes of activations by batch size B: a + b B, measured at 2 and 3.

    Args:
        model: on the CPU.
        loss_fn: as in ``fit``.
        amp: autocast's type, or None for float32.
        tokens: of the longest caption.
        grad_checkpoint: whether blocks are computed again; one of them then adds to what is kept.
    """
    model.set_grad_checkpoint(grad_checkpoint)
    two, three = (saved_bytes(model, loss_fn, amp, tokens, tiny) for tiny in (2, 3))
    b = three - two
    a = two - 2 * b
    if not grad_checkpoint:
        return lambda size: a + b * size
    whole = activations(model, loss_fn, amp, tokens, grad_checkpoint=False)
    towers = [tower for tower in (model.visual, model.text) if hasattr(tower, "transformer")]
    blocks = min(len(tower.transformer.resblocks) for tower in towers)
    return lambda size: a + b * size + whole(size) // blocks


def saved_bytes(
    model: CLIP, loss_fn: Callable[..., Tensor], amp: torch.dtype | None, tokens: int, size: int
) -> int:
    """What the forward pass of ``size`` samples keeps for the backward pass: each storage once, no parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}              # they are held, so that no address is used twice

    def note(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    image, ids = torch.zeros(size, 3, model.visual.size, model.visual.size), torch.arange(2 * size)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        with torch.autocast("cpu", amp, enabled=amp is not None):
            features = model(image, torch.arange(tokens).expand(size, tokens))
        loss_fn(*features, ids.view(size, 2))
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


def free_bytes(device: torch.device) -> int:
    """What is free of a device's memory; other devices than CUDA's share the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
