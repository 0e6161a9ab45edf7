"""Read other projects' weights: state dicts as trainers save them, directories, and open_clip's cache."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from PIL import Image
from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from clipx.models.clip import OUTSIDE_TOWERS
from clipx.weights.archive import CheckpointError, read_file
from clipx.weights.convert import (
    Node,
    from_hugging_face,
    infer_bias,
    infer_image_node,
    infer_node,
    infer_text_node,
    timm_node,
    transformers_node,
)

logger = logging.getLogger("clipx")

OPEN_CLIP, HUGGING_FACE = "open_clip_config.json", "config.json"  # each marks its project's directories
FILES = {
    OPEN_CLIP: ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    HUGGING_FACE: ("model.safetensors", "pytorch_model.bin"),
}
OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}  # only in OpenAI's files
TRANSFORMERS = "text.transformer."  # prefix of an encoder of transformers in open_clip
INFERRED = {"layers", "width", "patch_size", "image_size", "mlp_ratio", "context_length", "vocab_size"}
READ = INFERRED | {
    "head_width", "heads", "patch_dropout", "output_tokens", "timm_model_name", "timm_model_pretrained", "timm_pool",
    "timm_proj", "timm_drop", "timm_drop_path", "hf_model_name", "hf_model_pretrained", "hf_tokenizer_name",
    "hf_pooler_type", "hf_proj_type", "ls_init_value",
}  # fmt: skip
SUPPORTED = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")  # Lightning, tutorials, timm, DeepSpeed
AVERAGE_KEYS = ("ema_state_dict", "state_dict_ema", "model_ema", "ema")
WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")  # anywhere in a key
NOT_WEIGHTS = re.compile(r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask|position_ids|n_averaged)$")

Channels = Annotated[list[float], Field(min_length=3, max_length=3)] | float | None


class OpenClipTower(TypedDict, total=False):
    """What vision_cfg and text_cfg say beyond the shapes."""

    head_width: PositiveInt
    heads: PositiveInt
    image_size: PositiveInt | list[PositiveInt]
    context_length: PositiveInt
    ls_init_value: PositiveFloat | None
    timm_model_name: str
    timm_pool: str
    timm_proj: str | None
    timm_drop: float
    timm_drop_path: float | None
    hf_model_name: str
    hf_pooler_type: str | None
    hf_proj_type: str | None


class OpenClipModel(TypedDict):
    embed_dim: NotRequired[PositiveInt]
    vision_cfg: OpenClipTower
    text_cfg: OpenClipTower
    quick_gelu: NotRequired[bool]


class Preprocessing(TypedDict, total=False):
    """How pictures are prepared: the keys of open_clip and of Hugging Face."""

    mean: Channels
    std: Channels
    image_mean: Channels
    image_std: Channels
    interpolation: str | None
    resample: Annotated[int, Field(ge=0, le=5)] | None  # Pillow's number of the filter
    resize_mode: str | None


class OpenClipConfig(TypedDict):
    model_cfg: OpenClipModel
    preprocess_cfg: NotRequired[Preprocessing]


class HuggingFaceTower(TypedDict, total=False):
    """What vision_config and text_config say beyond the shapes."""

    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int | None
    num_attention_heads: PositiveInt


class HuggingFaceConfig(TypedDict, total=False):
    vision_config: HuggingFaceTower | None
    text_config: HuggingFaceTower | None


class Weights(NamedTuple):
    """Weights, and the model that they belong to."""

    state: dict[str, Tensor]  # OpenAI's keys, float32
    node: Node  # config of the model; ``heads`` and ``act`` are missing if unknown
    preprocessing: Mapping[str, Any]  # mean, std, resize_mode ..., as far as known


def weights_from_state_dict(content: Mapping[str, Any], source: object) -> Weights:
    """From a state dict, bare or as a trainer wraps it, or OpenAI's archive."""
    state = openai_state(content, source)
    if any(name.startswith(("visual.trunk.", TRANSFORMERS)) for name in state):
        return Weights(state, {}, {})
    node = infer_node(state, source)
    if content.keys() >= OPENAI_KEYS:
        node["image"]["act"] = node["text"]["act"] = "quick_gelu"
    return Weights(state, node, {})


