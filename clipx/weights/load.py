"""Load a run or weights, of clipx or others: as a model to use, or to initialise a run."""

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
from clipx.weights.archive import CheckpointError, read_file
from clipx.weights.checkpoint import best_or_last, verify
from clipx.weights.convert import HUGGING_FACE, OPEN_CLIP, Node, Weights
from clipx.weights.unwrap import check_finite

TOWERS = {"image": "clipx.models.vision.ImageEncoder", "text": "clipx.models.text.TextEncoder"}
HEADS = {1280: 16}          # by width, for weights that do not say; other heads are 64 wide
IMAGE_POSITIONS, TEXT_POSITIONS = "visual.positional_embedding", "positional_embedding"
PREPROCESSING = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}


def load(
    run_or_weights: str | Path,
    device: str | torch.device = "cpu",
    trust: Sequence[str] = (),
    act: Act | None = None,
) -> tuple[CLIP, Callable[[Image.Image], Tensor], SimpleTokenizer]:
    """Load a trained model with its transform and tokenizer.

    Args:
        run_or_weights: a run's directory (its best checkpoint, else its last); a checkpoint; OpenAI's or open_clip's
            weights in a file (.pt or .safetensors); a directory of open_clip's or Hugging Face's; or
            ``open_clip:MODEL/PRETRAINED``, if open_clip has downloaded it before.
        device: device of the model.
        trust: packages besides clipx whose code the checkpoint's model may call.
        act: activation of weights that do not say theirs, ``quick_gelu`` or ``gelu``.

    Returns:
        The model in evaluation mode, its image transform and its tokenizer.

    Raises:
        CheckpointError: there are no weights, they cannot be used, or their model is not one of ``clipx.models``.
    """
    found = find(run_or_weights)
    for tower in own_towers(found.node):
        fill_in(tower, act, str(run_or_weights))
    try:
        model = build(found.node, trust=trust, own="clipx.models")
    except UserError as error:
        raise CheckpointError(f"{run_or_weights}: {error}") from error
    except TypeError as error:          # an unknown argument, or a wrong type
        raise CheckpointError(f"{run_or_weights}: its config's model cannot be built: {error}") from error
    if not isinstance(model, CLIP):
        raise CheckpointError(f"{run_or_weights}: its config's model is a {type(model).__name__}, not a CLIP")
    check_shapes(found.state, model, str(run_or_weights))
    model.load_state_dict(found.state)
    return model.to(device).eval(), get_image_transform(model.visual.size), SimpleTokenizer(model.text.context)


def initialise(model: CLIP, init_from: str) -> str:
    """Initialise a model from weights.

    Args:
        model: may have another picture size than the weights, or a shorter context.
        init_from: as in ``load``.

    Returns:
        A description for the log: where the weights come from, and what was resized.

    Raises:
        CheckpointError: there are no weights, or they do not fit.
    """
    found, own = find(init_from), model.state_dict()
    mismatched = mismatched_keys(found.node, model)
    remedy = f"; {' '.join(mismatched)} fits" if mismatched else ""
    state, resized = fit_positions(found.state, own)
    check_shapes(state, model, f"init_from={init_from}", remedy)
    if mismatched:
        raise CheckpointError(f"init_from={init_from} was trained as another model than this one, with the same "
                              f"shapes{remedy}")
    model.load_state_dict(state)
    return f"from {init_from}{resized}"


def find(where: str | Path) -> Weights:
    """Read weights of any supported kind.

    Raises:
        CheckpointError: there are none, or they are damaged or of another kind.
    """
    path = Path(where).expanduser()
    if str(where).startswith("open_clip:"):
        found = convert.read_open_clip_cache(str(where).partition(":")[2])
    elif path.is_dir() and any((path / name).is_file() for name in (OPEN_CLIP, HUGGING_FACE)):
        found = convert.read_directory(path)
    elif path.is_dir():
        found = weights_from_run(best_or_last(path))
    elif is_clipx_checkpoint(content := read_file(path)):
        found = weights_from_run(path, content)
    else:
        found = convert.weights_from_state_dict(content, path)
    check_finite(found.state, where)
    for key, value in PREPROCESSING.items():
        theirs = found.preprocessing.get(key)
        if theirs is not None and not is_close(theirs, value):
            raise CheckpointError(f"{where} was trained on pictures prepared with {key}={theirs}; clipx has {value}")
    return found


