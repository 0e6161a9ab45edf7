"""Convert state dicts from and to other projects.  clipx has OpenAI's keys, as open_clip has."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipx.weights.archive import CheckpointError, read_file
from clipx.weights.foreign import HuggingFaceConfig, OpenClipConfig, Preprocessing, read_json
from clipx.weights.unwrap import unwrap

Node = dict[str, Any]       # config of a model

OPEN_CLIP, HUGGING_FACE = "open_clip_config.json", "config.json"       # each marks its project's directories
FILES = {
    OPEN_CLIP: ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    HUGGING_FACE: ("model.safetensors", "pytorch_model.bin"),
}
OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}         # only in OpenAI's files
INFERRED = {"layers", "width", "patch_size", "image_size", "mlp_ratio", "context_length", "vocab_size"}
READ = INFERRED | {"head_width", "heads", "patch_dropout", "output_tokens"}
SUPPORTED = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}

# OpenAI's prefix -> Hugging Face's
NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
IN_BLOCK = {".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".attn.": ".self_attn.", ".mlp.c_fc.": ".mlp.fc1.",
            ".mlp.c_proj.": ".mlp.fc2."}


class Weights(NamedTuple):
    """Weights, and the model that they belong to."""

    state: dict[str, Tensor]        # OpenAI's keys, float32
    node: Node                      # config of the model; ``heads`` and ``act`` are missing if unknown
    preprocessing: Mapping[str, Any]    # mean, std, resize_mode ..., as far as known


def weights_from_state_dict(content: Mapping[str, Any], source: object) -> Weights:
    """From a state dict, bare or as a trainer wraps it, or OpenAI's archive."""
    state = normalise_keys(content, source)
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
                raise CheckpointError(f"{source}: {part}.{key}={value!r} is an architecture that clipx does not have")
    state = normalise_keys(content, source)
    node, act = infer_node(state, source), "quick_gelu" if model.get("quick_gelu") else "gelu"
    node["image"] |= {"heads": node["image"]["width"] // model["vision_cfg"].get("head_width", 64), "act": act}
    node["text"] |= {"heads": model["text_cfg"].get("heads", 8), "act": act}
    return Weights(state, node, config.get("preprocess_cfg", {}))


def weights_from_hugging_face(content: Mapping[str, Any], config: Mapping[str, Any], source: object) -> Weights:
    """From a state dict of CLIPModel and its config."""
    state = normalise_keys(content, source)
    node = infer_node(state, source)
    for tower, part, heads in (("image", "vision_config", 12), ("text", "text_config", 8)):     # CLIPConfig's defaults
        keys = config.get(part) or {}
        act, eps, end = keys.get("hidden_act", "quick_gelu"), keys.get("layer_norm_eps", 1e-5), keys.get("eos_token_id")
        if act not in ("quick_gelu", "gelu") or eps != 1e-5:
            raise CheckpointError(f"{source}: {part} has hidden_act={act!r} and layer_norm_eps={eps}; clipx has "
                                  "quick_gelu or gelu, and 1e-05")
        if end not in (None, 2, node["text"]["vocab"] - 1):     # 2 once stood for the highest token
            raise CheckpointError(f"{source}: {part}.eos_token_id={end}; clipx reads a caption's feature at its "
                                  f"highest token, {node['text']['vocab'] - 1}")
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
    return found._replace(preprocessing={key.removeprefix("image_"): value for key, value in keys.items()})


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
        raise CheckpointError(f"open_clip:{name} is not on this machine; python -c \"import open_clip; "
                              f"open_clip.create_model('{model}', pretrained='{tag}')\" downloads it")
    if bool(pretrained.get("quick_gelu")) != bool(config.get("quick_gelu")):
        right = model.removesuffix("-quickgelu") + "-quickgelu" * bool(pretrained.get("quick_gelu"))
        raise CheckpointError(f"open_clip:{name}: these weights have another activation than {model}; "
                              f"open_clip:{right}/{tag} is right")
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


def normalise_keys(content: Mapping[str, Any], source: object) -> dict[str, Tensor]:
    """Convert any layout to OpenAI's keys and float32, without wrappers, prefixes and buffers."""
    state = {name.removeprefix("text."): value.float() for name, value in unwrap(content, source).items()}
    if state.get("logit_scale", torch.empty(0)).shape == (1,):         # FSDP has no tensor without a dimension
        state["logit_scale"] = state["logit_scale"][0]
    return from_hugging_face(state, source) if "text_model.final_layer_norm.weight" in state else state


def infer_node(state: Mapping[str, Tensor], source: object) -> Node:
    """Infer the config of a state dict's model from its shapes.

    Raises:
        CheckpointError: it is another architecture.
    """
    try:
        width, _, _, patch = state["visual.conv1.weight"].shape
        side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        vocab, text_width = state["token_embedding.weight"].shape
        image = {"size": side * patch, "patch": patch, **infer_tower(state, "visual.", width, state["visual.proj"])}
        text = {"vocab": vocab, "context": len(state["positional_embedding"]),
                **infer_tower(state, "", text_width, state["text_projection"])}
    except (KeyError, ValueError) as error:
        names = ", ".join(list(state)[:3])
        raise CheckpointError(f"{source} holds another kind of model than CLIP with a Vision Transformer: {error} is "
                              f"missing or odd; it has {names} ...") from error
    return {"_target_": "clipx.models.clip.CLIP", "image": {"_target_": "clipx.models.vision.ImageEncoder", **image},
            "text": {"_target_": "clipx.models.text.TextEncoder", **text}}


def infer_tower(state: Mapping[str, Tensor], prefix: str, width: int, projection: Tensor) -> dict[str, int]:
    depth = sum(name.startswith(f"{prefix}transformer.resblocks.") and name.endswith(".ln_1.weight") for name in state)
    return {"width": width, "depth": depth, "embed": projection.shape[1]}


def resize_positions(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fit the position embeddings to ``own``: interpolate those of pictures, truncate those of captions."""
    state = dict(state)
    image, text = "visual.positional_embedding", "positional_embedding"
    if len(state[image]) != len(own[image]):
        first, grid = state[image].split([1, len(state[image]) - 1])                            # (1, D), (L-1, D)
        before, after = (round((len(one[image]) - 1) ** 0.5) for one in (state, own))
        grid = grid.T.reshape(1, -1, before, before)                                            # (1, D, S, S)
        grid = F.interpolate(grid, (after, after), mode="bicubic", antialias=True, align_corners=False)
        state[image] = torch.cat([first, grid.flatten(2)[0].T])
    state[text] = state[text][: len(own[text])]
    return state


def open_clip_config(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's model config.

    Raises:
        CheckpointError: open_clip has no such model.
    """
    image, text = node["image"], node["text"]
    if image["act"] != text["act"]:
        raise CheckpointError(f"open_clip has one activation for both towers; this model has "
                              f"model.image.act={image['act']} and model.text.act={text['act']}")
    return {
        "embed_dim": image["embed"],
        "quick_gelu": image["act"] == "quick_gelu",
        "vision_cfg": {"image_size": image["size"], "layers": image["depth"], "width": image["width"],
                       "head_width": image["width"] // image["heads"], "patch_size": image["patch"]},
        "text_cfg": {"context_length": text["context"], "vocab_size": text["vocab"], "width": text["width"],
                     "heads": text["heads"], "layers": text["depth"]},
    }  # fmt: skip


def hugging_face_config(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return CLIPConfig as JSON."""
    image, text = node["image"], node["text"]
    start, end = text["vocab"] - 2, text["vocab"] - 1
    towers = [{
        "hidden_size": tower["width"], "intermediate_size": 4 * tower["width"], "num_hidden_layers": tower["depth"],
        "num_attention_heads": tower["heads"], "projection_dim": tower["embed"], "hidden_act": tower["act"],
        "layer_norm_eps": 1e-5,
    } for tower in (image, text)]  # fmt: skip
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": image["embed"],
        "torch_dtype": "float32",
        "vision_config": {"model_type": "clip_vision_model", **towers[0], "image_size": image["size"],
                          "patch_size": image["patch"]},
        "text_config": {"model_type": "clip_text_model", **towers[1], "vocab_size": text["vocab"],
                        "max_position_embeddings": text["context"], "bos_token_id": start, "eos_token_id": end,
                        "pad_token_id": end},
    }  # fmt: skip


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert to the names and shapes of CLIPModel."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        own = next(start for start in NAMES if name.startswith(start))
        other = NAMES[own] + name[len(own):]
        for ours, theirs in IN_BLOCK.items():
            other = other.replace(ours, theirs)
        if ".in_proj_" in other:
            parts = (other.replace("in_proj_", f"{part}_proj.") for part in "qkv")
            found |= dict(zip(parts, (part.clone() for part in value.chunk(3)), strict=True))
        else:
            found[other] = value.T.contiguous() if other.endswith("_projection.weight") else value
    return found


def from_hugging_face(state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Convert to OpenAI's names and shapes."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        own, other = next(((own, other) for own, other in NAMES.items() if name.startswith(other)), (None, None))
        if own is None:
            raise CheckpointError(f"{source} holds another kind of model than CLIP: {name} is not part of it")
        ours = own + name[len(other):]
        for one, two in IN_BLOCK.items():
            ours = ours.replace(two, one)
        if query := re.fullmatch(r"(.*)q_proj\.(\w+)", name):
            parts = [state.get(f"{query[1]}{part}_proj.{query[2]}") for part in "qkv"]
            if any(part is None for part in parts):
                raise CheckpointError(f"{source} is incomplete: for {name} there is no k_proj or v_proj")
            found[ours.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            found[ours] = value.T.contiguous() if other.endswith("_projection.weight") else value
    return found
