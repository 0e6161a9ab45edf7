"""Convert state dicts and configs from and to other projects.  clipx and open_clip use OpenAI's keys."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clipx.models.clip import CLIP
from clipx.weights.archive import CheckpointError

Node = dict[str, Any]  # config of a model

TOWERS = {"image": "clipx.models.vision.ImageEncoder", "text": "clipx.models.text.TextEncoder"}

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
IN_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def infer_node(state: Mapping[str, Tensor], source: object) -> Node:
    """Infer the config of a state dict's model from its shapes.

    Raises:
        CheckpointError: it is another architecture.
    """
    return {
        "_target_": "clipx.models.clip.CLIP",
        "image": infer_image_node(state, source),
        "text": infer_text_node(state, source),
        **infer_bias(state),
    }


def infer_bias(state: Mapping[str, Tensor]) -> Node:
    """Return the key of the bias of the logits, if there is one."""
    return {"bias": state["logit_bias"].item()} if "logit_bias" in state else {}


def infer_image_node(state: Mapping[str, Tensor], source: object) -> Node:
    """Infer the config of clipx's own image tower; raises as ``infer_node``."""
    with explained(state, source):
        width, _, _, patch = state["visual.conv1.weight"].shape
        side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        sizes = infer_tower(state, "visual.", width, state["visual.proj"])
    registers = len(state.get("visual.register_tokens", ()))
    return {"_target_": TOWERS["image"], "size": side * patch, "patch": patch, "registers": registers, **sizes}


def infer_text_node(state: Mapping[str, Tensor], source: object) -> Node:
    """Infer the config of clipx's own text tower; raises as ``infer_node``."""
    with explained(state, source):
        vocab, width = state["token_embedding.weight"].shape
        context = len(state["positional_embedding"])
        sizes = infer_tower(state, "", width, state["text_projection"])
    return {"_target_": TOWERS["text"], "vocab": vocab, "context": context, **sizes}


@contextmanager
def explained(state: Mapping[str, Tensor], source: object) -> Iterator[None]:
    """Explain that a name or a shape is missing."""
    try:
        yield
    except (KeyError, ValueError) as error:
        names = ", ".join(list(state)[:3])
        raise CheckpointError(
            f"{source} holds another kind of model than CLIP with a Vision Transformer: {error} is "
            f"missing or unexpected; it has {names} ..."
        ) from error


def infer_tower(state: Mapping[str, Tensor], prefix: str, width: int, projection: Tensor) -> Node:
    blocks = f"{prefix}transformer.resblocks."
    depth = sum(name.startswith(blocks) and name.endswith(".ln_1.weight") for name in state)
    layer_scale = 1.0 if f"{blocks}0.ls_1.gamma" in state else None  # its initial value is no longer known
    return {"width": width, "depth": depth, "embed": projection.shape[1], "layer_scale": layer_scale}


def model_node(model: CLIP) -> Node:
    """Return the config node of a model."""
    towers: Node = {
        name: {"_target_": f"{type(tower).__module__}.{type(tower).__qualname__}", **tower.arguments()}
        for name, tower in model.towers.items()
    }
    bias = {} if model.logit_bias is None else {"bias": model.logit_bias.item()}
    return {"_target_": "clipx.models.clip.CLIP", **towers, **bias}


