"""One training run: parts from plain values, the earlier state, the loop, the report."""

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from logging.handlers import MemoryHandler
from pathlib import Path

import torch
import yaml
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from clipx import distributed
from clipx.config.instantiate import build
from clipx.config.meaning import flatten
from clipx.config.schema import TrainConfig
from clipx.cores import limit_threads
from clipx.data.images import TrainCrop
from clipx.data.loader import group_steps, load_chunks, train_ranges
from clipx.data.plan import MixPlan, Plan
from clipx.data.readers import Chunk, TrainReader
from clipx.data.sample import Data
from clipx.data.tar.headers import DataError
from clipx.devices import PRECISIONS, select_device, select_workers
from clipx.distributed.signals import Signals
from clipx.distributed.watchdog import Watchdog
from clipx.duration import Every
from clipx.errors import Interrupted, UserError
from clipx.evals.validation import Evaluation, LabelledEvaluation, Validation
from clipx.models.clip import CLIP
from clipx.sched import warmup_steps
from clipx.tokenizer import SimpleTokenizer
from clipx.training.callbacks import Callbacks, Diverged, Intervals
from clipx.training.compile import compiled
from clipx.training.direction import mode_of
from clipx.training.health import HealthMonitor
from clipx.training.lock import locked
from clipx.training.logs import RunLog, SilentLog, gone, holding
from clipx.training.loop import State, fit
from clipx.training.memory import keep_freed_memory
from clipx.training.resume import Identity, restore
from clipx.training.step import Forward
from clipx.training.summary import read_summary
from clipx.training.tensorboard import row_of
from clipx.weights.checkpoint import AsyncSaver
from clipx.weights.load import initialise

logger = logging.getLogger("clipx")

MOST_NAMED = 3                  # samples of a batch that an error names
FIRST_SCALE = {"none": 1.0, "bf16": 1.0, "fp16": 2.0**16}       # of the loss; the first two keep theirs
DENIED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
@dataclass(frozen=True)
class RunParts:
    """What a run is made of, on this rank."""

    config: TrainConfig
    directory: Path
    device: torch.device
    workers: int
    data: Data
    plan: Plan | MixPlan
    evals: dict[str, Evaluation | LabelledEvaluation]
    identity: Identity
    early: MemoryHandler        # what is logged while no train.log is open


def run(config: TrainConfig, directory: Path) -> float | None:
    """Train, from the start or from where the run in ``directory`` stopped; alone or as one of several ranks.

    Returns:
        The last value of ``objective``; None where there is none.

    Raises:
        UserError: something of the user's is wrong; what stands in ``directory`` is left as it is.
        Interrupted: a signal has ended it, after a save.
    """
    check_place(directory)
    try:
        with Signals() as signals, holding() as early, distributed.process_group() as watchdog:
            signals.last_words = watchdog is not None
            worth = run_as_rank(config, directory, signals, watchdog, early)
    except OSError as error:
        if error.errno == errno.ENOENT and not directory.is_dir():
            raise UserError(gone(directory)) from error
        if error.errno not in DENIED:
            raise
        raise UserError(f"{error.filename or directory}: {error.strerror}; when that is mended, rerun the same command "
                        "to resume from the last checkpoint") from error
    if signals.asked:
        raise Interrupted(config.signal_exit_code)
    return worth


def run_as_rank(
    config: TrainConfig, directory: Path, signals: Signals, watchdog: Watchdog | None, early: MemoryHandler
) -> float | None:
    """The run on this rank; rank 0 gives the objective."""
    distributed.local_batch_size(config.batch_size)
    limit_threads()
    device, workers = select_device(config.device), select_workers(config.workers)
    with distributed.rank0_first(watchdog):
        data: Data = build(config.data, "data", config.trust)
        evals = {name: build(node, f"evals.{name}", config.trust) for name, node in config.evals.items()}
    plan = data.plan(config.seed)
    parts = RunParts(config, directory, device, workers, data, plan, evals, identify(config, data, plan), early)
    left_out: list[list[int]] = []
    with alone_in(directory):
        while diverged := train(parts, signals, left_out):
            left_out.append([diverged.first.position, diverged.end])
            distributed.barrier()           # until rank 0 has written what is being saved
            logger.warning("%s; the run goes back to its last checkpoint, and on without these steps' samples",
                           diverged)
    return objective(directory, config.objective) if distributed.rank() == 0 else None


