"""Checkpoints: written atomically, and read without running any code in them."""

import io
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import clipx
from clipx.distributed import rank
from clipx.weights.archive import CheckpointError, read_file

FORMAT = 2  # of what a run needs to resume
# not part of clip_best.pt
ONLY_TO_RESUME = {
    "optimizer", "lora_state_dict", "ema_state_dict", "ema_lora_state_dict", "ema_updates", "projection_state_dict",
}  # fmt: skip


def save(path: Path, content: Mapping[str, Any], backup: Path | None = None, links: Sequence[Path] = ()) -> None:
    """Replace the checkpoint at ``path`` atomically: a failure leaves the old one intact.

    Args:
        path: the file.
        content: plain dicts, lists, tensors, strings and numbers; format, versions and checksum are added.
        backup: where to move the old checkpoint, or None to overwrite it.
        links: further paths of the same checkpoint.

    Raises:
        CheckpointError: it cannot be written.
    """
    versions = {"clipx": clipx.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    complete = {**content, "format": FORMAT, "versions": versions, "checksum": checksum(content)}
    temporary = path.with_suffix(".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb", buffering=0) as raw, ErrorRecorder(raw) as file:
            try:
                torch.save(complete, file)
            except RuntimeError as error:  # torch hides the OSError of the file
                raise file.error or error from error
            file.flush()
            os.fsync(file.fileno())
        if backup and path.exists():
            os.replace(path, backup)
        os.replace(temporary, path)
        for link in links:
            link_or_copy(path, link)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        need = sum(tensor.nbytes for _, tensor in tensors(content))
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. It needs {need / 1e9:.3g} GB. The previous checkpoint is "
            "intact; free some space and rerun the same command to resume"
        ) from error


def link_or_copy(source: Path, path: Path) -> None:
    """Replace ``path`` by a hard link to ``source``, or by a copy if the file system has no links."""
    temporary = path.with_suffix(".writing")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class ErrorRecorder(io.BufferedWriter):
    """A file that keeps the error of a failed write."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


class AsyncSaver:
    """Write a run's checkpoints in the background; a context manager, whose exit waits for the last write.

    The run waits only for the copy to host memory, and for a save that is unfinished when the next is due.
    Only rank 0 writes.

    Args:
        directory: of the checkpoints.
        identity: what identifies the run; part of each checkpoint.
        previous: whether to keep the existing ``last`` as ``previous``.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], previous: bool):
        self.directory, self.identity, self.previous = directory, identity, previous
        self.pool = ThreadPoolExecutor(1)
        self.job: Future[None] | None = None

    def __enter__(self) -> "AsyncSaver":
        for file in self.directory.glob("*.writing") if rank() == 0 else ():  # of a process that was killed
            file.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown()
        if error is None:
            self.wait()

    def __call__(self, content: Mapping[str, Any], kinds: Sequence[str]) -> None:
        """Save as clip_KIND.pt for each of ``best``, ``last`` and ``step_N`` that is given, in this order."""
        if rank() == 0:
            self.wait()
            # copies, which training does not change
            kept = tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), {**content, **self.identity})
            self.job = self.pool.submit(self.write, kept, kinds)

    def write(self, content: Mapping[str, Any], kinds: Sequence[str]) -> None:
        paths = {kind: self.directory / f"clip_{kind}.pt" for kind in kinds}
        if best := paths.pop("best", None):
            kept = {key: value for key, value in content.items() if key not in ONLY_TO_RESUME}  # a third of the bytes
            save(best, {**kept, "model_state_dict": final_weights(content)})
        if paths:
            backup = self.directory / "clip_previous.pt" if "last" in paths and self.previous else None
            path, *links = paths.values()
            save(path, content, backup, links)
            self.previous |= "last" in paths

    def wait(self) -> None:
        """Wait for the save in progress.

        Raises:
            CheckpointError: it failed.
        """
        job, self.job = self.job, None
        if job:
            job.result()

    def check(self) -> None:
        """Raise the error of a failed save, without waiting."""
        if self.job and self.job.done():
            self.wait()


def final_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that a checkpoint of a run is evaluated with: their moving average (``ema``), if it has one."""
    weights: dict[str, Tensor] = content.get("ema_state_dict") or content["model_state_dict"]
    return weights


def size_on_disk(checkpoints: Path) -> int:
    """Bytes of all checkpoints in a directory; several names of one file count once."""
    files = [file.stat() for file in checkpoints.glob("clip_*.pt")]
    return sum({file.st_ino: file.st_size for file in files}.values())


def best_or_last(run: Path) -> Path:
    """The checkpoint of a run that stands for it: its best, else its last, whether that exists or not."""
    best, last = (run / "checkpoints" / f"clip_{which}.pt" for which in ("best", "last"))
    return best if best.exists() else last


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU and verify its checksum.

    Raises:
        CheckpointError: it does not exist, was not written by clipx, or is corrupt.
    """
    return verify(read_file(path), path)


def verify(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a checkpoint's content after checking it.

    Raises:
        CheckpointError: it was not written by clipx, or is corrupt.
    """
    if "model_state_dict" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of clipx: it has no model_state_dict")
    if content.get("checksum", expected := checksum(content)) != expected:
        raise CheckpointError(f"{path} is corrupt: its checksum does not match")
    return content


def checksum(content: Mapping[str, Any]) -> str:
    """sha256 of the names, shapes and bytes of all tensors, sorted by name."""
    total = sha256()
    for name, tensor in sorted(tensors(content)):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
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
