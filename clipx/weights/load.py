"""A run or weights, whoever has made them: as a model to use, and as the start of a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipx.config.instantiate import build
from clipx.data.images import MEAN, STD, get_image_transform
from clipx.errors import UserError
from clipx.models.clip import CLIP
from clipx.models.layers import Act
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.tokenizer import SimpleTokenizer
from clipx.weights import convert
from clipx.weights.archive import CheckpointError, opened
from clipx.weights.checkpoint import verified
from clipx.weights.convert import HUGGING_FACE, OPEN_CLIP, Node, Weights
from clipx.weights.unwrap import check_finite

TOWERS = {"image": "clipx.models.vision.ImageEncoder", "text": "clipx.models.text.TextEncoder"}
HEADS = {1280: 16}          # of a tower, by its width, where nothing says them; else they are 64 wide
IMAGE_POSITIONS, TEXT_POSITIONS = "visual.positional_embedding", "positional_embedding"
PIXELS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}


def load(
    run_or_weights: str | Path,
    device: str | torch.device = "cpu",
    trust: Sequence[str] = (),
    act: Act | None = None,
) -> tuple[CLIP, Callable[[Image.Image], Tensor], SimpleTokenizer]:
    """A trained model and what feeds it.

    Args:
        run_or_weights: a run's directory (its best checkpoint, else its last); a checkpoint; OpenAI's or open_clip's
            weights in a file (.pt or .safetensors); a directory of open_clip's or Hugging Face's; or
            ``open_clip:MODEL/PRETRAINED``, where open_clip has downloaded it before.
        device: where the model goes.
        trust: packages besides clipx whose code the checkpoint's model may call.
        act: the activation of weights that do not say it themselves, ``quick_gelu`` or ``gelu``.

    Returns:
        The model in evaluation mode, its image transform and its tokenizer.

    Raises:
        CheckpointError: there are no weights, or they cannot be used, or their model is not one of ``clipx.models``.
    """
    found = find(run_or_weights)
    for tower in own_towers(found.node):
        complete(tower, act, str(run_or_weights))
    try:
        model = build(found.node, trust=trust, own="clipx.models")
    except UserError as error:
        raise CheckpointError(f"{run_or_weights}: {error}") from error
    except TypeError as error:          # an argument that the target does not have, or of another type
        raise CheckpointError(f"{run_or_weights}: its config's model cannot be made: {error}") from error
    if not isinstance(model, CLIP):
        raise CheckpointError(f"{run_or_weights}: its config's model makes a {type(model).__name__}, not a CLIP")
    check_shapes(found.state, model, str(run_or_weights))
    model.load_state_dict(found.state)
    return model.to(device).eval(), get_image_transform(model.visual.size), SimpleTokenizer(model.text.context)


def initialise(model: CLIP, init_from: str) -> str:
    """Fill a model with weights.

    Args:
        model: says what is wanted: its picture size may be another than that of the weights, its context shorter.
        init_from: what ``load`` takes.

    Returns:
        Where they come from, and what was resized, in words.

    Raises:
        CheckpointError: there are no weights, or they do not fit.
    """
    found, own = find(init_from), model.state_dict()
    fits = differing(found.node, model)
    remedy = f"; {' '.join(fits)} fits" if fits else ""
    state, told = resized(found.state, own)
    check_shapes(state, model, f"init_from={init_from}", remedy)
    if fits:
        raise CheckpointError(f"init_from={init_from} was trained as another model than this one, with the same "
                              f"shapes{remedy}")
    model.load_state_dict(state)
    return f"from {init_from}{told}"


def find(where: str | Path) -> Weights:
    """Weights, wherever they are.

    Raises:
        CheckpointError: there are none, or they are damaged or of another kind.
    """
    path = Path(where).expanduser()
    if str(where).startswith("open_clip:"):
        found = convert.cached(str(where).partition(":")[2])
    elif path.is_dir() and any((path / name).is_file() for name in (OPEN_CLIP, HUGGING_FACE)):
        found = convert.directory(path)
    elif path.is_dir():
        best, last = (path / "checkpoints" / f"clip_{which}.pt" for which in ("best", "last"))
        found = of_run(best if best.exists() else last)
    elif is_ours(content := opened(path)):
        found = of_run(path, content)
    else:
        found = convert.of_state_dict(content, path)
    check_finite(found.state, where)
    for key, value in PIXELS.items():
        said = found.pixels.get(key)
        if said is not None and not close(said, value):
            raise CheckpointError(f"{where} was trained on pictures prepared with {key}={said}; clipx has {value}")
    return found


def close(one: Any, other: Any) -> bool:
    """Whether two settings are the same; numbers but for rounding."""
    return one == other if isinstance(other, str) else torch.allclose(torch.tensor(one), torch.tensor(other), atol=1e-3)


def is_ours(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is clipx's; others have a model_state_dict, too, but no config of a model."""
    state = content.get("model_state_dict")
    tensors = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    return tensors and isinstance(content.get("config"), Mapping)