def weights_from_open_clip(content: Mapping[str, Any], config: Mapping[str, Any], source: object) -> Weights:
    """From a state dict and open_clip's config."""
    model = config["model_cfg"]
    for part in ("vision_cfg", "text_cfg"):
        for key, value in model[part].items():
            if key not in READ and value not in (None, False, *SUPPORTED.get(key, ())):
                raise CheckpointError(f"{source}: {part}.{key}={value!r} is not supported by clipx")
    state, act = openai_state(content, source), "quick_gelu" if model.get("quick_gelu") else "gelu"
    vision, text = model["vision_cfg"], model["text_cfg"]
    if "timm_model_name" in vision:
        image_node = timm_node(vision, model["embed_dim"])
    else:
        image_node = infer_image_node(state, source)
        image_node |= {"heads": image_node["width"] // vision.get("head_width", 64), "act": act}
    if "hf_model_name" in text:
        text_node = transformers_node(text, model["embed_dim"], source)
    else:
        text_node = {**infer_text_node(state, source), "heads": text.get("heads", 8), "act": act}
    for tower, keys in ((image_node, vision), (text_node, text)):
        if tower.get("layer_scale"):  # inferred from the gains, or what they began with
            tower["layer_scale"] = keys.get("ls_init_value") or tower["layer_scale"]
    node = {"_target_": "clipx.models.clip.CLIP", "image": image_node, "text": text_node, **infer_bias(state)}
    return Weights(state, node, config.get("preprocess_cfg", {}))


def weights_from_hugging_face(content: Mapping[str, Any], config: Mapping[str, Any], source: object) -> Weights:
    """From a state dict of CLIPModel and its config."""
    state = openai_state(content, source)
    node = infer_node(state, source)
    for tower, part, heads in (("image", "vision_config", 12), ("text", "text_config", 8)):  # CLIPConfig's defaults
        keys = config.get(part) or {}
        act, eps, end = keys.get("hidden_act", "quick_gelu"), keys.get("layer_norm_eps", 1e-5), keys.get("eos_token_id")
        if act not in ("quick_gelu", "gelu") or eps != 1e-5:
            raise CheckpointError(
                f"{source}: {part} has hidden_act={act!r} and layer_norm_eps={eps}; clipx supports "
                "quick_gelu or gelu, and 1e-05"
            )
        if end not in (None, 2, node["text"]["vocab"] - 1):  # 2 once stood for the highest token
            raise CheckpointError(
                f"{source}: {part}.eos_token_id={end}; clipx reads a caption's feature at its "
                f"highest token, {node['text']['vocab'] - 1}"
            )
        node[tower] |= {"heads": keys.get("num_attention_heads", heads), "act": act}
    return Weights(state, node, {})


def read_directory(path: Path) -> Weights:
    """Read a local directory of open_clip or Hugging Face.

    Raises:
        CheckpointError: it is neither, or incomplete, or of another architecture.
    """
    kind = OPEN_CLIP if (path / OPEN_CLIP).is_file() else HUGGING_FACE
    config = read_json(path / kind, OpenClipConfig if kind == OPEN_CLIP else HuggingFaceConfig)
    file = next((path / name for name in FILES[kind] if (path / name).is_file()), path / FILES[kind][0])
    if kind == OPEN_CLIP:
        return weights_from_open_clip(read_file(file), config, path)
    found = weights_from_hugging_face(read_file(file), config, path)
    file = path / "preprocessor_config.json"
    keys = read_json(file, Preprocessing) if file.is_file() else {}
    pictures = {key.removeprefix("image_"): value for key, value in keys.items()}
    if keys.get("resample") is not None:
        pictures["interpolation"] = Image.Resampling(keys["resample"]).name.lower()
    return found._replace(preprocessing=pictures)


def read_open_clip_cache(name: str) -> Weights:
    """Read weights that open_clip has downloaded before; nothing is downloaded here.

    Args:
        name: MODEL/PRETRAINED, as in ``open_clip.list_pretrained()``.

    Raises:
        CheckpointError: open_clip has no such weights, they are not on this machine, or the model has another
            activation than the weights.
    """
    import open_clip  # takes seconds

    model, _, tag = name.partition("/")
    config, pretrained = open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
    if not config or not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(model) or ["open_clip.list_pretrained() names them"]
        raise CheckpointError(f"open_clip:{name}: open_clip has no such weights; {model}: {', '.join(tags)}")
    file = next(filter(Path.is_file, cached_files(pretrained)), None)
    if file is None:
        raise CheckpointError(
            f'open_clip:{name} is not on this machine; python -c "import open_clip; '
            f"open_clip.create_model('{model}', pretrained='{tag}')\" downloads it"
        )
    if bool(pretrained.get("quick_gelu")) != bool(config.get("quick_gelu")):
        right = model.removesuffix("-quickgelu") + "-quickgelu" * bool(pretrained.get("quick_gelu"))
        raise CheckpointError(
            f"open_clip:{name}: these weights need another activation than {model}; use open_clip:{right}/{tag}"
        )
    config = {"model_cfg": config, "preprocess_cfg": pretrained}
    return weights_from_open_clip(read_file(file), config, f"open_clip:{name}")


def cached_files(pretrained: Mapping[str, Any]) -> Iterator[Path]:
    """Yield where open_clip may have downloaded the weights to."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, file = pretrained.get("hf_hub", "").rpartition("/")
    for name in [file] if file else FILES[OPEN_CLIP]:
        if repository and isinstance(found := try_to_load_from_cache(repository, name), str):
            yield Path(found)
    if pretrained.get("url"):
        yield Path("~/.cache/clip").expanduser() / pretrained["url"].rpartition("/")[2]


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


def openai_state(content: Mapping[str, Any], source: object) -> dict[str, Tensor]:
    """Return the state dict in a file with OpenAI's keys, in float32.

    Drops buffers and the prefixes of FSDP, DDP, torch.compile, Lightning and averages.

    Raises:
        CheckpointError: there is no state dict, or it is another kind of model.
    """
    inner = find_state_dict(content, source)
    if not (inner and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in inner.items())):
        raise CheckpointError(
            f"{source} holds no state dict: expected names and tensors, or these under "
            f"{', '.join((*STATE_KEYS, *AVERAGE_KEYS))}"
        )
    state = {WRAPPERS.sub("", name): value.float() for name, value in inner.items() if not NOT_WEIGHTS.search(name)}
    while all("." in name for name in state) and len({name.partition(".")[0] for name in state}) == 1:
        # module. of DDP, model. of Lightning
        state = {name.partition(".")[2]: value for name, value in state.items()}
    if not any(name.startswith(TRANSFORMERS) and ".resblocks." not in name for name in state):
        state = {name.removeprefix("text."): value for name, value in state.items()}
    for name in OUTSIDE_TOWERS:
        if state.get(name, torch.empty(0)).shape == (1,):  # FSDP has no tensor without a dimension
            state[name] = state[name][0]
    return from_hugging_face(state, source) if "text_model.final_layer_norm.weight" in state else state


def find_state_dict(content: Mapping[str, Any], source: object) -> Mapping[str, Any]:
    """Find the model's state dict in a checkpoint, or else that of its moving average."""
    found = next((key for key in (*STATE_KEYS, *AVERAGE_KEYS) if isinstance(content.get(key), Mapping)), None)
    if found in AVERAGE_KEYS:
        logger.info("%s has only a moving average of the weights, %s, which is used", source, found)
    return content[found] if found else content
