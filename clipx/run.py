"""One training run: parts from plain values, the earlier state, the loop, the report."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import yaml

from clipx import checkpoint
from clipx.build import build
from clipx.compiled import compiled
from clipx.config import Train, differences
from clipx.data.catalogue import usable_cores
from clipx.data.images import TrainCrop
from clipx.data.loader import TrainReader, read, steps, train_ranges
from clipx.data.plan import MixPlan, Plan
from clipx.data.sample import Data
from clipx.data.tar import DataError
from clipx.duration import Every
from clipx.errors import UserError
from clipx.evals.validation import Validation
from clipx.log import RunLog
from clipx.loop import AfterStep, State, fit
from clipx.memory import keep_freed
from clipx.models.clip import CLIP
from clipx.sched import warmup_steps
from clipx.tokenizer import SimpleTokenizer

logger = logging.getLogger("clipx")

MOST_WORKERS = 8                # that ``workers=auto`` starts
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(config: Train, directory: Path) -> float | None:
    """Train, from the start or from where the run in ``directory`` stopped.

    Returns:
        The last value of ``objective``; None where there is none.

    Raises:
        UserError: something of the user's is wrong; what stands in ``directory`` is left as it is.
    """
    device, workers = pick_device(config.device), pick_workers(config.workers)
    data: Data = build(config.data, "data", config.trust)
    plan = data.plan(config.seed)
    length = run_length(config, plan.samples)
    state = fresh_state(config, device)
    identity = identify(config, data, plan)
    seconds = restore(state, config.resume, directory, identity)
    if state.step >= length:
        logger.info("%s is finished (%d steps); nothing is changed. name=... starts another run", directory, state.step)
        return objective(directory, config.objective)

    keep_freed()
    directory.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    (directory / "config.yaml").write_text(text, encoding="utf-8")
    reader = train_reader(config, data, plan, state.model)
    ranges = train_ranges(state.samples, config.batch_size, config.micro_batch_size)
    chunks = read(reader, ranges, workers, pin=device.type == "cuda")
    multiplier = build(config.sched, "sched", config.trust)(length)
    evals = {name: build(node, f"evals.{name}", config.trust) for name, node in config.evals.items()}
    every = partial(Every, steps=length, epoch=plan.samples / config.batch_size)
    stop_at = every(config.stop_at)

    with RunLog(directory, text, length, state.step, state.samples, seconds, plan.samples) as log:
        for line in headlines(config, directory, state, data, length, device, workers):
            logger.info(line)
        if data.lost and not state.step:
            log.skipped([
                {"samples": 0, "place": shard, "reason": f"is cut short; {count} samples behind the cut are lost"}
                for shard, count in data.lost.items()
            ])
        after_step = AfterStep(
            log=log,
            log_every=every(config.log_every),
            eval_every=every(config.eval_every),
            save_every=every(config.save_every),
            keep_every=every(config.keep_every),
            evaluate=Validation(data.vals, evals, reader.tokenizer, workers, AMP[config.amp]),
            save=partial(save, directory, identity, log),
            best=config.best,
            bad_limit=data.bad_limit - sum(data.lost.values()),
            device=device,
        )
        try:
            fit(
                state=state,
                forward=compiled(state.model) if config.compile else state.model,
                loss_of=build(config.loss, "loss", config.trust),
                batches=steps(chunks, config.batch_size),
                micro_batch_size=config.micro_batch_size,
                stop=lambda step: step >= length or stop_at.over(step),
                multiplier=multiplier,
                amp=AMP[config.amp],
                clip_norm=config.clip_norm,
                after_step=after_step,
            )
        except DataError:
            after_step.run_save(state)      # between two steps: the same words go on from here
            raise
        after_step.finish(state)
        log.summary["state"] = "finished" if state.step >= length else "stopped"
        for line in closing(directory, log.summary):
            logger.info(line)
    return objective(directory, config.objective)


def pick_device(wanted: str) -> torch.device:
    """The device of a name; ``auto`` takes the first accelerator, else the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
        return torch.device(wanted)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={wanted} cannot be used ({reason}); device=auto takes what there is") from error


