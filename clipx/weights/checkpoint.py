"""Checkpoints: written whole or not at all, read without running anything that is in them."""

import io
import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from clipx.distributed import rank
from clipx.weights.archive import CheckpointError, opened

FORMAT = 2          # of what a run needs to go on


def versions() -> dict[str, str]:
    """What a run was made with."""
    import clipx

    return {"clipx": clipx.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def save(path: Path, content: Mapping[str, Any], before: Path | None = None) -> None:
    """Write a checkpoint in place of the one at ``path``; whatever happens, one of the two stands there whole.

    Args:
        path: the file.
        content: plain dicts, lists, tensors, strings and numbers; format, versions and checksum are added.
        before: where the one goes that stands at ``path``.

    Raises:
        CheckpointError: it cannot be written.
    """
    whole = {**content, "format": FORMAT, "versions": versions(), "checksum": checksum(content)}
    temporary = path.with_suffix(".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            written = Written(file)
            try:
                torch.save(whole, written)
            except RuntimeError as error:       # torch hides what the file has raised
                raise written.error or error from error
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        need = sum(tensor.nbytes for _, tensor in tensors(content))
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. It needs {need / 1e9:.3g} GB; the checkpoint before stands, "
            "and when there is room the same command goes on from it"
        ) from error


class Written(io.RawIOBase):
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


class AsyncSaver:
    """Writes a run's checkpoints in the background, for the length of a ``with``; its end waits for what is written.

    The run stops for the copy to the memory of the host alone, and for a save that is not done when the next is due.
    Rank 0 alone writes.

    Args:
        directory: of the checkpoints.
        identity: what the run is; goes into each.
        previous: whether the ``last`` that stands there is worth keeping as ``previous``.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], previous: bool):
        self.directory, self.identity, self.previous = directory, identity, previous
        self.pool, self.job = ThreadPoolExecutor(1), None

    def __enter__(self) -> "AsyncSaver":
        for file in self.directory.glob("*.writing") if rank() == 0 else ():       # of a process that was killed
            file.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown()
        if error is None:
            self.wait()

    def __call__(self, content: Mapping[str, Any], kinds: Sequence[str]) -> None:
        """Save as each of some names, clip_NAME.pt."""
        if rank() == 0:
            self.wait()
            self.job = self.pool.submit(self.write, on_host({**content, **self.identity}), kinds)

    def write(self, content: Mapping[str, Any], kinds: Sequence[str]) -> None:
        for kind in kinds:
            before = self.directory / "clip_previous.pt" if kind == "last" and self.previous else None
            save(self.directory / f"clip_{kind}.pt", to_use(content) if kind == "best" else content, before)
            self.previous |= kind == "last"

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: it could not be.
        """
        job, self.job = self.job, None
        if job:
            job.result()

    def check(self) -> None:
        """Raise what has failed, without waiting."""
        if self.job and self.job.done():
            self.wait()


def to_use(content: Mapping[str, Any]) -> dict[str, Any]:
    """All but the optimiser's state: enough to use the weights, in a third of the bytes."""
    return {key: value for key, value in content.items() if key != "optimizer"}


def on_host(content: Any) -> Any:
    """A copy in the memory of the host, which nobody changes."""
    return tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="cpu").copy_(tensor), content)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU, its checksum held.

    Raises:
        CheckpointError: there is none, it is not one of ours, or its bytes have changed.
    """
    return verified(opened(path), path)


def verified(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same, where it is a checkpoint of ours.

    Raises:
        CheckpointError: it is not, or its bytes have changed.
    """
    if "model_state_dict" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of clipx: it has no model_state_dict")
    if content.get("checksum", expected := checksum(content)) != expected:
        raise CheckpointError(f"{path} is damaged: its checksum does not fit")
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
