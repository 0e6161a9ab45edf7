"""``python -m clipx.export``: a run or weights -> a directory of open_clip's or Hugging Face's."""

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from clipx.config.cli import command
from clipx.config.resolve import resolve
from clipx.config.runs import check_exists
from clipx.config.schema import ExportConfig
from clipx.errors import UserError

if TYPE_CHECKING:       # torch comes in with the work, so that --help and mistakes in the config answer at once
    from PIL import Image
    from torch import Tensor

    from clipx.models.clip import CLIP

logger = logging.getLogger("clipx")

PROBES = 8              # pictures, and as many captions, that both sides encode
CLOSE = 1e-5            # unit features are as close as this, in float32
GREY = 2.5              # levels of 255 that another resize may differ by
NEEDS = {"open_clip": ("open_clip", "open_clip_torch"), "hf": ("transformers", '"clipx[hf]"')}
OPENS = {
    "open_clip": 'open_clip.create_model_and_transforms("local-dir:{0}")',
    "hf": 'transformers.CLIPModel.from_pretrained("{0}"), CLIPProcessor.from_pretrained("{0}")',
}

Peer = tuple["Tensor", "Tensor", "Tensor"]      # its unit features (N, E), (N, E), and its pixels (N, 3, S, S)


def main() -> None:
    """The entry point."""
    command("export", export)


def export(composed: DictConfig, directory: Path) -> None:
    """Write one directory, whole or not at all.

    Args:
        composed: the config, as Hydra composes it.
        directory: of a run; the export goes where ``out`` says.

    Raises:
        UserError: what there is cannot be written so, or the other project does not compute the same from it.
    """
    config = resolve(composed, ExportConfig)
    module, package = NEEDS[config.to]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"to={config.to} needs {module}; install it with: pip install {package}")
    out = Path(config.out).expanduser()
    if out.exists():
        raise UserError(f"out={config.out} is there already; name a new directory")
    check_exists("run", config.run)
    from clipx.weights.load import load

    model, _, _ = load(config.run, trust=config.trust, act=config.act)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as room:
            made = Path(room) / out.name
            made.mkdir()
            {"open_clip": write_open_clip, "hf": write_hugging_face}[config.to](model, made)
            check_same_weights(model, made)
            check_same_features(model, {"open_clip": ask_open_clip, "hf": ask_hugging_face}[config.to], made)
            made.rename(out)
    except OSError as error:
        raise UserError(f"out={config.out} cannot be written: {error.strerror or error}") from error
    logger.info("export    %s; open it with %s", out, OPENS[config.to].format(out))


def write_open_clip(model: "CLIP", out: Path) -> None:
    from clipx.data.images import MEAN, STD
    from clipx.weights.convert import OPEN_CLIP, open_clip_config
    from clipx.weights.load import model_node

    pixels = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(out / OPEN_CLIP, {"model_cfg": open_clip_config(model_node(model)), "preprocess_cfg": pixels})
    write_tensors(model.state_dict(), out / "open_clip_model.safetensors")


def write_hugging_face(model: "CLIP", out: Path) -> None:
    """The layout that OpenAI's own models have there: every version of transformers opens it."""
    from clipx.data.images import MEAN, STD
    from clipx.tokenizer import END, open_clip_tokenizer
    from clipx.weights.convert import HUGGING_FACE, hugging_face_config, to_hugging_face
    from clipx.weights.load import model_node

    node = model_node(model)
    if node["text"]["vocab"] != END + 1:
        raise UserError(f"model.text.vocab={node['text']['vocab']} is not that of the tokenizer, {END + 1:,}; "
                        "to=open_clip writes it all the same")
    write_json(out / HUGGING_FACE, hugging_face_config(node))
    write_tensors(to_hugging_face(model.state_dict()), out / "model.safetensors")
    size, context = node["image"]["size"], node["text"]["context"]
    write_json(out / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": size}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    })  # fmt: skip
    bpe = open_clip_tokenizer().SimpleTokenizer()
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


def write_tensors(state: dict[str, "Tensor"], path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save(state, metadata={"format": "pt"}))       # its save_file lets nobody else read it


def check_same_weights(model: "CLIP", out: Path) -> None:
    """Read back what was written.

    Raises:
        UserError: a tensor is not the same to the bit.
    """
    from torch import equal

    from clipx.weights.load import find

    found, own = find(out).state, model.state_dict()
    different = sorted(name for name in own if name not in found or not equal(found[name], own[name].float()))
    if different:
        raise UserError(f"{different[0]} is not the same when it is read back; nothing is exported")


def check_same_features(model: "CLIP", ask: Callable[..., Peer], out: Path) -> None:
    """Real pictures and captions, encoded by both.

    Raises:
        UserError: the features differ, or the pictures are prepared otherwise.
    """
    import torch

    from clipx.data.emoji import open_emoji
    from clipx.data.images import STD, decode, get_image_transform
    from clipx.tokenizer import SimpleTokenizer

    samples = [open_emoji().train.read(number) for number in range(PROBES)]
    pictures, captions = [decode(sample.picture) for sample in samples], [sample.captions[-1] for sample in samples]
    transform, tokenizer = get_image_transform(model.visual.size), SimpleTokenizer(model.text.context)
    pixels = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad():
        image, text, pixels_there = ask(out, pictures, captions, pixels, tokenizer(captions))
        pairs = {"pictures": (model.encode_image(pixels, True), image), "captions": (model.encode_text(
            tokenizer(captions), True), text)}
    far = {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}
    off = (pixels - pixels_there).abs().max().item() * max(STD) * 255
    logger.info("checked   features of %d pictures and captions differ by %.1g at most, pixels by %.1f levels of 255",
                PROBES, max(far.values()), off)
    for name, value in far.items():
        if not value <= CLOSE:
            raise UserError(f"the features of {name} differ by {value:.3g}, more than {CLOSE}; nothing is exported")
    if off > GREY:
        raise UserError(f"the pictures' pixels differ by {off:.1f} levels of 255; nothing is exported")


def ask_open_clip(
    out: Path, pictures: list["Image.Image"], captions: list[str], pixels: "Tensor", tokens: "Tensor"
) -> Peer:
    """Its own model on its own pixels and tokens."""
    import open_clip
    import torch

    quiet = logging.NullHandler()       # its words go to the root logger, which would show ours twice from then on
    logging.getLogger().addHandler(quiet)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    logging.getLogger().removeHandler(quiet)
    model.eval()
    there = torch.stack([transform(picture) for picture in pictures])
    return model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(captions), normalize=True), there


def ask_hugging_face(
    out: Path, pictures: list["Image.Image"], captions: list[str], pixels: "Tensor", tokens: "Tensor"
) -> Peer:
    """Its own model on our pixels and its own tokens; its processor resizes pictures by another library."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(out, local_files_only=True)
    processor = transformers.CLIPProcessor.from_pretrained(out, local_files_only=True)
    model.eval()
    given = processor(text=captions, images=pictures, return_tensors="pt", padding=True, truncation=True)
    found = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], pixel_values=pixels)
    return found.image_embeds, found.text_embeds, given["pixel_values"]


if __name__ == "__main__":
    main()
