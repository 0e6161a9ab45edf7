"""What is logged before a run starts."""

from typing import Any

from clipx import distributed
from clipx.config.schema import TrainConfig
from clipx.data.sample import Data
from clipx.models.lora import adapter_state
from clipx.sched import cooldown_steps, warmup_steps
from clipx.training.frozen import FrozenTowers, describe
from clipx.training.loop import State
from clipx.training.memory import describe_trained
from clipx.training.parts import RunParts
from clipx.training.teacher import TeacherTowers, describe_teacher


def header_lines(
    parts: RunParts, state: State, origin: str, frozen: FrozenTowers | None, teacher: TeacherTowers | None
) -> list[str]:
    """Lines logged before a run starts."""
    config, data, ranks = parts.config, parts.data, distributed.world_size()
    samples, parameters = int(sum(data.train.sizes)), sum(p.numel() for p in state.model.parameters())
    adapted = sum(name.endswith(".original") for name in adapter_state(state.model))
    validation = sum(sum(val.sizes) for val in data.vals.values())
    return [
        f"run       {parts.directory}" + (f", resuming after step {state.step:,}" if state.step else ""),
        f"model     {parameters:,} parameters on {parts.device}, amp={config.amp}"
        + (f", matmul_precision={config.matmul_precision}" if config.matmul_precision != "highest" else "")
        + (f", {ranks} ranks of {config.batch_size // ranks:,} samples" if ranks > 1 else ""),
        *([f"weights   {origin}"] if origin else []),
        *([f"frozen    {', '.join(config.freeze)}"] if config.freeze else []),
        *([f"lora      rank {config.lora.rank}, alpha {config.lora.alpha:g}, {adapted} matrices"] if adapted else []),
        *([f"patches   {describe_patches(config)}"] if config.patch_dropout else []),
        f"trained   {describe_trained(state.model, state.optimizer)}",
        f"data      {samples:,} pictures to train, {validation:,} to validate; workers={parts.workers}",
        *(f"          {note}" for note in data.notes),
        f"length    {describe_length(config, samples, parts.identity.steps)}",
        *describe(config, frozen, parts.epochs),
        *describe_teacher(config, teacher, parts.epochs),
    ]


def describe_patches(config: TrainConfig) -> str:
    """Which patches a run with patch dropout trains on."""
    kept = f"a random {1 - config.patch_dropout:.0%} of each picture's"
    return f"{kept}, all from patch_dropout_until={config.patch_dropout_until} on"


def describe_length(config: TrainConfig, samples: int, length: int) -> str:
    """Steps, epochs, warm-up and cooldown of a run."""
    epochs, steps, wanted = length * config.batch_size / samples, warmup_of(config, length), config.sched.get("warmup")
    warm, cool = "", ""
    if steps is not None and wanted:
        limit = "sched.warmup" if steps == wanted else f"sched.warmup={wanted:,}, capped by sched.warmup_cap"
        warm = f", warm-up {steps:,} ({limit})"
    if config.sched["_target_"] == "clipx.sched.warmup_constant_cooldown":
        cool = f", cooldown {cooldown_steps(length, config.sched['cooldown']):,}"
    return f"{length:,} steps of {config.batch_size:,}, {epochs:.3g} epochs{warm}{cool}"


def warmup_of(config: TrainConfig, length: int) -> int | None:
    """Steps of warm-up, if the schedule has clipx's keys for it."""
    if not {"warmup", "warmup_cap"} <= config.sched.keys():
        return None
    return warmup_steps(length, config.sched["warmup"], config.sched["warmup_cap"])


def lost_samples(data: Data) -> list[dict[str, Any]]:
    """Lines of skipped.jsonl for the samples that shards have lost."""
    return [
        {"samples": 0, "place": shard, "reason": f"{count} of its samples are lost: cut short, or empty"}
        for shard, count in data.lost.items()
    ]
