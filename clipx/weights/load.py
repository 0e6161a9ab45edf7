"""Load a run or weights, of clipx or others: as a model to use, or to initialise a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipx.config.instantiate import build
from clipx.data.images import get_image_transform
from clipx.errors import UserError
from clipx.models.clip import CLIP, OUTSIDE_TOWERS
from clipx.models.layers import Act
from clipx.preprocessing import MEAN, STD, Interpolation
from clipx.tokenizer import Tokenizer
from clipx.weights import foreign
from clipx.weights.archive import CheckpointError, read_file
from clipx.weights.checkpoint import best_or_last, final_weights, verify
from clipx.weights.convert import TOWERS, Node, model_node
from clipx.weights.foreign import HUGGING_FACE, OPEN_CLIP, Weights
from clipx.weights.positions import Beyond, fit_positions

HEADS = {1280: 16}  # by width, for weights that do not say; other heads are 64 wide
TowerName = Literal["image", "text"]
DROPOUT = ("drop", "drop_path")  # arguments of a tower that matter only while it is trained
INPUTS = ("mean", "std", "interpolation")  # arguments of an image tower that say how its pictures are prepared


class UnknownActivation(CheckpointError):
    """Weights do not say their activation, nor does the user."""


def load(
    run_or_weights: str | Path,
    device: str | torch.device = "cpu",
    trust: Sequence[str] = (),
    act: Act | None = None,
) -> tuple[CLIP, Callable[[Image.Image], Tensor], Tokenizer]:
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
    if not found.node:
        raise CheckpointError(
            f"{run_or_weights} does not say which model of timm or transformers it holds; open_clip_config.json in a "
            "directory says it, and a run of that model can start from it with init_from"
        )
    for tower in own_towers(found.node).values():
        fill_in(tower, act, str(run_or_weights))
    try:
        model = build(found.node, trust=trust, own="clipx.models")
    except UserError as error:
        raise CheckpointError(f"{run_or_weights}: {error}") from error
    except TypeError as error:  # an unknown argument, or a wrong type
        raise CheckpointError(f"{run_or_weights}: its config's model cannot be built: {error}") from error
    if not isinstance(model, CLIP):
        raise CheckpointError(f"{run_or_weights}: its config's model is a {type(model).__name__}, not a CLIP")
    check_shapes(found.state, model.state_dict(), str(run_or_weights))
    model.load_state_dict(found.state)
    return model.to(device).eval(), get_image_transform(model.visual.preprocessing), model.text.tokenizer


def initialise(model: CLIP, init_from: str | Mapping[TowerName, str], beyond: Beyond = "stretch") -> str:
    """Initialise a model from weights, or single towers of it.

    Args:
        model: may have another picture size or another context than the weights.
        init_from: as in ``load``; or by tower, which then leaves the other tower and the temperature as they are.
        beyond: positions of captions beyond the context of the weights, as in ``fit_positions``.

    Returns:
        A description for the log: where the weights come from, and what was resized.

    Raises:
        CheckpointError: there are no weights, or they do not fit.
    """
    if isinstance(init_from, str):
        return initialise_from(find(init_from), model, f"init_from={init_from}", beyond)
    if beyond == "new" and "text" not in init_from:
        raise CheckpointError(
            "init_positions=new has no effect without weights of a text tower; add init_from=WEIGHTS, or leave it out"
        )
    found = {tower: find(where) for tower, where in init_from.items()}
    sizes = {tower: weights.node.get(tower, {}).get("embed") for tower, weights in found.items()}
    if len({*sizes.values()} - {None}) > 1:
        raise CheckpointError(
            f"init_from.image={init_from['image']} has an embedding of {sizes['image']} numbers and init_from.text="
            f"{init_from['text']} one of {sizes['text']}, but the towers share one space; leave one out"
        )
    return "; ".join(
        initialise_from(
            weights, model, f"init_from.{tower}={init_from[tower]}", beyond if tower == "text" else "stretch", tower
        )
        for tower, weights in found.items()
    )


def initialise_from(found: Weights, model: CLIP, key: str, beyond: Beyond, tower: TowerName | None = None) -> str:
    """Initialise a model, or one tower of it; arguments and result as in ``initialise``, ``key`` is for errors."""
    own = model.state_dict()
    state, resized = fit_positions(part_of(found.state, tower), part_of(own, tower), beyond)
    mismatched = [f"{one}={value}" for one, value in mismatched_keys(found.node, model, tower).items()]
    remedy = f"; {' '.join(mismatched)} fits" if mismatched else ""
    check_shapes(state, part_of(own, tower), key, remedy)
    if mismatched:
        raise CheckpointError(f"{key} was trained with other settings of the same shapes{remedy}")
    model.load_state_dict({**own, **state})
    return f"from {key.partition('=')[2]}" + (f" ({tower} tower)" if tower else "") + resized


def part_of(state: Mapping[str, Tensor], tower: TowerName | None) -> dict[str, Tensor]:
    """The part of a state dict that belongs to a tower; all of it for None."""
    if tower is None:
        return dict(state)
    return {
        name: value
        for name, value in state.items()
        if name not in OUTSIDE_TOWERS and name.startswith("visual.") == (tower == "image")
    }


def find(where: str | Path) -> Weights:
    """Read weights of any supported kind.

    Raises:
        CheckpointError: there are none, or they are damaged or of another kind.
    """
    path = Path(where).expanduser()
    if str(where).startswith("open_clip:"):
        found = foreign.read_open_clip_cache(str(where).partition(":")[2])
    elif path.is_dir() and any((path / name).is_file() for name in (OPEN_CLIP, HUGGING_FACE)):
        found = foreign.read_directory(path)
    else:
        path = best_or_last(path) if path.is_dir() else path
        content = read_file(path)
        read = weights_from_clipx if is_clipx_checkpoint(content) else foreign.weights_from_state_dict
        found = read(content, path)
    check_finite(found.state, where)
    if found.preprocessing and found.node:
        found.node["image"] |= read_preprocessing(found.preprocessing, where)
    return found


def read_preprocessing(found: Mapping[str, Any], where: object) -> Node:
    """Return what weights say of their pictures, as arguments of an image tower.

    Raises:
        CheckpointError: clipx does not prepare pictures so.
    """
    for key, supported in (("resize_mode", ["shortest"]), ("interpolation", [*get_args(Interpolation)])):
        if (value := found.get(key)) not in (None, *supported):
            raise CheckpointError(
                f"{where} was trained on pictures prepared with {key}={value}; clipx supports {' and '.join(supported)}"
            )
    node = {key: found[key] for key in INPUTS if found.get(key) is not None}
    for key, default in (("mean", MEAN), ("std", STD)):
        if key in node:
            theirs = np.broadcast_to(node[key], 3)
            node[key] = [*default] if np.allclose(theirs, default, atol=1e-3) else theirs.tolist()  # others round them
    return node


def is_clipx_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether clipx wrote a checkpoint; others have a model_state_dict, too, but no model config."""
    state = content.get("model_state_dict")
    tensors = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    return tensors and isinstance(content.get("config"), Mapping)


