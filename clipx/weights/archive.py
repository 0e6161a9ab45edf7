"""Files of tensors, read without running anything that is in them."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from clipx.config.runs import suggest_runs
from clipx.errors import UserError

STORAGES = {"HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
            "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32}
BROKEN = (UnpicklingError, SafetensorError, BadZipFile, RuntimeError, EOFError, ValueError, KeyError, AttributeError,
          TypeError, IndexError, StopIteration)       # what readers raise for the bytes of a file


class CheckpointError(UserError):
    """A checkpoint, or weights of another project, cannot be used."""


def opened(path: Path) -> dict[str, Any]:
    """What a file of ``torch.save``, of safetensors or of TorchScript holds, on the CPU.

    Raises:
        CheckpointError: there is none, or it is another kind of file.
    """
    try:
        content = content_of(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = f"there is no such checkpoint{suggest_runs(path)}" if missing else error.strerror
        raise CheckpointError(f"{path}: {reason}") from error
    except BROKEN as error:
        raise CheckpointError(f"{path} is not a checkpoint: it is cut short, or another kind of file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def content_of(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if is_zipfile(path):
        with ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return dict(tensors_of(Script(archive).load()))
            if any(entry.compress_type != ZIP_STORED for entry in archive.infolist()):      # no bombs
                raise UnpicklingError(f"{path} is packed")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if is_zipfile(path) and (objects := get_unsafe_globals_in_checkpoint(path)):
            raise CheckpointError(f"{path} is not a checkpoint of tensors alone: it holds objects ({objects[0]}), and "
                                  "code in a file is never run; save its state dict by itself where it was made: "
                                  "torch.save(model.state_dict(), FILE)") from error
        raise


class Script(Unpickler):
    """The objects of a TorchScript archive, such as OpenAI's, without their code.

    It knows how a tensor is put together, and nothing else: every class that the archive names becomes a record of
    attributes, and what is no class of the archive's own is refused.
    """

    def __init__(self, archive: ZipFile):
        self.archive = archive
        self.root = next(name for name in archive.namelist() if name.endswith("/data.pkl"))[: -len("data.pkl")]
        self.record = type("Record", (), {})            # a new one each time: a file can write on it
        super().__init__(BytesIO(archive.read(self.stored("data.pkl"))))

    def stored(self, name: str) -> str:
        """The name of an entry, which is not packed."""
        entry = self.archive.getinfo(self.root + name)
        if entry.compress_type != ZIP_STORED:
            raise UnpicklingError(f"{entry.filename} is packed")
        return entry.filename

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):     # a list of a type
            return list
        if module.partition(".")[0] == "__torch__":
            return self.record
        raise UnpicklingError(f"{module}.{name} is not called")

    def persistent_load(self, key: tuple[str, torch.dtype, str, str, int]) -> Tensor:
        """(n,) the storage of that name."""
        return torch.frombuffer(bytearray(self.archive.read(self.stored(f"data/{key[2]}"))), dtype=key[1])

    def tensor(
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        return storage.as_strided(size, stride, offset).clone()


def tensors_of(record: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors below an object, named as a state dict names them."""
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif type(value) is type(record):
            yield from tensors_of(value, f"{prefix}{name}.")