def train(parts: RunParts, signals: Signals, left_out: Sequence[Sequence[int]]) -> Diverged | None:
    """From the last checkpoint to the end of the run, or of this process.

    Args:
        parts: the run.
        signals: whether one has asked to end.
        left_out: positions, from and to, that are not trained on.

    Returns:
        Why the run has to go back to its last checkpoint, if it has.
    """
    config, directory = parts.config, parts.directory
    state, length = initial_state(config, parts.device), parts.identity.steps
    found = restore(state, config, directory, parts.identity)
    origin = initialise(state.model, config.init_from) if config.init_from and not found else ""
    logged = state.samples if found else -1         # where a run begins, nothing stays of what it logged before
    if state.step >= length:
        check_effect(state, directory)
        logger.info("%s is finished (%d steps); nothing is changed. name=... starts another run", directory, state.step)
        if distributed.rank() == 0 and not read_summary(directory):
            rewrite_summary(parts, state)
        return None
    state.leave_out(left_out)
    keep_freed_memory()
    batches = train_batches(parts, state)
    multiplier = build(config.sched, "sched", config.trust)(length)
    last_is_good = found == directory / "checkpoints" / "clip_last.pt"

    saver = AsyncSaver(directory / "checkpoints", asdict(parts.identity), last_is_good)
    with open_log(parts, state, logged) as log, saver:
        introduce(parts, state, log, origin, anew=found is None)
        callbacks = build_callbacks(parts, state, log, saver, signals)
        signals.patient = True
        try:
            fit(
                state=state,
                forward=build_forward(config, state.model),
                loss_fn=build(config.loss, "loss", config.trust),
                batches=batches,
                micro_batch_size=config.micro_batch_size,
                stop=lambda step: step >= length or callbacks.stopping,
                multiplier=multiplier,
                amp=PRECISIONS[config.amp],
                clip_norm=config.clip_norm,
                callbacks=callbacks,
            )
            callbacks.finish(state)
            if state.step >= length:
                check_effect(state, directory)
        except Diverged as diverged:
            if len(state.left_out) >= config.max_rollbacks:
                raise UserError(divergence_message(diverged, parts)) from diverged
            return diverged.with_traceback(None)        # which holds this state and its memory
        except DataError:
            saved = callbacks.rescue(state)
            if not (saved and signals.asked):       # which may have ended the workers, too
                raise
        if signals.asked:
            logger.warning("%s: the run is saved and ends", signals.asked)
        log.finish("finished" if state.step >= length else "stopped")
    return None


