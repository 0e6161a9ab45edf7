"""Checkpoints: written whole or not at all, read without running anything that is in them."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipx.build import build
from clipx.data.images import get_image_transform
from clipx.errors import UserError
from clipx.models.clip import CLIP
from clipx.tokenizer import SimpleTokenizer

FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint cannot be used."""


def versions() -> dict[str, str]:
    """What a run was made with."""
    import clipx

    return {"clipx": clipx.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint in place of the one at ``path``; whatever happens, one of the two stands there whole.

    Args:
        path: the file.
        content: plain dicts, lists, tensors, strings and numbers; format, versions and checksum are added.
    """
    whole = {**content, "format": FORMAT, "versions": versions(), "checksum": checksum(content)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    with temporary.open("wb") as file:
        torch.save(whole, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU, its checksum held.

    Raises:
        CheckpointError: there is none, it is not one of ours, or its bytes have changed.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint") from error
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a checkpoint: it is cut short, or another kind of file") from error
    if not isinstance(content, dict) or "model_state_dict" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of clipx: it has no model_state_dict")
    if content.get("checksum", expected := checksum(content)) != expected:
        raise CheckpointError(f"{path} is damaged: its checksum does not fit; use an older checkpoint of the run")
    return content


def checksum(content: Mapping[str, Any]) -> str:
    """sha256 over the names, shapes and bytes of all tensors, in order of their names."""
    total = sha256()
    for name, tensor in sorted(tensors(content)):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def tensors(node: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """All tensors in nested dicts and lists, each with its path."""
    if isinstance(node, Tensor):
        return [(name, node)]
    if isinstance(node, Mapping):
        return [found for key, value in node.items() for found in tensors(value, f"{name}/{key}")]
    if isinstance(node, (list, tuple)):
        return [found for place, value in enumerate(node) for found in tensors(value, f"{name}/{place}")]
    return []


def load(
    run_or_weights: str | Path, device: str | torch.device = "cpu", trust: Sequence[str] = ()
) -> tuple[CLIP, Callable[[Image.Image], Tensor], SimpleTokenizer]:
    """A trained model and what feeds it.

    Args:
        run_or_weights: a run's directory (its best checkpoint, else its last) or a checkpoint.
        device: where the model goes.
        trust: packages besides clipx whose code the checkpoint's model may call.

    Returns:
        The model in evaluation mode, its image transform and its tokenizer.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be used, or its model is not one of ``clipx.models``.
    """
    path = Path(run_or_weights)
    if path.is_dir():
        best, last = (path / "checkpoints" / f"clip_{which}.pt" for which in ("best", "last"))
        path = best if best.exists() else last
    content = read(path)
    try:
        model = build(content["config"]["model"], trust=trust, own="clipx.models")
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(model, CLIP):
        raise CheckpointError(f"{path}: its config's model makes a {type(model).__name__}, not a CLIP")
    model.load_state_dict(content["model_state_dict"])
    return model.to(device).eval(), get_image_transform(model.visual.size), SimpleTokenizer(model.text.context)
