"""Resume a run: find its checkpoint and check that it is still the same run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clipx.config.instantiate import build
from clipx.config.meaning import LENGTH_KEYS, differences, refusal_message
from clipx.config.schema import TrainConfig
from clipx.config.validate import check_node
from clipx.distributed import gather
from clipx.training.existing_run import check_new, resumable
from clipx.training.loop import State
from clipx.weights import checkpoint
from clipx.weights.checkpoint import CheckpointError

logger = logging.getLogger("clipx")


@dataclass(frozen=True)
class Identity:
    """What makes two runs the same."""

    config: dict[str, Any]
    plan: str  # hash of the data and their order
    steps: int  # length of the run
    teacher: str = ""  # hash of its weights; empty without one


class Saved(NamedTuple):
    """A checkpoint that has been read."""

    path: Path
    content: dict[str, Any]


def restore(state: State, config: TrainConfig, directory: Path, identity: Identity) -> Path | None:
    """Restore the state of a run from its checkpoint, if it has one.

    Args:
        state: filled in place.
        config: ``resume`` selects the checkpoint, ``resume_allow`` permits changes.
        directory: of the run.
        identity: has to match the checkpoint.

    Returns:
        Path of the checkpoint, or None.

    Raises:
        UserError: the directory contains another run, ``resume`` is None, or all checkpoints are corrupt.
    """
    found = find_checkpoint(config.resume, directory / "checkpoints")
    steps = gather(torch.tensor([found.content.get("step", 0) if found else 0])).tolist()
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the ranks find different checkpoints in {directory}, of steps {steps}; it has to be "
            "on a file system that all machines share"
        )
    if found is None:
        return None
    path, saved = found
    if saved.get("format") != checkpoint.FORMAT or "optimizer" not in saved:
        raise CheckpointError(
            f"{path} has weights but no training state to resume; init_from={path} starts from "
            "these weights, name=... starts another run"
        )
    changes = permitted_changes(path, saved, config, identity)
    if "amp" in changes:
        saved["scaler"] = state.scaler.state_dict()  # the new precision starts with its own loss scale
    if "data" in changes:
        saved["skipped"] = []  # ids of other samples
    if changes.keys() & {"optim._target_", "optim.optimizer"}:
        saved["optimizer"] = state.optimizer.state_dict()  # another optimiser starts with its own moments
    try:
        state.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} holds weights of another shape ({str(error).strip().splitlines()[-1].strip()}); name=... starts a "
            "new run"
        ) from error
    if changes:
        logger.warning("resuming with changes that resume_allow permits: %s", "; ".join(changes.values()))
    return path


def find_checkpoint(resume: str | None, checkpoints: Path) -> Saved | None:
    """Find the checkpoint to resume from: the path in ``resume``, or the newest of the run."""
    check_new(resume, checkpoints)
    if resume is None or resume == "auto":
        return newest_checkpoint(checkpoints)
    return find_named(Path(resume), resumable(checkpoints))


def find_named(path: Path, own: Sequence[Path]) -> Saved:
    """The checkpoint at ``path``, or a newer one among the run's own, saved since it resumed from ``path``."""
    named = checkpoint.read(path)
    for newer in own:
        try:
            saved = checkpoint.read(newer) if not newer.samefile(path) else {}
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        if saved.get("resumed_from", "") == named.get("checksum"):
            logger.info("resume=%s: this run has already resumed from it; resuming from %s", path, newer)
            return Saved(newer, saved)
    named["resumed_from"] = named.get("checksum")
    return Saved(path, named)


def newest_checkpoint(checkpoints: Path) -> Saved | None:
    """The last checkpoint, or the one before if the last is corrupt."""
    errors: list[str] = []
    for path in resumable(checkpoints):
        try:
            saved = checkpoint.read(path)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        if errors:
            logger.warning("%s; resuming from %s, after step %d", errors[0], path, saved["step"])
        return Saved(path, saved)
    if errors:
        others = sorted(str(path) for path in checkpoints.glob("clip_step_*.pt"))
        raise CheckpointError(
            f"{'; '.join(errors)}; resume=PATH resumes from another checkpoint "
            f"({', '.join(others) or 'there is none'}), name=... starts a new run"
        )
    return None


def changes_since(saved: Mapping[str, Any], identity: Identity) -> dict[str, str]:
    """What has changed in meaning, by key; a run may become longer."""
    changes = differences(saved["config"], identity.config)
    if identity.steps >= saved["steps"]:
        changes = {key: text for key, text in changes.items() if key not in LENGTH_KEYS}
    if saved["plan"] != identity.plan and not any(key == "seed" or key.startswith("data.") for key in changes):
        changes["data"] = "data: different shards, or different files in them"
    if saved.get("teacher", "") != identity.teacher and "teacher" not in changes:
        changes["teacher"] = f"teacher={identity.config['teacher']}: it has other weights than before"
    return changes


def permitted_changes(path: Path, saved: Mapping[str, Any], config: TrainConfig, identity: Identity) -> dict[str, str]:
    """What ``resume_allow`` permits to change, by key.

    With ``resume=PATH`` a run may have another schedule and length than those of the checkpoint, if the learning rates
    of the steps done are the same.

    Raises:
        CheckpointError: something else changes.
    """
    changes, reason = changes_since(saved, identity), ""
    rescheduled = {key for key in changes if key in LENGTH_KEYS or key.startswith("sched.")}
    if config.resume in (None, "auto"):
        rescheduled = set()
    if rescheduled and not (reason := describe_rates(saved, config, identity.steps)):
        changes = {key: text for key, text in changes.items() if key not in rescheduled}
    if why := refusal_message(path, changes, vars(config)):
        raise CheckpointError(why + reason)
    if rescheduled and not reason:
        message = "%s has taken the first %s steps of a run with this schedule"
        logger.info(message, path, f"{saved['step']:,}")
    elif identity.steps != saved["steps"]:
        logger.warning(schedule_change_message(config, saved, identity.steps))
    return changes


def describe_rates(saved: Mapping[str, Any], config: TrainConfig, steps: int) -> str:
    """Why a run cannot have begun with the steps of a checkpoint; empty if their learning rates are the same.

    Args:
        saved: a checkpoint.
        config: of a run that resumes from it, with another schedule or length.
        steps: length of that run.
    """
    if steps <= saved["step"]:
        return f"; a run of {steps:,} steps has none after the {saved['step']:,} of this checkpoint"
    node = check_node(saved["config"]["sched"], "sched", config.trust)
    before = build(node, "sched", config.trust, own="clipx.sched")(saved["steps"])
    now = build(config.sched, "sched", config.trust)(steps)
    for step in range(saved["step"]):
        if now(step) != before(step):
            return (
                f"; another schedule or length has to have the same learning rates up to step {saved['step']:,}, but "
                f"at step {step:,} it is {now(step):.3g} of its peak and was {before(step):.3g}"
            )
    return ""


def schedule_change_message(config: TrainConfig, saved: Mapping[str, Any], steps: int) -> str:
    """How a new length changes the learning rate."""
    step = saved["step"]
    before, now = (build(config.sched, "sched", config.trust)(length)(step) for length in (saved["steps"], steps))
    return (
        f"the length of the run changed from {saved['steps']:,} to {steps:,} steps: at step {step:,} the learning "
        f"rate is {now:.3g} of its peak; with the old length it would be {before:.3g}"
    )
