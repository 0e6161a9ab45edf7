"""A teacher: another CLIP, whose features of the same pictures and captions a run learns from."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipx.config.instantiate import locate
from clipx.config.schema import TrainConfig
from clipx.data.features import open_features
from clipx.data.images import TrainCrop
from clipx.data.plan import MixPlan, Plan
from clipx.data.readers import Chunk
from clipx.data.sample import Data
from clipx.data.teacher import TeacherReader, most_captions
from clipx.errors import UserError
from clipx.loss.distill import Teacher
from clipx.models.clip import CLIP, finish
from clipx.models.packed import Packed
from clipx.models.tower import Tower
from clipx.training.frozen import (
    PROBE,
    FrozenTowers,
    Name,
    describe_file,
    features_directory,
    features_key,
    unstored_because,
)
from clipx.weights.archive import CheckpointError
from clipx.weights.checkpoint import checksum
from clipx.weights.convert import model_node
from clipx.weights.load import UnknownActivation, load

NAMES: tuple[Name, Name] = ("image", "text")


class TeacherTowers(FrozenTowers):
    """Adds a teacher's features to the chunks of a step, as ``FrozenTowers`` does: unit vectors of its joint space."""

    @cached_property
    def scale(self) -> Tensor:
        """() inverse temperature, on the host: read once, as that waits for the device."""
        return self.model.logit_scale.exp().cpu()

    def __call__(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        taken = [chunk.teacher for chunk in chunks if chunk.teacher is not None]
        image, text = (self.complete(name, taken).split([len(one.rows[name]) for one in taken]) for name in NAMES)
        return [
            replace(chunk, targets=Teacher(images, texts, self.scale))
            for chunk, images, texts in zip(chunks, image, text, strict=True)
        ]

    def width(self, name: Name) -> int:
        return self.model.towers[name].embed

    def encode(self, tower: Tower, inputs: Tensor | Packed) -> Tensor:
        return finish(tower(inputs), normalize=True)


def takes_teacher(config: TrainConfig) -> bool:
    """Whether a run has a teacher.

    Raises:
        UserError: its loss needs one, or has no use for one.
    """
    target = config.loss["_target_"]
    parameter = inspect.signature(locate(target, "loss", config.trust)).parameters.get("teacher")
    if config.teacher is None and parameter and parameter.default is parameter.empty:
        raise UserError(f"the loss {target} needs a teacher to learn from; add teacher=RUN_OR_WEIGHTS")
    if config.teacher is not None and not parameter:
        raise UserError(
            f"teacher={config.teacher} has no effect with the loss {target}, which does not take one; add "
            "loss=distill, or leave it out"
        )
    return config.teacher is not None


def load_teacher(config: TrainConfig, device: torch.device) -> CLIP | None:
    """Load the teacher of a run, in evaluation mode.

    Raises:
        UserError: as ``takes_teacher``.
        CheckpointError: as ``load``.
    """
    if not takes_teacher(config):
        return None
    try:
        model, _, _ = load(str(config.teacher), device, config.trust)
    except UnknownActivation as error:
        raise CheckpointError(
            f"teacher={config.teacher} does not say its activation; export it once with clipx.export act=quick_gelu, "
            "for OpenAI's weights and open_clip's -quickgelu models, or act=gelu, and give that directory"
        ) from error
    return model.requires_grad_(False)


def teacher_id(teacher: CLIP | None) -> str:
    """Identifies a teacher by its weights and the making of its inputs; empty without one."""
    if teacher is None:
        return ""
    parts = [checksum(teacher.state_dict()), *teacher.visual.preprocessing, *teacher.text.tokenizer([PROBE]).tolist()]
    return blake2b(str(parts).encode(), digest_size=16).hexdigest()


def make_projections(model: CLIP, teacher: CLIP | None) -> nn.ParameterDict:
    """Matrices (F, E) from the student's features to a teacher's of another width, by tower; else nothing.

    They are trained with the model, but are no part of it.
    """
    if teacher is None or teacher.visual.embed == model.visual.embed:
        return nn.ParameterDict()
    device, shape = model.logit_scale.device, (model.visual.embed, teacher.visual.embed)
    return nn.ParameterDict({name: nn.Linear(*shape, bias=False).weight for name in NAMES}).to(device)


def open_teacher(
    config: TrainConfig, data: Data, teacher: CLIP | None, amp: torch.dtype | None, epochs: float
) -> TeacherTowers | None:
    """The towers of a run's teacher, and the files of their features; None without a teacher."""
    if teacher is None:
        return None
    stored = not unstored_because(config, epochs)
    arguments = file_arguments(config, data, teacher, teacher.logit_scale.device) if stored else {}
    return TeacherTowers(teacher, NAMES, amp, {name: open_features(*values) for name, values in arguments.items()})


def file_arguments(
    config: TrainConfig, data: Data, teacher: CLIP, device: torch.device
) -> dict[Name, tuple[Path, int, int, dict[str, Any]]]:
    """What ``open_features`` takes for a file of each tower; ``device`` is the run's."""
    assert config.views is not None
    node, samples = model_node(teacher), int(sum(data.train.sizes))
    rows = {"image": config.views * samples, "text": most_captions(data.train) * samples}
    found: dict[Name, tuple[Path, int, int, dict[str, Any]]] = {}
    for name in NAMES:
        key = features_key(config, data, teacher, name, device, node[name])
        about = {"tower": f"teacher {name}", "key": key}
        found[name] = features_directory(config) / f"teacher-{name}-{key}", rows[name], teacher.visual.embed, about
    return found


def teacher_reader(data: Data, plan: Plan | MixPlan, towers: TeacherTowers | None) -> TeacherReader | None:
    """What prepares pictures and captions for a teacher, if there is one."""
    if towers is None:
        return None
    crop = TrainCrop(towers.model.visual.preprocessing, data.crop, data.decode)
    return TeacherReader(crop, towers.model.text.tokenizer, plan.samples, towers.files)


def describe_teacher(config: TrainConfig, towers: TeacherTowers | None, epochs: float) -> list[str]:
    """Lines for the log: who the teacher is, where its features are stored, and how many are there."""
    if towers is None:
        return []
    lines = [f"teacher   {describe_model(config, towers.model)}"]
    lines += [describe_file(f"the teacher's {name} tower", file) for name, file in towers.files.items()]
    reason = unstored_because(config, epochs)
    return [*lines, *([f"features  of the teacher are computed in each step: {reason}"] if reason else [])]


def describe_model(config: TrainConfig, teacher: CLIP) -> str:
    return (
        f"{config.teacher}: {sum(p.numel() for p in teacher.parameters()):,} parameters, pictures of "
        f"{teacher.visual.size} pixels, features of {teacher.visual.embed} numbers"
    )
