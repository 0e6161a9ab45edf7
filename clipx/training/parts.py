"""The parts of a run: what it trains on, from which weights, and for how long."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain
from logging.handlers import MemoryHandler
from pathlib import Path

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from clipx import distributed
from clipx.config.instantiate import build, locate
from clipx.config.schema import LoraConfig, TrainConfig
from clipx.data.augment import for_sources
from clipx.data.features import FeatureFile
from clipx.data.images import TrainCrop
from clipx.data.loader import group_steps, load_chunks, train_ranges
from clipx.data.mix import source_names
from clipx.data.plan import MixPlan, Plan
from clipx.data.readers import Chunk, TrainReader
from clipx.data.sample import Data
from clipx.data.teacher import TeacherReader
from clipx.devices import autocast_dtype
from clipx.duration import Every
from clipx.errors import UserError
from clipx.evals.validation import Evaluation, LabelledEvaluation
from clipx.models.clip import CLIP
from clipx.models.lora import add_adapters
from clipx.track import Tracker
from clipx.training.compile import compile_model
from clipx.training.frozen import FeatureModel, FrozenTowers, Name, frozen_towers, open_files
from clipx.training.loop import State
from clipx.training.resume import Identity
from clipx.training.step import Forward, PixelModel
from clipx.training.teacher import TeacherTowers, make_projections, teacher_id, teacher_reader
from clipx.weights.load import initialise
from clipx.weights.pretrained import load_pretrained

LOSS_SCALE = {"none": 1.0, "bf16": 1.0, "fp16": 2.0**16}  # initial; only fp16 adapts it


@dataclass(frozen=True)
class RunParts:
    """Everything that a run is made of, on this rank."""

    config: TrainConfig
    directory: Path
    device: torch.device
    workers: int
    data: Data
    plan: Plan | MixPlan
    evals: dict[str, Evaluation | LabelledEvaluation]
    trackers: Sequence[Tracker]
    identity: Identity
    teacher: CLIP | None
    early: MemoryHandler  # log records from before train.log is open

    @property
    def epochs(self) -> float:
        """Length of the run."""
        return self.identity.steps * self.config.batch_size / self.plan.samples

    def patch_dropout(self, step: int) -> float:
        """The share of the patches that a step (from 0) leaves out."""
        epoch = self.plan.samples / self.config.batch_size
        until = Every(self.config.patch_dropout_until, self.identity.steps, epoch)
        return 0.0 if until.over(step) else self.config.patch_dropout


def initial_state(config: TrainConfig, device: torch.device, teacher: CLIP | None = None) -> State:
    """Model, optimiser and scaler at step 0, determined by the seed."""
    torch.manual_seed(config.seed)
    model = build(config.model, "model", config.trust).to(device)
    model.set_grad_checkpoint(config.grad_checkpoint)
    model.visual.set_patch_dropout(config.patch_dropout)
    check_bias(model, config)
    freeze(model, config)
    add_lora(model, config)
    optimizer = build(config.optim, "optim", config.trust)(model)
    if projections := make_projections(model, teacher):
        optimizer.add_param_group({**optimizer.param_groups[0], "params": [*projections.parameters()]})  # as matrices
    return State(model, optimizer, GradScaler(device.type, LOSS_SCALE[config.amp]), config.ema, projections)


def check_bias(model: CLIP, config: TrainConfig) -> None:
    """
    Raises:
        UserError: the loss needs a bias of the logits, or has no use for the one that the model has.
    """
    target = config.loss["_target_"]
    takes_bias = "bias" in inspect.signature(locate(target, "loss", config.trust)).parameters
    if takes_bias and model.logit_bias is None:
        raise UserError(f"the loss {target} needs a bias of the logits; add model.bias=-10")
    if model.logit_bias is not None and not takes_bias:
        bias = config.model["bias"]
        raise UserError(f"model.bias={bias} has no effect with the loss {target}; add loss=sigmoid, or model.bias=null")


def freeze(model: CLIP, config: TrainConfig) -> None:
    """Freeze towers, but for their last blocks and projection if ``unlock`` has them trained.

    Raises:
        UserError: ``unlock`` or ``patch_dropout`` has no effect, or a tower has fewer blocks.
    """
    for name, tower in model.towers.items():
        frozen, last = name in config.freeze, config.unlock[name]
        if last and not frozen:
            raise UserError(f"unlock.{name}={last} has no effect on a tower that is trained; add freeze=[{name}]")
        if name == "image" and frozen and not last and config.patch_dropout:
            raise UserError(f"patch_dropout={config.patch_dropout:g} has no effect on a frozen tower; set 0")
        if frozen:
            tower.freeze()
        if last:
            stages = tower.stages()
            blocks = len(stages) - 2
            if last > blocks:
                raise UserError(f"unlock.{name}={last}: the tower has {blocks} blocks; give at most {blocks}")
            for parameter in chain(*stages[-1 - last :]):
                parameter.requires_grad_(True)


def add_lora(model: CLIP, config: TrainConfig) -> None:
    """Train low-rank adapters in place of whole towers if ``lora.rank`` is set.

    Raises:
        UserError: the other keys of ``lora`` have no effect, contradict ``freeze`` or do not fit the model.
    """
    lora = config.lora
    if lora.rank is None:
        if lora != LoraConfig():
            raise UserError("lora has no effect without a rank; add lora.rank=8")
        return
    if frozen := [name for name in lora.towers if name in config.freeze]:
        others = [name for name in lora.towers if name not in frozen]
        raise UserError(
            f"freeze=[{','.join(frozen)}] contradicts lora.towers=[{','.join(lora.towers)}]: a frozen tower has no "
            "adapters; leave out freeze" + (f", or set lora.towers=[{','.join(others)}]" if others else ", or lora")
        )
    add_adapters({name: model.towers[name] for name in lora.towers}, lora.rank, lora.alpha, lora.weights)


def initial_weights(model: CLIP, config: TrainConfig) -> str:
    """Load the weights that a new run starts from; returns their description, empty for random ones."""
    init_from = config.init_from or {}
    if isinstance(init_from, str):
        return initialise(model, init_from, config.init_positions)
    origins = load_pretrained(model, without=init_from), initialise(model, init_from, config.init_positions)
    return "; ".join(filter(None, origins))


def build_forward(config: TrainConfig, state: State, frozen: Sequence[Name] = ()) -> Forward:
    """The model of uint8 images, compiled and wrapped in DistributedDataParallel as needed.

    Args:
        config: of the run.
        state: its model and projections.
        frozen: towers whose features are its input.
    """
    model, projections = state.model, state.projections
    forward: nn.Module = FeatureModel(model, frozen, projections) if frozen else PixelModel(model, projections)
    if config.compile:
        forward = compile_model(forward)
    if distributed.world_size() == 1:
        return forward
    return DistributedDataParallel(forward, gradient_as_bucket_view=True)


def train_reader(
    config: TrainConfig,
    data: Data,
    plan: Plan | MixPlan,
    model: CLIP,
    features: Mapping[str, FeatureFile] | None = None,
    teacher: TeacherReader | None = None,
) -> TrainReader:
    """Reader of training samples, and of stored features.

    Raises:
        UserError: several captions per picture, and the features of a frozen text tower.
    """
    count = data.captions_per_picture
    if count > 1 and config.views is not None and "text" in config.freeze and not config.unlock["text"]:
        raise UserError(
            f"data.captions_per_picture={count} does not go with views={config.views} and freeze=[text], which keep "
            "one feature of text for each view; set views=null, or captions_per_picture=1 and more views"
        )
    return TrainReader(
        data.train,
        plan,
        TrainCrop(model.visual.preprocessing, data.crop, data.decode),
        model.text.tokenizer,
        data.draw_captions(),
        identify=config.loss.get("same", "keep") != "keep",
        views=config.views,
        caption_views=config.views if "text" in config.freeze else None,
        features=features,
        teacher=teacher,
        augments=for_sources(build(config.augment, "augment", config.trust) or None, source_names(data)),
    )


def open_frozen(parts: RunParts, model: CLIP) -> FrozenTowers | None:
    """The frozen towers that run once a view, and the files of their features; None if there are none."""
    config, names = parts.config, frozen_towers(parts.config, model)
    files = open_files(config, parts.data, model, names, parts.epochs)
    return FrozenTowers(model, names, autocast_dtype(config.amp), files) if names else None


def train_batches(
    parts: RunParts, state: State, frozen: FrozenTowers | None = None, teacher: TeacherTowers | None = None
) -> Iterator[list[Chunk]]:
    """This rank's share of each batch, from ``state.samples`` on; of frozen towers and a teacher, what is stored."""
    config, share = parts.config, distributed.local_batch_size(parts.config.batch_size)
    features = frozen.files if frozen else None
    taught = teacher_reader(parts.data, parts.plan, teacher)
    reader = train_reader(config, parts.data, parts.plan, state.model, features, taught)
    ranges = train_ranges(
        state.samples,
        config.batch_size,
        config.micro_batch_size,
        distributed.rank(),
        distributed.world_size(),
        state.left_out,
    )
    fill = distributed.local_rank() == 0  # ranks of a machine share the cache of remote shards
    return group_steps(load_chunks(reader, ranges, parts.workers, pin=parts.device.type == "cuda", fill=fill), share)


def identify(config: TrainConfig, data: Data, plan: Plan | MixPlan, teacher: CLIP | None) -> Identity:
    """Config, data, length and teacher of a run."""
    plan_id = blake2b(f"{data.train.id} {plan.id}".encode(), digest_size=16).hexdigest()
    return Identity(asdict(config), plan_id, run_length(config, plan), teacher_id(teacher))


def run_length(config: TrainConfig, plan: Plan | MixPlan) -> int:
    """Steps of the whole run: the smaller of epochs and max_steps.

    Raises:
        UserError: a batch would contain a picture twice.
    """
    if config.batch_size > plan.largest_batch:
        mixed = plan.largest_batch < plan.samples
        what = (
            "the smallest source provides with these data.weights"
            if mixed
            else f"the {plan.samples:,} training samples"
        )
        raise UserError(
            f"batch_size={config.batch_size} is more than {what}, so a batch would hold a picture twice; set at most "
            f"batch_size={plan.largest_batch}" + (", or a smaller weight for that source" if mixed else "")
        )
    length = -int(-config.epochs * plan.samples // config.batch_size)
    return length if config.max_steps is None else min(length, config.max_steps)