def open_clip_config(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's model config.

    Raises:
        CheckpointError: open_clip has no such model.
    """
    image, text = node["image"], node["text"]
    acts = {f"model.{name}.act={tower['act']}" for name, tower in (("image", image), ("text", text)) if "act" in tower}
    if len({act.partition("=")[2] for act in acts}) > 1:
        raise CheckpointError(
            f"open_clip has one activation for both towers; this model has {' and '.join(sorted(acts))}"
        )
    for tower in (image, text):
        if tower["_target_"] not in OPEN_CLIP_TOWERS:
            raise CheckpointError(f"open_clip has no tower like {tower['_target_']}")
    return {
        "embed_dim": image["embed"],
        **({"init_logit_bias": node["bias"]} if "bias" in node else {}),
        "quick_gelu": any(act.endswith("quick_gelu") for act in acts),
        "vision_cfg": OPEN_CLIP_TOWERS[image["_target_"]](image),
        "text_cfg": OPEN_CLIP_TOWERS[text["_target_"]](text),
    }


def own_vision_config(image: Node) -> dict[str, Any]:
    if image["registers"]:
        raise CheckpointError(f"open_clip has no registers; this model has model.image.registers={image['registers']}")
    return {"image_size": image["size"], "layers": image["depth"], "width": image["width"],
            "head_width": image["width"] // image["heads"], "patch_size": image["patch"],
            **scale_config(image)}  # fmt: skip


def own_text_config(text: Node) -> dict[str, Any]:
    return {"context_length": text["context"], "vocab_size": text["vocab"], "width": text["width"],
            "heads": text["heads"], "layers": text["depth"], **scale_config(text)}  # fmt: skip


def scale_config(tower: Node) -> dict[str, float]:
    return {} if tower["layer_scale"] is None else {"ls_init_value": tower["layer_scale"]}


def timm_config(image: Node) -> dict[str, Any]:
    return {"timm_model_name": image["name"], "timm_model_pretrained": False, "timm_pool": image["pool"] or "",
            "timm_proj": image["proj"], "timm_drop": image["drop"], "timm_drop_path": image["drop_path"],
            "image_size": image["size"]}  # fmt: skip


def transformers_config(text: Node) -> dict[str, Any]:
    if text["pool"] not in POOLERS:
        raise CheckpointError(f"open_clip cannot pool captions as model.text.pool={text['pool']} does")
    return {"hf_model_name": text["name"], "hf_tokenizer_name": text["name"], "hf_model_pretrained": False,
            "hf_pooler_type": POOLERS[text["pool"]], "hf_proj_type": PROJECTIONS[text["proj"]],
            "context_length": text["context"]}  # fmt: skip


def timm_node(config: Mapping[str, Any], embed: int) -> Node:
    """Return the config of the image tower that open_clip's vision_cfg describes."""
    return {
        "_target_": "clipx.models.timm.TimmTower", "name": config["timm_model_name"], "embed": embed,
        "size": config.get("image_size", 224), "pool": config.get("timm_pool", "avg") or None,
        "proj": config.get("timm_proj", "linear"), "drop": config.get("timm_drop", 0.0),
        "drop_path": config.get("timm_drop_path"),
    }  # fmt: skip


def transformers_node(config: Mapping[str, Any], embed: int, source: object) -> Node:
    """Return the config of the text tower that open_clip's text_cfg describes.

    Raises:
        CheckpointError: clipx does not pool as it does.
    """
    pooler = config.get("hf_pooler_type", "mean_pooler")
    pool = next((ours for ours, theirs in POOLERS.items() if theirs == pooler), None)
    if pool is None:
        raise CheckpointError(
            f"{source}: text_cfg.hf_pooler_type={pooler} is not supported; use {' or '.join(POOLERS.values())}"
        )
    return {
        "_target_": "clipx.models.hf.TextTower", "name": config["hf_model_name"], "embed": embed, "pool": pool,
        "proj": config.get("hf_proj_type", "mlp") or "none", "context": config.get("context_length", 77),
    }  # fmt: skip


POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}
PROJECTIONS = {"linear": "linear", "mlp": "mlp", "none": None}
OPEN_CLIP_TOWERS: dict[str, Callable[[Node], dict[str, Any]]] = {
    TOWERS["image"]: own_vision_config,
    TOWERS["text"]: own_text_config,
    "clipx.models.timm.TimmTower": timm_config,
    "clipx.models.hf.TextTower": transformers_config,
}


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
        other = NAMES[own] + name[len(own) :]
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
        own = next((own for own, other in NAMES.items() if name.startswith(other)), None)
        if own is None:
            raise CheckpointError(f"{source} holds another kind of model than CLIP: {name} is not part of it")
        ours = own + name[len(NAMES[own]) :]
        for one, two in IN_BLOCK.items():
            ours = ours.replace(two, one)
        if query := re.fullmatch(r"(.*)q_proj\.(\w+)", name):
            try:
                parts = [state[f"{query[1]}{part}_proj.{query[2]}"] for part in "qkv"]
            except KeyError as error:
                raise CheckpointError(f"{source} is incomplete: for {name} there is no k_proj or v_proj") from error
            found[ours.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            found[ours] = value.T.contiguous() if name.endswith("_projection.weight") else value
    return found
