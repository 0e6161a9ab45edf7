"""Read files of tensors without running any code in them."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import StorageType, get_unsafe_globals_in_checkpoint

from clipx.config.runs import suggest_runs
from clipx.errors import UserError
from clipx.weights import peek

BROKEN = (*peek.BROKEN, SafetensorError, RuntimeError)  # what readers raise for damaged bytes


class CheckpointError(UserError):
    """A checkpoint, or other weights, cannot be used."""


def read_file(path: Path) -> dict[str, Any]:
    """Read a file of ``torch.save``, safetensors or TorchScript, on the CPU.

    Raises:
        CheckpointError: there is no file, or it is another kind of file.
    """
    try:
        content = parse_file(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = f"there is no such checkpoint{suggest_runs(path)}" if missing else error.strerror
        raise CheckpointError(f"{path}: {reason}") from error
    except BROKEN as error:
        raise CheckpointError(f"{path} is not a checkpoint: it is cut short, or another kind of file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def parse_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if is_zipfile(path):
        with ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return dict(named_tensors(TorchScriptUnpickler(archive).load()))
            if any(entry.compress_type != ZIP_STORED for entry in archive.infolist()):  # no zip bombs
                raise UnpicklingError(f"{path} is compressed")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if is_zipfile(path) and (objects := get_unsafe_globals_in_checkpoint(path)):
            raise CheckpointError(
                f"{path} is not a checkpoint of tensors alone: it holds objects ({objects[0]}), which could run "
                "code and are never loaded; save only the state dict: torch.save(model.state_dict(), FILE)"
            ) from error
        raise


class TorchScriptUnpickler(Unpickler):
    """Read the objects of a TorchScript archive, such as OpenAI's, without their code.

    Only tensors are rebuilt.  Classes defined in the archive become plain records; anything else is refused.
    """

    def __init__(self, archive: ZipFile):
        self.archive = archive
        self.root = next(name for name in archive.namelist() if name.endswith("/data.pkl"))[: -len("data.pkl")]
        self.record = type("Record", (), {})  # a new class each time: a file can set its attributes
        super().__init__(BytesIO(archive.read(self.entry_name("data.pkl"))))

    def entry_name(self, name: str) -> str:
        """The full name of an entry; compressed ones are refused."""
        entry = self.archive.getinfo(self.root + name)
        if entry.compress_type != ZIP_STORED:
            raise UnpicklingError(f"{entry.filename} is compressed")
        return entry.filename

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return StorageType(name).dtype
        if module == "torch.jit._pickle" and name.startswith("build_"):  # a typed list
            return list
        if module.partition(".")[0] == "__torch__":
            return self.record
        raise UnpicklingError(f"{module}.{name} is not allowed")

    def persistent_load(self, key: tuple[str, torch.dtype, str, str, int]) -> Tensor:
        """Read a storage -> (n,)."""
        return torch.frombuffer(bytearray(self.archive.read(self.entry_name(f"data/{key[2]}"))), dtype=key[1])

    def rebuild_tensor(
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        return storage.as_strided(size, stride, offset).clone()


def named_tensors(record: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors below an object, named as in a state dict."""
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif type(value) is type(record):
            yield from named_tensors(value, f"{prefix}{name}.")
