"""A model in the layout of open_clip or Hugging Face, checked by the project that will open it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from clipx.data.emoji import open_emoji
from clipx.data.images import decode, get_image_transform
from clipx.errors import UserError
from clipx.models.clip import CLIP
from clipx.models.hf import PretrainedTokenizer
from clipx.tokenizer import END, byte_pairs
from clipx.weights.convert import TOWERS, hugging_face_config, model_node, open_clip_config, to_hugging_face
from clipx.weights.foreign import HUGGING_FACE, OPEN_CLIP
from clipx.weights.load import find

logger = logging.getLogger("clipx")

NUM_PROBES = 8  # pictures, and as many captions, that both projects encode
FEATURE_TOLERANCE = 1e-5  # of unit features, float32
PIXEL_TOLERANCE = 2.5  # levels of 255: the other project may resize with another library

PeerOutput = tuple[Tensor, Tensor, Tensor]  # its unit features (N, E) and (N, E), and its pixels (N, 3, S, S)


def export_model(model: CLIP, to: str, out: Path) -> None:
    """Write a model, open it with the other project, compare, and only then create ``out``.

    Raises:
        UserError: the format cannot hold the model, or the other project computes something else from it.
        OSError: ``out`` cannot be written.
    """
    write, encode = {
        "open_clip": (write_open_clip, encode_with_open_clip),
        "hf": (write_hugging_face, encode_with_hugging_face),
    }[to]
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        written = Path(temporary) / out.name
        written.mkdir()
        write(model, written)
        check(model, encode, written)
        written.rename(out)


def write_open_clip(model: CLIP, out: Path) -> None:
    preprocessing = {**model.visual.preprocessing._asdict(), "resize_mode": "shortest"}
    write_json(out / OPEN_CLIP, {"model_cfg": open_clip_config(model_node(model)), "preprocess_cfg": preprocessing})
    write_tensors(model.state_dict(), out / "open_clip_model.safetensors")
    if isinstance(model.text.tokenizer, PretrainedTokenizer):
        model.text.tokenizer.tokenizer.save_pretrained(out)  # open_clip reads it from there


def write_hugging_face(model: CLIP, out: Path) -> None:
    """Write the layout of OpenAI's own models on Hugging Face, which every version of transformers opens."""
    node = model_node(model)
    for name, target in TOWERS.items():
        if node[name]["_target_"] != target:
            theirs = node[name]["_target_"]
            raise UserError(f"to=hf: transformers' CLIPModel has no tower like model.{name}._target_={theirs}")
        for key in ("registers", "layer_scale"):
            if value := node[name].get(key):
                raise UserError(f"to=hf: transformers' CLIPModel has nothing like model.{name}.{key}={value}")
    if "bias" in node:
        raise UserError(f"to=hf: transformers' CLIPModel has no bias of the logits like model.bias={node['bias']:.4g}")
    if node["text"]["vocab"] != END + 1:
        raise UserError(
            f"model.text.vocab={node['text']['vocab']} is not that of the tokenizer, {END + 1:,}; "
            "to=open_clip exports it anyway"
        )
    write_json(out / HUGGING_FACE, hugging_face_config(node))
    write_tensors(to_hugging_face(model.state_dict()), out / "model.safetensors")
    (size, mean, std, interpolation), context = model.visual.preprocessing, node["text"]["context"]
    write_json(out / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": size}, "resample": Image.Resampling[interpolation.upper()], "do_center_crop": True,
        "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": mean, "image_std": std,
    })  # fmt: skip
    bpe = byte_pairs()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    tokens = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    write_json(out / "vocab.json", {special.get(token, token): number for token, number in bpe.encoder.items()})
    merges = ["#version: 0.2", *map(" ".join, bpe.bpe_ranks)]
    (out / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    write_json(out / "special_tokens_map.json", tokens)
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "processor_class": "CLIPProcessor", "model_max_length": context,
        "do_lower_case": True, **tokens,
    })  # fmt: skip


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(state: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(save(state, metadata={"format": "pt"}))  # save_file makes it unreadable for other users


def check(model: CLIP, encode: Callable[..., PeerOutput], out: Path) -> None:
    """Read the weights back, and encode real pictures and captions with both projects.

    Raises:
        UserError: a tensor differs in a bit, or features or pixels differ.
    """
    found, own = find(out).state, model.state_dict()
    different = sorted(name for name in own if name not in found or not torch.equal(found[name], own[name].float()))
    if different:
        raise UserError(f"{different[0]} differs when it is read back; nothing is exported")
    samples = [open_emoji().train.read(number) for number in range(NUM_PROBES)]
    pictures, captions = [decode(sample.picture) for sample in samples], [sample.captions[-1] for sample in samples]
    captions[-1] = " ".join([captions[-1]] * model.text.context)  # both cut it to the context
    transform, tokenizer = get_image_transform(model.visual.preprocessing), model.text.tokenizer
    pixels = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad():
        image, text, peer_pixels = encode(out, pictures, captions, pixels)
        pairs = {
            "pictures": (model.encode_image(pixels, True), image),
            "captions": (model.encode_text(tokenizer(captions), True), text),
        }
    errors = {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}
    pixel_error = (pixels - peer_pixels).abs().max().item() * max(transform.preprocessing.std) * 255
    logger.info(
        "checked   features of %d pictures and captions differ by %.1g at most, pixels by %.1f levels of 255",
        NUM_PROBES,
        max(errors.values()),
        pixel_error,
    )
    for name, value in errors.items():
        if not value <= FEATURE_TOLERANCE:
            raise UserError(
                f"the features of {name} differ by {value:.3g}, more than {FEATURE_TOLERANCE}; nothing is exported"
            )
    if pixel_error > PIXEL_TOLERANCE:
        raise UserError(f"the pictures' pixels differ by {pixel_error:.1f} levels of 255; nothing is exported")


def encode_with_open_clip(out: Path, pictures: list[Image.Image], captions: list[str], pixels: Tensor) -> PeerOutput:
    """Encode with open_clip's model, pixels and tokens."""
    import open_clip

    quiet = logging.NullHandler()  # without a handler, logging.warning would add one that repeats our lines
    logging.getLogger().addHandler(quiet)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    logging.getLogger().removeHandler(quiet)
    model.eval()
    peer_pixels = torch.stack([transform(picture) for picture in pictures])
    image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(captions), normalize=True)
    return image, text, peer_pixels


def encode_with_hugging_face(out: Path, pictures: list[Image.Image], captions: list[str], pixels: Tensor) -> PeerOutput:
    """Encode with transformers' model and tokens on our pixels: its processor resizes with another library."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(out, local_files_only=True)
    processor = transformers.CLIPProcessor.from_pretrained(out, local_files_only=True)
    model.eval()
    inputs = processor(text=captions, images=pictures, return_tensors="pt", padding=True, truncation=True)
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=pixels)
    return output.image_embeds, output.text_embeds, inputs["pixel_values"]
