"""JSON configs of other projects: the keys that clipx uses, and their types."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from clipx.weights.archive import CheckpointError

Channels = Annotated[list[float], Field(min_length=3, max_length=3)] | float | None


class VisionConfig(TypedDict, total=False):
    """Keys of open_clip's vision_cfg that cannot be inferred from shapes."""

    head_width: PositiveInt


class TextConfig(TypedDict, total=False):
    """Keys of open_clip's text_cfg that cannot be inferred from shapes."""

    heads: PositiveInt


class ModelConfig(TypedDict):
    """open_clip's model_cfg."""

    vision_cfg: VisionConfig
    text_cfg: TextConfig
    quick_gelu: NotRequired[bool]


class Preprocessing(TypedDict, total=False):
    """How pictures are prepared: the keys of open_clip and of Hugging Face."""

    mean: Channels
    std: Channels
    image_mean: Channels
    image_std: Channels
    interpolation: str | None
    resize_mode: str | None


class OpenClipConfig(TypedDict):
    """open_clip_config.json."""

    model_cfg: ModelConfig
    preprocess_cfg: NotRequired[Preprocessing]


class TowerConfig(TypedDict, total=False):
    """Keys of Hugging Face's vision_config and text_config that cannot be inferred from shapes."""

    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int | None
    num_attention_heads: PositiveInt


class HuggingFaceConfig(TypedDict, total=False):
    """config.json of CLIPModel."""

    vision_config: TowerConfig | None
    text_config: TowerConfig | None


def read_json(path: Path, kind: type) -> dict[str, Any]:
    """Read a config and check it against ``kind``; unknown keys are kept.

    Raises:
        CheckpointError: it cannot be read, or a key is missing or has the wrong type.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        TypeAdapter(kind).validate_python(found, strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"])) or "its content"
        raise CheckpointError(f"{path}: {key}: {wrong['msg'][0].lower()}{wrong['msg'][1:]}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found