def of_run(path: Path, content: dict[str, Any] | None = None) -> Weights:
    """The weights in a checkpoint of ours."""
    content = verified(opened(path) if content is None else content, path)
    if not is_ours(content):
        raise CheckpointError(f"{path} is not a checkpoint of clipx: it has no config, or no tensors")
    node = content["config"].get("model")
    for tower in own_towers(node):
        tower.setdefault("act", "quick_gelu")       # a checkpoint from before there was another
        tower.setdefault("heads", 12 if tower["_target_"] == TOWERS["image"] else 8)       # the towers' own defaults
    return Weights(content["model_state_dict"], node, {})


def own_towers(node: Any) -> list[Node]:
    """The nodes of the towers, where these are clipx's own."""
    parts = [node.get(tower) for tower in TOWERS] if isinstance(node, Mapping) else []
    return [part for part in parts if isinstance(part, dict) and part.get("_target_") in TOWERS.values()]


def complete(tower: Node, act: Act | None, where: str) -> None:
    """Fill in what shapes do not show.

    Raises:
        CheckpointError: nobody says the activation, or somebody says another.
    """
    if act not in (None, tower.setdefault("act", act)):
        raise CheckpointError(f"act={act}, but {where} says that it was trained with act={tower['act']}; leave act out")
    if tower["act"] is None:
        raise CheckpointError(f"{where} does not say its activation; add act=quick_gelu for OpenAI's weights and "
                              "open_clip's -quickgelu models, act=gelu for open_clip's others")
    if "width" in tower and "heads" not in tower:
        tower["heads"] = HEADS.get(tower["width"], tower["width"] // 64)


def model_node(model: CLIP) -> Node:
    """The node that makes a model of clipx's own towers."""
    node = convert.node_of(model.state_dict(), "the model")
    for tower, part in zip(TOWERS, (model.visual, model.text), strict=True):
        node[tower] |= {"heads": part.heads, "act": part.act}
    return node


def differing(theirs: Any, model: CLIP) -> list[str]:
    """The keys, with their values, by which a model would be that of a node; as far as the node says them."""
    if not isinstance(model.visual, ImageEncoder) or not isinstance(model.text, TextEncoder):
        return []
    ours, found = model_node(model), []
    for tower in own_towers(theirs):
        name = next(name for name, target in TOWERS.items() if target == tower["_target_"])
        for key, value in ours[name].items():
            resizes = key == "size" or (key == "context" and tower.get(key, value) > value)
            if tower.get(key, value) != value and not resizes:
                found.append(f"model.{name}.{key}={tower[key]}")
    return found


def resized(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state dict with position embeddings as many as in ``own``; and what was done, in words."""
    if not state.keys() >= {IMAGE_POSITIONS, TEXT_POSITIONS} <= own.keys():
        return dict(state), ""
    told = ""
    before, after = (len(one[IMAGE_POSITIONS]) for one in (state, own))
    long, short = (len(one[TEXT_POSITIONS]) for one in (state, own))
    if before != after:
        told += "; position embeddings of pictures resized from {0} x {0} to {1} x {1} patches".format(
            *(round((count - 1) ** 0.5) for count in (before, after)))
    if long > short:
        told += f"; those of captions cut from {long} to {short} tokens"
    return convert.resized(state, own), told


def check_shapes(state: Mapping[str, Tensor], model: CLIP, where: str, remedy: str = "") -> None:
    """Raise where a state dict has other names or shapes than a model.

    Raises:
        CheckpointError: it has; the first of them is named.
    """
    own = model.state_dict()
    for key in dict.fromkeys([*own, *state]):
        theirs, ours = (told_shape(one.get(key)) for one in (state, own))
        if theirs != ours:
            raise CheckpointError(f"{where} does not fit: {key} is {theirs} there and {ours} in the model{remedy}")


def told_shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else " x ".join(map(str, tensor.shape)) or "one number"