def pick_workers(wanted: str | int) -> int:
    """How many processes read; ``auto`` leaves half of the cores to the training step."""
    if wanted != "auto":
        return int(wanted)
    return min(MOST_WORKERS, max(1, usable_cores() // 2))


def run_length(config: Train, samples: int) -> int:
    """Steps of the whole run: the smaller of epochs and max_steps."""
    if config.batch_size > samples:
        raise UserError(
            f"batch_size={config.batch_size} is more than the {samples:,} training samples, so a batch would hold a "
            f"picture twice; at most batch_size={samples}"
        )
    length = -int(-config.epochs * samples // config.batch_size)
    return length if config.max_steps is None else min(length, config.max_steps)


def fresh_state(config: Train, device: torch.device) -> State:
    """Model, optimiser and scaler at step 0, fixed by the seed."""
    torch.manual_seed(config.seed)
    model = build(config.model, "model", config.trust).to(device)
    model.set_grad_checkpoint(config.grad_checkpoint)
    optimizer = build(config.optim, "optim", config.trust)(model)
    return State(model, optimizer, torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"))


def identify(config: Train, data: Data, plan: Plan | MixPlan) -> dict[str, Any]:
    """What a run is, for those who would go on with it: its config, and a hash of its data in their order."""
    plan_id = blake2b(f"{data.train.id} {plan.id}".encode(), digest_size=16).hexdigest()
    return {"config": asdict(config), "plan": plan_id}


def train_reader(config: Train, data: Data, plan: Plan | MixPlan, model: CLIP) -> TrainReader:
    """What reads the training samples."""
    crop, tokenizer = TrainCrop(model.visual.size, data.crop, data.decode), SimpleTokenizer(model.text.context)
    return TrainReader(data.train, plan, crop, tokenizer, data.caption, config.loss.get("same") == "mask")


def restore(state: State, resume: str | None, directory: Path, identity: Mapping[str, Any]) -> float:
    """Put a run's state back, if there is one to go on from.

    Args:
        state: is filled in place.
        resume: ``auto``, the path of a checkpoint, or None.
        directory: the run's.
        identity: config and plan; they must mean what they meant.

    Returns:
        Seconds that the run has taken so far.

    Raises:
        UserError: the run there is another one, or may not be touched.
    """
    last = directory / "checkpoints" / "clip_last.pt"
    if resume is None and last.exists():
        raise UserError(f"{directory} holds a run; resume=auto goes on with it, name=... starts another")
    path = last if resume == "auto" else Path(resume) if resume else None
    if path is None or (resume == "auto" and not last.exists()):
        return 0.0
    saved = checkpoint.read(path)
    changes = differences(saved["config"], identity["config"])
    if saved["plan"] != identity["plan"] and not changes:
        changes = ["the data: other shards, or other files in them"]
    if changes:
        raise UserError(f"{path} is of another run ({'; '.join(changes)}); name=... starts one of its own")
    state.load_state_dict(saved)
    return saved["seconds"]


def save(directory: Path, identity: Mapping[str, Any], log: RunLog, state: State, which: str) -> None:
    """Write the state as checkpoints/clip_WHICH.pt."""
    path = directory / "checkpoints" / f"clip_{which}.pt"
    checkpoint.save(path, {**state.state_dict(), **identity, "seconds": log.seconds})


def objective(directory: Path, tag: str | None) -> float | None:
    """The last value of a tag in a run's summary."""
    return json.loads((directory / "summary.json").read_text())["final"].get(tag)


def headlines(
    config: Train, directory: Path, state: State, data: Data, length: int, device: torch.device, workers: int
) -> list[str]:
    """What a run says of itself before it starts."""
    samples, parameters = int(sum(data.train.sizes)), sum(p.numel() for p in state.model.parameters())
    held = sum(sum(val.sizes) for val in data.vals.values())
    return [
        f"run       {directory}" + (f", goes on behind step {state.step:,}" if state.step else ""),
        f"model     {parameters:,} parameters on {device}, amp={config.amp}",
        f"data      {samples:,} pictures to train, {held:,} to validate; workers={workers}",
        f"length    {told_length(config, samples, length)}",
    ]


def told_length(config: Train, samples: int, length: int) -> str:
    """How long a run is, and how long it warms up."""
    epochs = length * config.batch_size / samples
    warm = ""
    if {"warmup", "warmup_cap"} <= config.sched.keys():
        steps, wanted = warmup_steps(length, config.sched["warmup"], config.sched["warmup_cap"]), config.sched["warmup"]
        limit = "sched.warmup" if steps == wanted else f"sched.warmup={wanted:,}, held down by sched.warmup_cap"
        warm = f", warm-up {steps:,} ({limit})"
    return f"{length:,} steps of {config.batch_size:,}, {epochs:.3g} epochs{warm}"


def closing(directory: Path, summary: Mapping[str, Any]) -> list[str]:
    """What a run says at its end: numbers, places, what to type next."""
    step, steps, minutes = summary["step"], summary["steps"], summary["seconds"] / 60
    lines = [f"{summary['state']} at step {step:,} of {steps:,} after {minutes:.1f} min"]
    groups: dict[str, list[str]] = {}
    for tag, value in summary["final"].items():
        if tag.startswith("val/"):
            group, _, metric = tag.rpartition("/")
            groups.setdefault(group, []).append(f"{metric} {value:.4g}")
    lines += [f"{group:<16}  {'  '.join(numbers)}" for group, numbers in groups.items()]
    if summary["best"]:
        best = summary["best"]
        lines.append(f"best      {best['metric']} {best['value']:.4g} at step {best['step']:,}")
    return [
        *lines,
        f"weights   {directory / 'checkpoints'}",
        f"look      tensorboard --logdir {directory}",
        f"repeat    python -m clipx.train config={directory / 'config.yaml'} name=again",
    ]
