"""Frozen towers run once: their features of each view take the place of pictures and captions."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clipx.config.schema import TrainConfig
from clipx.data.features import FORMAT, FeatureFile, open_features
from clipx.data.images import Normalise
from clipx.data.mix import source_names
from clipx.data.readers import Chunk
from clipx.data.sample import Data, probe_samples
from clipx.data.tar.index import expand_home
from clipx.data.teacher import TeacherChunk
from clipx.errors import UserError
from clipx.evals.encoder import evaluating
from clipx.models.clip import CLIP, finish
from clipx.models.packed import Packed, pack
from clipx.models.tower import ImageTower, TextTower, Tower
from clipx.tokenizer import Tokens
from clipx.training.batch import concat
from clipx.training.step import Features
from clipx.weights.checkpoint import checksum

DIRECTORY = "~/.cache/clipx/features"  # feature_cache=auto
BATCH = 64  # inputs that a tower takes at once
CPU_BATCH = 4  # the same on a CPU, where each row has its place in a batch
PROBE = "A photo of 2 cats"  # its tokens identify a tokenizer

Name = Literal["image", "text"]


class FeatureModel(nn.Module):
    """A model that reads a frozen tower's features, fp16, in place of its input; else as ``PixelModel``."""

    def __init__(self, model: CLIP, frozen: Sequence[Name], projections: nn.ParameterDict | None = None):
        super().__init__()
        self.projections = projections or nn.ParameterDict()
        self.model, self.frozen = model, frozen
        self.normalise = Normalise(model.visual.preprocessing, model.logit_scale.device)

    def forward(self, images: Tensor, captions: Packed | Tensor) -> Features:
        model, dtype = self.model, self.model.logit_scale.dtype
        image = (
            model.visual.project(images.to(dtype)) if "image" in self.frozen else model.visual(self.normalise(images))
        )
        text = model.text.project(captions.to(dtype)) if isinstance(captions, Tensor) else model.text(captions)
        image, text = finish(image, True), finish(text, True)
        return Features(image, text, model.logit_scale.exp(), model.logit_bias, tuple(self.projections.values()))