def run_length(config: TrainConfig, plan: Plan | MixPlan) -> int:
    """Steps of the whole run: the smaller of epochs and max_steps.

    Raises:
        UserError: a batch would hold a picture twice.
    """
    if config.batch_size > plan.largest_batch:
        mixed = plan.largest_batch < plan.samples
        what = "its smallest source gives, by data.weights" if mixed else f"the {plan.samples:,} training samples"
        raise UserError(
            f"batch_size={config.batch_size} is more than {what}, so a batch would hold a picture twice; at most "
            f"batch_size={plan.largest_batch}" + (", or a smaller weight for that source" if mixed else "")
        )
    length = -int(-config.epochs * plan.samples // config.batch_size)
    return length if config.max_steps is None else min(length, config.max_steps)


def initial_state(config: TrainConfig, device: torch.device) -> State:
    """Model, optimiser and scaler at step 0, fixed by the seed."""
    torch.manual_seed(config.seed)
    model = build(config.model, "model", config.trust).to(device)
    model.set_grad_checkpoint(config.grad_checkpoint)
    for tower in config.freeze:
        {"image": model.visual, "text": model.text}[tower].requires_grad_(False)
    optimizer = build(config.optim, "optim", config.trust)(model)
    return State(model, optimizer, GradScaler(device.type, FIRST_SCALE[config.amp]))


def identify(config: TrainConfig, data: Data, plan: Plan | MixPlan) -> Identity:
    """What the run is."""
    plan_id = blake2b(f"{data.train.id} {plan.id}".encode(), digest_size=16).hexdigest()
    return Identity(asdict(config), plan_id, run_length(config, plan))


def train_reader(config: TrainConfig, data: Data, plan: Plan | MixPlan, model: CLIP) -> TrainReader:
    """What reads the training samples."""
    crop, tokenizer = TrainCrop(model.visual.size, data.crop, data.decode), SimpleTokenizer(model.text.context)
    return TrainReader(data.train, plan, crop, tokenizer, data.caption, config.loss.get("same") == "mask")


def train_batches(parts: RunParts, state: State) -> Iterator[list[Chunk]]:
    """This rank's share of the batches to come."""
    config, share = parts.config, distributed.local_batch_size(parts.config.batch_size)
    reader = train_reader(config, parts.data, parts.plan, state.model)
    ranges = train_ranges(state.samples, config.batch_size, config.micro_batch_size, distributed.rank(),
                          distributed.world_size(), state.left_out)
    fill = distributed.local_rank() == 0        # ranks of a machine share the cache of remote shards
    return group_steps(load_chunks(reader, ranges, parts.workers, pin=parts.device.type == "cuda", fill=fill), share)


def build_forward(config: TrainConfig, model: CLIP) -> Forward:
    """The model, or what is wrapped around it."""
    forward = compiled(model) if config.compile else model
    if distributed.world_size() == 1:
        return forward
    return DistributedDataParallel(forward, gradient_as_bucket_view=True)


def alone_in(directory: Path) -> AbstractContextManager[None]:
    """Keep other processes from training in the directory; for all ranks rank 0 does."""
    return nullcontext() if distributed.rank() else locked(directory)


def open_log(parts: RunParts, state: State, samples: int) -> RunLog | SilentLog:
    """Where the run is written down, by rank 0 alone; what was logged after ``samples`` is dropped."""
    if distributed.rank():
        return SilentLog()
    text = yaml.safe_dump(asdict(parts.config), sort_keys=False, allow_unicode=True)
    (parts.directory / "config.yaml").write_text(text, encoding="utf-8")
    process = {"id": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    config = flatten(asdict(parts.config))
    mode = mode_of(parts.config.objective, parts.config.mode)
    about = {"objective": parts.config.objective, "mode": mode, "process": process, "config": config}
    row = row_of(config, parts.config.choices, parts.config.varied)
    return RunLog(parts.directory, text, about, row, parts.identity.steps, state.step, samples, state.seconds,
                  parts.plan.samples, parts.early)


def build_callbacks(
    parts: RunParts, state: State, log: RunLog | SilentLog, saver: AsyncSaver, signals: Signals
) -> Callbacks:
    """What happens between the steps of a run."""
    config, data = parts.config, parts.data
    every = partial(Every, steps=parts.identity.steps, epoch=parts.plan.samples / config.batch_size)
    keys = ("log_every", "eval_every", "save_every", "keep_every", "stop_at")
    intervals = Intervals(*(every(getattr(config, key)) for key in keys))
    tokenizer = SimpleTokenizer(state.model.text.context)
    return Callbacks(
        log=log,
        intervals=intervals,
        evaluate=Validation(data.vals, parts.evals, tokenizer, parts.workers, PRECISIONS[config.amp], with_loss=True),
        saver=saver,
        best=config.best,
        mode=mode_of(config.best, config.mode),
        bad_limit=data.bad_limit - sum(data.lost.values()),
        max_bad_steps=config.max_bad_steps,
        signals=signals,
        monitor=HealthMonitor(config.batch_size),
        stopping=intervals.stop.over(state.step),
    )


def objective(directory: Path, tag: str | None) -> float | None:
    """The last value of a tag in a run's summary."""
    return read_summary(directory).get("final", {}).get(tag)


def check_place(directory: Path) -> None:
    """
    Raises:
        UserError: there is a file where the run's directory, or one above it, should be.
    """
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file where the run's directory {directory} should be; move it away, or "
                            "name=... trains elsewhere")


def check_effect(state: State, directory: Path) -> None:
    """
    Raises:
        UserError: most steps of the run had no effect.
    """
    if 2 * state.bad_steps > state.step:
        raise UserError(f"{directory}: {state.bad_steps:,} of {state.step:,} steps had no effect, as their gradient "
                        "was not finite: the model has hardly trained. The usual remedies are a lower optim.lr, a "
                        "longer sched.warmup, clip_norm=1.0, or amp=bf16 in place of fp16; name=... starts another run")


def rewrite_summary(parts: RunParts, state: State) -> None:
    """Write the summary.json of a finished run again, from its metrics and its last checkpoint."""
    with open_log(parts, state, state.samples) as log:
        log.best(state.best, state.step)
        log.finish("finished")


def introduce(parts: RunParts, state: State, log: RunLog | SilentLog, origin: str, anew: bool) -> None:
    """Tell what run this is, what weights it starts from, and what its shards have lost."""
    for line in headlines(parts, state, origin):
        logger.info(line)
    if anew:
        log.skipped([
            {"samples": 0, "place": shard, "reason": f"{count} of its samples are lost: cut short, or empty"}
            for shard, count in parts.data.lost.items()
        ])


def headlines(parts: RunParts, state: State, origin: str) -> list[str]:
    """What a run says of itself before it starts."""
    config, data, ranks = parts.config, parts.data, distributed.world_size()
    samples, parameters = int(sum(data.train.sizes)), sum(p.numel() for p in state.model.parameters())
    held = sum(sum(val.sizes) for val in data.vals.values())
    return [
        f"run       {parts.directory}" + (f", goes on behind step {state.step:,}" if state.step else ""),
        f"model     {parameters:,} parameters on {parts.device}, amp={config.amp}"
        + (f", {ranks} ranks of {config.batch_size // ranks:,} samples" if ranks > 1 else ""),
        *([f"weights   {origin}"] if origin else []),
        *([f"frozen    {', '.join(config.freeze)}"] if config.freeze else []),
        f"data      {samples:,} pictures to train, {held:,} to validate; workers={parts.workers}",
        *(f"          {note}" for note in data.notes),
        f"length    {describe_length(config, samples, parts.identity.steps)}",
    ]


def divergence_message(diverged: Diverged, parts: RunParts) -> str:
    """The end of a run that cannot go on."""
    first, size = diverged.first, parts.config.batch_size
    positions = range(first.position, first.position + min(size, MOST_NAMED))
    keys = ", ".join(parts.data.train.locate(parts.plan[position].sample) for position in positions)
    norms = ", ".join(f"{value:.4g} of the {tower} tower" for tower, value in diverged.norms.items())
    return (
        f"{diverged}, and max_rollbacks={parts.config.max_rollbacks} are used up. Of that step: samples {keys} and "
        f"{size - len(positions):,} more, learning rate {first.lr:.3g}, logit scale {diverged.scale:.4g}; norms of the "
        f"weights {norms}. The last good checkpoint stands. A lower optim.lr, a longer sched.warmup, clip_norm=1.0 or "
        "amp=bf16 in place of fp16 are the usual remedies"
    )


def describe_length(config: TrainConfig, samples: int, length: int) -> str:
    """How long a run is, and how long it warms up."""
    epochs = length * config.batch_size / samples
    warm = ""
    if {"warmup", "warmup_cap"} <= config.sched.keys():
        steps, wanted = warmup_steps(length, config.sched["warmup"], config.sched["warmup_cap"]), config.sched["warmup"]
        limit = "sched.warmup" if steps == wanted else f"sched.warmup={wanted:,}, held down by sched.warmup_cap"
        warm = f", warm-up {steps:,} ({limit})"
    return f"{length:,} steps of {config.batch_size:,}, {epochs:.3g} epochs{warm}"
