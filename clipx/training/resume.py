"""Going on with a run: from which checkpoint, and whether it is still the same run."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipx.config.instantiate import build
from clipx.config.meaning import LENGTH_KEYS, differences, refusal_message
from clipx.config.schema import TrainConfig
from clipx.distributed import gather
from clipx.training.kept import check_new, standing
from clipx.training.loop import State
from clipx.weights import checkpoint
from clipx.weights.checkpoint import CheckpointError

logger = logging.getLogger("clipx")

@dataclass(frozen=True)
class Identity:
    """What a run is, for those who would go on with it."""

    config: dict[str, Any]
    plan: str               # a hash of its data in their order
    steps: int              # its length


def restore(state: State, config: TrainConfig, directory: Path, identity: Identity) -> Path | None:
    """Put a run's state back, if there is one to go on from.

    Args:
        state: is filled in place.
        config: says where to go on (``resume``) and what may have changed (``resume_allow``).
        directory: the run's.
        identity: must be what it was.

    Returns:
        The checkpoint, or None where there is none.

    Raises:
        UserError: the run there is another one, or may not be touched, or its checkpoints are damaged.
    """
    found = find(config.resume, directory / "checkpoints")
    steps = gather(torch.tensor([found[1].get("step", 0) if found else 0])).tolist()
    if len(set(steps)) > 1:
        raise CheckpointError(f"the ranks find different checkpoints in {directory}, of steps {steps}; it has to stand "
                              "where all machines see it")
    if found is None:
        return None
    path, saved = found
    if saved.get("format") != checkpoint.FORMAT or "optimizer" not in saved:
        raise CheckpointError(f"{path} has weights, but not all that a run needs to go on; init_from={path} starts "
                              "from these weights, and name=... starts another run")
    changes = changed(saved, identity)
    if why := refusal_message(path, changes, vars(config)):
        raise CheckpointError(why)
    if "amp" in changes:
        saved["scaler"] = state.scaler.state_dict()     # another precision starts with its own loss scale
    if "data" in changes:
        saved["skipped"] = []       # numbers of other samples
    try:
        state.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} holds weights of another shape ({str(error).strip().splitlines()[-1].strip()}); name=... starts a "
            "run of its own"
        ) from error
    if changes:
        logger.warning("the run goes on with changes that resume_allow permits: %s", "; ".join(changes.values()))
    if identity.steps != saved["steps"]:
        logger.warning(schedule_change_message(config, saved, identity.steps))
    return path


def find(resume: str | None, checkpoints: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from: the one that ``resume`` names, or the newest of the run's own."""
    last, previous = checkpoints / "clip_last.pt", checkpoints / "clip_previous.pt"
    check_new(resume, checkpoints)
    if resume not in (None, "auto"):
        return find_named(Path(resume), last, previous)
    return newest(last, previous)


def find_named(path: Path, last: Path, previous: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at ``path``; what the run itself has saved since it resumed from there, if there is anything."""
    named = checkpoint.read(path)
    for own in (last, previous):
        try:
            saved = checkpoint.read(own) if own.exists() and not own.samefile(path) else {}
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        if saved.get("resumed_from", "") == named.get("checksum"):
            logger.info("resume=%s: this run has resumed from it before; it goes on from %s", path, own)
            return own, saved
    named["resumed_from"] = named.get("checksum")
    return path, named


def newest(last: Path, previous: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint; where that is damaged the one before."""
    checkpoints, damage = last.parent, []
    for path in standing(checkpoints):
        try:
            saved = checkpoint.read(path)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        if damage:
            logger.warning("%s; the run goes on from %s, behind step %d", damage[0], path, saved["step"])
        return path, saved
    if damage:
        others = sorted(str(path) for path in checkpoints.glob("clip_step_*.pt"))
        raise CheckpointError(f"{'; '.join(damage)}; resume=PATH goes on from another checkpoint "
                              f"({', '.join(others) or 'there is none'}), name=... starts anew")
    return None


def changed(saved: Mapping[str, Any], identity: Identity) -> dict[str, str]:
    """What has another meaning than it had, by key; a run may become longer."""
    changes = differences(saved["config"], identity.config)
    if identity.steps >= saved["steps"]:
        changes = {key: text for key, text in changes.items() if key not in LENGTH_KEYS}
    if saved["plan"] != identity.plan and not any(key == "seed" or key.startswith("data.") for key in changes):
        changes["data"] = "data: other shards, or other files in them"
    return changes


def schedule_change_message(config: TrainConfig, saved: Mapping[str, Any], steps: int) -> str:
    """What another length does to the learning rate."""
    step = saved["step"]
    before, now = (build(config.sched, "sched", config.trust)(length)(step) for length in (saved["steps"], steps))
    return (f"the run is {steps:,} steps long, it was {saved['steps']:,}: at step {step:,} the learning rate is "
            f"{now:.3g} of its peak, by the old length it would be {before:.3g}")