def is_close(one: Any, other: Any) -> bool:
    """Whether two settings are equal, numbers up to rounding."""
    return one == other if isinstance(other, str) else torch.allclose(torch.tensor(one), torch.tensor(other), atol=1e-3)


def is_clipx_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether clipx wrote a checkpoint; others have a model_state_dict, too, but no model config."""
    state = content.get("model_state_dict")
    tensors = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    return tensors and isinstance(content.get("config"), Mapping)


def weights_from_run(path: Path, content: dict[str, Any] | None = None) -> Weights:
    """Read the weights in a checkpoint of clipx."""
    content = verify(read_file(path) if content is None else content, path)
    if not is_clipx_checkpoint(content):
        raise CheckpointError(f"{path} is not a checkpoint of clipx: it has no config, or no tensors")
    node = content["config"].get("model")
    for tower in own_towers(node):
        tower.setdefault("act", "quick_gelu")       # old checkpoints do not say it
        tower.setdefault("heads", 12 if tower["_target_"] == TOWERS["image"] else 8)       # defaults of the towers
    return Weights(content["model_state_dict"], node, {})


def own_towers(node: Any) -> list[Node]:
    """The nodes of clipx's own towers."""
    parts = [node.get(tower) for tower in TOWERS] if isinstance(node, Mapping) else []
    return [part for part in parts if isinstance(part, dict) and part.get("_target_") in TOWERS.values()]


def fill_in(tower: Node, act: Act | None, where: str) -> None:
    """Fill in a tower's activation and heads, which shapes do not show.

    Raises:
        CheckpointError: the activation is unknown, or ``act`` contradicts it.
    """
    if act not in (None, tower.setdefault("act", act)):
        raise CheckpointError(f"act={act}, but {where} was trained with act={tower['act']}; leave act out")
    if tower["act"] is None:
        raise CheckpointError(f"{where} does not say its activation; add act=quick_gelu for OpenAI's weights and "
                              "open_clip's -quickgelu models, act=gelu for open_clip's others")
    if "width" in tower and "heads" not in tower:
        tower["heads"] = HEADS.get(tower["width"], tower["width"] // 64)


def model_node(model: CLIP) -> Node:
    """Return the config node of a model with clipx's own towers."""
    node = convert.infer_node(model.state_dict(), "the model")
    for tower, part in zip(TOWERS, (model.visual, model.text), strict=True):
        node[tower] |= {"heads": part.heads, "act": part.act}
    return node


def mismatched_keys(theirs: Any, model: CLIP) -> list[str]:
    """Return the KEY=VALUE overrides that would turn a model into that of a node, as far as the node says them."""
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


def fit_positions(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Fit the position embeddings to ``own``; also return a description of what was resized."""
    if not state.keys() >= {IMAGE_POSITIONS, TEXT_POSITIONS} <= own.keys():
        return dict(state), ""
    description = ""
    before, after = (len(one[IMAGE_POSITIONS]) for one in (state, own))
    long, short = (len(one[TEXT_POSITIONS]) for one in (state, own))
    if before != after:
        description += "; position embeddings of pictures resized from {0} x {0} to {1} x {1} patches".format(
            *(round((count - 1) ** 0.5) for count in (before, after)))
    if long > short:
        description += f"; those of captions truncated from {long} to {short} tokens"
    return convert.resize_positions(state, own), description


def check_shapes(state: Mapping[str, Tensor], model: CLIP, where: str, remedy: str = "") -> None:
    """Check that a state dict has the names and shapes of a model.

    Raises:
        CheckpointError: one differs; the message names the first.
    """
    own = model.state_dict()
    for key in dict.fromkeys([*own, *state]):
        theirs, ours = (describe_shape(one.get(key)) for one in (state, own))
        if theirs != ours:
            raise CheckpointError(f"{where} does not fit: {key} is {theirs} there and {ours} in the model{remedy}")


def describe_shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else " x ".join(map(str, tensor.shape)) or "one number"
