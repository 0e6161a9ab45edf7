"""Typed configs of the commands; conf/COMMAND.yaml explains each key and holds its default."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from clipx import duration

Share = Annotated[float, Field(ge=0, le=1)]
Tower = Literal["image", "text"]
Duration = Annotated[duration.Duration, AfterValidator(duration.checked)]


@dataclass(frozen=True)
class ComposedConfig:
    """What ``config.cli`` records in a config."""

    choices: dict[str, Any] = field(default_factory=dict, kw_only=True)  # option of each group
    varied: list[str] = field(default_factory=list, kw_only=True)  # keys that the sweep or the arguments set


@dataclass(frozen=True)
class LoraConfig:
    """Keys of lora."""

    rank: PositiveInt | None = None
    alpha: PositiveFloat = 16.0
    towers: Annotated[list[Tower], Field(min_length=1)] = field(default_factory=lambda: ["image", "text"])
    weights: Annotated[list[str], Field(min_length=1)] | None = None


@dataclass(frozen=True)
class TrainConfig(ComposedConfig):
    """Keys of clipx.train."""

    model: dict[str, Any]
    data: dict[str, Any]
    optim: dict[str, Any]
    sched: dict[str, Any]
    loss: dict[str, Any]
    evals: dict[str, dict[str, Any]]
    name: str | None
    init_from: str | dict[Tower, str] | None
    init_positions: Literal["stretch", "new"]
    freeze: list[Tower]
    unlock: dict[Tower, NonNegativeInt]
    lora: LoraConfig
    views: PositiveInt | None
    feature_cache: str | None
    teacher: str | None
    epochs: PositiveFloat
    max_steps: PositiveInt | None
    stop_at: Duration | None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    clip_norm: PositiveFloat | None
    ema: Annotated[float, Field(gt=0, lt=1)] | None
    amp: Literal["none", "bf16", "fp16", "auto"]
    matmul_precision: Literal["highest", "high"]
    deterministic: bool
    patch_dropout: Annotated[float, Field(ge=0, lt=1)]
    patch_dropout_until: Annotated[duration.Duration, AfterValidator(duration.checked_steps)]
    grad_checkpoint: bool | Literal["image", "text"]
    compile: bool
    device: str
    workers: Literal["auto"] | NonNegativeInt
    seed: NonNegativeInt
    log_every: Duration
    eval_every: Duration | None
    save_every: Duration | None
    keep_every: Duration | None
    resume: str | None
    resume_allow: list[str]
    max_bad_steps: NonNegativeInt
    max_rollbacks: NonNegativeInt
    signal_exit_code: Annotated[int, Field(ge=0, le=255)]
    best: str | None
    objective: str | None
    mode: Literal["max", "min"] | None
    trust: list[str]
    labelled: dict[str, dict[str, str]] | None = None
    augment: dict[str, Any] = field(default_factory=dict)  # empty: the crop alone
    track: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluateConfig(ComposedConfig):
    """Keys of clipx.evaluate."""

    run: str | list[str]
    mix: str | None
    alphas: list[Share] | None
    evals: dict[str, dict[str, Any]]
    split: Literal["val", "train"]
    sets: str | list[str] | None
    sets_cache: str
    labelled: dict[str, dict[str, str]] | None
    bootstrap: PositiveInt | None
    per_class: bool
    out: str | list[str] | None
    cache: str | None
    amp: Literal["none", "bf16", "fp16", "auto"]
    matmul_precision: Literal["highest", "high"]
    deterministic: bool
    device: str
    workers: Literal["auto"] | NonNegativeInt
    act: Literal["quick_gelu", "gelu"] | None
    trust: list[str]
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class EmbedConfig(ComposedConfig):
    """Keys of clipx.embed."""

    run: str
    out: str
    split: Literal["all", "train", "val"]
    part_size: PositiveInt
    amp: Literal["none", "bf16", "fp16", "auto"]
    device: str
    workers: Literal["auto"] | NonNegativeInt
    act: Literal["quick_gelu", "gelu"] | None
    trust: list[str]
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class PrepareConfig(ComposedConfig):
    """Keys of clipx.prepare."""

    source: dict[str, Any]
    src: str
    out: str | None
    samples_per_shard: PositiveInt
    shuffle: bool
    seed: NonNegativeInt
    resize: PositiveInt | None
    encode: Literal["jpg", "webp", "png"] | None
    quality: Annotated[int, Field(ge=1, le=100)]
    val: Annotated[float, Field(ge=0, lt=1)]
    min_size: NonNegativeInt
    max_aspect: Annotated[float, Field(ge=1)] | None
    min_words: NonNegativeInt
    max_words: PositiveInt | None
    languages: list[str]
    drop_duplicates: bool
    by: str | None
    exclude: list[str]
    exclude_similarity: Annotated[float, Field(gt=-1, le=1)]
    max_similarity: Annotated[float, Field(gt=-1, le=1)] | None
    min_score: Annotated[float, Field(ge=-1, le=1)] | None
    keep: Annotated[float, Field(gt=0, le=1)] | None
    max_empty: Share
    verify: bool
    dry_run: bool
    workers: Literal["auto"] | NonNegativeInt
    device: str
    amp: Literal["none", "bf16", "fp16", "auto"]
    act: Literal["quick_gelu", "gelu"] | None
    trust: list[str]


@dataclass(frozen=True)
class ExportConfig(ComposedConfig):
    """Keys of clipx.export."""

    run: str
    mix: str | None
    alpha: Share | None
    to: Literal["open_clip", "hf"]
    out: str
    act: Literal["quick_gelu", "gelu"] | None
    trust: list[str]


@dataclass(frozen=True)
class PredictConfig:
    """Keys of clipx.predict."""

    run: str
    images: str | None
    index: str | None
    texts: str | None
    search: str | None
    top: PositiveInt
    out: str
    json: bool
    device: str
    workers: Literal["auto"] | NonNegativeInt
    act: Literal["quick_gelu", "gelu"] | None
    trust: list[str]


@dataclass(frozen=True)
class BenchConfig:
    """Keys that clipx.bench adds to those of a training run."""

    parts: list[Literal["loader", "step"]]
    rounds: PositiveInt
    steps: PositiveInt
    seconds: PositiveFloat
    trace: bool
    json: str | None