class FrozenTowers:
    """Adds the features of frozen towers to the chunks of a step: those that are stored, and the others computed.

    To the bit, they do not depend on what else is in a batch: a tower runs on batches of one shape, and on a CPU, whose
    kernels may treat the rows of a batch differently, a sample's place in it depends on the sample alone.

    Args:
        model: the bare model.
        names: of the frozen towers.
        amp: autocast dtype, or None for float32.
        files: where features are stored, by tower; what is computed is written there.
    """

    def __init__(
        self,
        model: CLIP,
        names: Sequence[Name],
        amp: torch.dtype | None,
        files: Mapping[str, FeatureFile] | None = None,
    ):
        self.model, self.names, self.amp, self.files = model, names, amp, files or {}
        self.device = model.logit_scale.device
        self.normalise = Normalise(model.visual.preprocessing, self.device)

    def __call__(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        for name in self.names:
            features = self.complete(name, chunks).split([len(chunk) for chunk in chunks])
            chunks = [
                replace(chunk, features={**chunk.features, name: part})
                for chunk, part in zip(chunks, features, strict=True)
            ]
        return list(chunks)

    def width(self, name: Name) -> int:
        """Return D, the size of a tower's features."""
        return self.model.towers[name].width

    def encode(self, tower: Tower, inputs: Tensor | Packed) -> Tensor:
        """Run a tower: -> (n, D)."""
        return tower.features(inputs)

    def complete(self, name: Name, chunks: Sequence[Chunk | TeacherChunk]) -> Tensor:
        """Return the features of all samples, (B, D) fp16 on the host."""
        rows = torch.cat([chunk.rows[name] for chunk in chunks])
        stored = [chunk.stored[name] for chunk in chunks if name in chunk.stored]
        known = torch.cat([one.known for one in stored]) if stored else torch.zeros(len(rows), dtype=torch.bool)
        features = torch.empty(len(rows), self.width(name), dtype=torch.float16)
        if known.any():
            features[known] = torch.cat([one.features for one in stored])
        if not known.all():
            features[~known] = found = self.compute(name, chunks, rows[~known])
            if name in self.files:
                self.store(self.files[name], rows[~known].numpy(), found.numpy())
        return features

    def compute(self, name: Name, chunks: Sequence[Chunk | TeacherChunk], rows: Tensor) -> Tensor:
        """Run a tower on the n inputs without stored features: -> (n, D) fp16 on the host."""
        tower = self.model.towers[name]
        with evaluating(self.model):
            if isinstance(tower, ImageTower):
                pixels = concat([chunk.images for chunk in chunks])
                return self.in_batches(tower, pixels, rows)
            tokens = [caption for chunk in chunks for caption in chunk.tokens.ids.split(chunk.tokens.lengths.tolist())]
            lengths = torch.tensor([len(caption) for caption in tokens])
            features = torch.empty(len(rows), self.width(name), dtype=torch.float16)
            for length in lengths.unique():  # captions of one length: batches of one shape
                chosen = (lengths == length).nonzero()[:, 0]
                features[chosen] = self.in_batches(tower, torch.stack([tokens[i] for i in chosen]), rows[chosen])
            return features

    def in_batches(self, tower: Tower, inputs: Tensor, rows: Tensor) -> Tensor:
        """Run a tower on inputs of one shape, in batches of one shape: -> (n, D) fp16 on the host."""
        on_cpu = self.device.type == "cpu"
        size = CPU_BATCH if on_cpu else BATCH
        places = fixed_places(rows, size) if on_cpu else torch.arange(len(rows))
        cells = -(-(int(places.max()) + 1) // size) * size
        which = torch.zeros(cells, dtype=torch.int64)  # an empty cell repeats the first input
        which[places] = torch.arange(len(rows))
        batches = [self.run(tower, inputs[batch]) for batch in which.split(size)]
        return torch.cat(batches)[places]

    def run(self, tower: Tower, inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            if isinstance(tower, TextTower):
                tokens = Tokens(inputs.flatten(), torch.full((len(inputs),), inputs.shape[1]))
                found = self.encode(tower, pack(tokens, tower.grid_edges(self.device, self.amp)).to(self.device))
            else:
                found = self.encode(tower, self.normalise(inputs.to(self.device)))
        return found.to(torch.float16).cpu()

    def store(self, file: FeatureFile, rows: np.ndarray, features: np.ndarray) -> None:
        """
        Raises:
            UserError: fp16 cannot hold a feature.
        """
        if not np.isfinite(features).all():
            raise UserError(
                "a frozen tower's features are NaN, infinite, or too large for fp16, in which they are stored; set "
                "views=null, or amp=bf16 in place of fp16"
            )
        file.write(rows, features)


def in_turn(*towers: FrozenTowers | None) -> Callable[[Sequence[Chunk]], Sequence[Chunk]]:
    """A function that adds the features of each of these to the chunks of a step."""

    def encode(chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        for one in filter(None, towers):
            chunks = one(chunks)
        return chunks

    return encode


def fixed_places(rows: Tensor, size: int) -> Tensor:
    """Cell of each row in batches of ``size``: its place in a batch is ``row % size``. (n,) -> (n,)."""
    slots = rows % size
    order = slots.argsort(stable=True)
    before = torch.zeros(size + 1, dtype=torch.int64)
    before[1:] = slots.bincount(minlength=size).cumsum(0)
    batches = torch.empty_like(rows)
    batches[order] = torch.arange(len(rows)) - before[slots[order]]
    return batches * size + slots


def frozen_towers(config: TrainConfig, model: CLIP) -> list[Name]:
    """Towers whose features are computed once a view: those without a trained parameter before the projection."""
    if config.views is None:
        return []
    return [name for name in config.freeze if not config.unlock[name] and has_fixed_features(model, name)]


def has_fixed_features(model: CLIP, name: Name) -> bool:
    """Whether no parameter that the features depend on is trained."""
    device, size = model.logit_scale.device, model.visual.size
    inputs = torch.zeros(1, 3, size, size) if name == "image" else model.text.tokenizer([PROBE])
    training = model.training
    features = model.eval().towers[name].features(inputs.to(device))
    model.train(training)
    return not features.requires_grad


def open_files(
    config: TrainConfig, data: Data, model: CLIP, names: Sequence[Name], epochs: float
) -> dict[str, FeatureFile]:
    """Open the files of features of a run; none if ``unused_because`` has a reason."""
    if unused_because(config, names, epochs):
        return {}
    device = model.logit_scale.device
    return {name: open_features(*file_arguments(config, data, model, name, device)) for name in names}


def file_arguments(
    config: TrainConfig, data: Data, model: CLIP, name: Name, device: torch.device
) -> tuple[Path, int, int, dict[str, Any]]:
    """Path, rows, width and contents of a tower's file, as ``open_features`` takes them; ``device`` is the run's."""
    assert config.views is not None
    key = features_key(config, data, model, name, device, config.model.get(name, config.model))
    rows = config.views * int(sum(data.train.sizes))
    return features_directory(config) / f"{name}-{key}", rows, model.towers[name].width, {"tower": name, "key": key}


def features_directory(config: TrainConfig) -> Path:
    """Where a run stores features."""
    assert config.feature_cache is not None
    return expand_home(DIRECTORY if config.feature_cache == "auto" else config.feature_cache)


def unused_because(config: TrainConfig, names: Sequence[Name], epochs: float) -> str:
    """Why a run stores no features of frozen towers; empty if it does."""
    if config.views is not None and not names:
        return "no tower is frozen up to its projection"
    return unstored_because(config, epochs)


def unstored_because(config: TrainConfig, epochs: float) -> str:
    """Why a run stores no features at all, not even a teacher's; empty if it does."""
    if config.views is None:
        return "views=null draws new crops each epoch"
    if config.views > epochs:
        return f"views={config.views} is more than the {epochs:.3g} epochs, so no view returns"
    return "feature_cache=null" if config.feature_cache is None else ""


def features_key(
    config: TrainConfig, data: Data, model: CLIP, name: Name, device: torch.device, node: Mapping[str, Any]
) -> str:
    """Hash what the features of a tower, built from ``node``, depend on: data, views, input, weights and precision."""
    tower = model.towers[name]
    made: list[Any]
    if isinstance(tower, TextTower):
        made = [data.caption, tower.tokenizer([PROBE]).tolist(), tower.context]
        draw = data.draw_captions()
        changes = {"weights": draw.weights, "word_dropout": draw.word_dropout or None}
        made += [name_value for name_value in changes.items() if name_value[1] is not None]
    else:
        made = [list(data.crop), data.decode, list(model.visual.preprocessing)]
        # in its order, which matters to a Chain
        made += [json.dumps(config.augment), *source_names(data)] if config.augment else []
    parts = [
        FORMAT, name, data.train.id, probe_samples(data.train), config.seed, config.views, made,
        json.dumps(node, sort_keys=True),
        checksum(dict(fixed_tensors(tower))), config.amp, device.type, config.matmul_precision,
    ]  # fmt: skip
    return blake2b(str(parts).encode(), digest_size=16).hexdigest()


def fixed_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that training does not change, by name."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    parents = {name.rpartition(".")[0] for name in trained}
    parameters = {name for name, _ in module.named_parameters()} - trained
    for name, tensor in module.state_dict().items():
        if name in parameters or (name not in trained and name.rpartition(".")[0] not in parents):
            yield name, tensor


def describe(config: TrainConfig, frozen: FrozenTowers | None, epochs: float) -> list[str]:
    """Lines for the log: where features are stored, and how many are there."""
    names = frozen.names if frozen else []
    lines = [describe_file(f"the {name} tower", file) for name, file in (frozen.files if frozen else {}).items()]
    reason = unused_because(config, names, epochs)
    if reason and (names or (config.feature_cache not in (None, "auto") and config.teacher is None)):
        lines.append(f"features  are not stored: {reason}")
    return lines


def describe_file(what: str, file: FeatureFile) -> str:
    """Line for the log about a file of features."""
    there = f"{file.count():,} of {file.rows:,} are there already"
    return f"features  of {what} in {file.path}, {file.size / 1e9:,.3g} GB; {there}"