def weights_from_clipx(content: dict[str, Any], path: Path) -> Weights:
    """From a checkpoint of clipx, after verifying it."""
    node = verify(content, path)["config"].get("model")
    for name, tower in own_towers(node).items():
        tower.setdefault("act", "quick_gelu")  # old checkpoints do not say it
        tower.setdefault("heads", {"image": 12, "text": 8}[name])  # defaults of the towers
        tower.setdefault("layer_scale", None)
        if name == "image":
            node[name] = {"mean": [*MEAN], "std": [*STD], "interpolation": "bicubic", "registers": 0} | tower
    return Weights(final_weights(content), node, {})


def check_finite(state: Mapping[str, Tensor], source: object) -> None:
    """Refuse the weights of a run that diverged.

    Raises:
        CheckpointError: a tensor has NaN or infinite values.
    """
    for name, value in state.items():
        if wrong := value.numel() - int(torch.isfinite(value).sum()):
            raise CheckpointError(
                f"{source}: {wrong:,} of the {value.numel():,} values of {name} are NaN or infinite; "
                "use a checkpoint from before the training diverged"
            )


def own_towers(node: Any) -> dict[str, Node]:
    """The nodes of clipx's own towers, by name."""
    parts = node if isinstance(node, Mapping) else {}
    return {
        name: part
        for name, target in TOWERS.items()
        if isinstance(part := parts.get(name), dict) and part.get("_target_") == target
    }


def fill_in(tower: Node, act: Act | None, where: str) -> None:
    """Fill in a tower's activation and heads, which shapes do not show.

    Raises:
        CheckpointError: the activation is unknown, or ``act`` contradicts it.
    """
    if act not in (None, tower.setdefault("act", act)):
        raise CheckpointError(f"act={act}, but {where} was trained with act={tower['act']}; leave act out")
    if tower["act"] is None:
        raise UnknownActivation(
            f"{where} does not say its activation; add act=quick_gelu for OpenAI's weights and "
            "open_clip's -quickgelu models, act=gelu for open_clip's others"
        )
    if "width" in tower and "heads" not in tower:
        tower["heads"] = HEADS.get(tower["width"], tower["width"] // 64)


def mismatched_keys(theirs: Any, model: CLIP, only: TowerName | None = None) -> dict[str, Any]:
    """Return the overrides that would turn a model, or one tower, into that of a node, as far as the node says them."""
    node, found = model_node(model), {}
    if only is None and isinstance(theirs, Mapping) and ("bias" in node) != (theirs.get("bias") is not None):
        found["model.bias"] = "null" if "bias" in node else f"{theirs['bias']:.4g}"
    for name, ours in node.items():
        tower = theirs.get(name) if isinstance(theirs, Mapping) and only in (None, name) else None
        if not isinstance(tower, Mapping) or not isinstance(ours, Mapping) or tower["_target_"] != ours["_target_"]:
            continue
        # None is what timm's weights say
        said = {key: value for key, value in tower.items() if value is not None or key not in INPUTS}
        for key, value in ours.items():
            wanted = said.get(key, value)
            initial = key == "layer_scale" and None not in (wanted, value)  # the weights have the trained ones
            if wanted != value and not initial and key not in ("size", "context", *DROPOUT):
                place = "image" if only and key == "embed" else name  # text.embed follows image.embed
                found[f"model.{place}.{key}"] = "null" if wanted is None else str(wanted).replace(" ", "")
    return found


def check_shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str, remedy: str = "") -> None:
    """Check that a state dict has the names and shapes of ``own``, that of a model.

    Raises:
        CheckpointError: one differs; the message names the first.
    """
    for key in dict.fromkeys([*own, *state]):
        theirs, ours = (describe_shape(one.get(key)) for one in (state, own))
        if theirs != ours:
            raise CheckpointError(
                f"{where} does not fit: {key} is {theirs} in the weights and {ours} in the model{remedy}"
            )


def describe_shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else " x ".join(map(str, tensor.shape)) or "one number"
