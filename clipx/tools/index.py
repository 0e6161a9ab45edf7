"""An index: the embeddings of a collection in parts, in clip-retrieval's layout, and the search in it.

embed.json                      what it was made from
img_emb/img_emb_0000.npy        (N, E) fp16 unit vectors of the pictures of a part
text_emb/text_emb_0000.npy      (N, E) fp16 unit vectors of their first captions
metadata/metadata_0000.parquet  image_path, caption, key, shard, row for row
parts/parts_0000.json           rows, skipped pictures, and size and hash of each file: written last
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from clipx.data.files import WRITING, write_atomic
from clipx.data.loader import split_range
from clipx.data.origin import Origin
from clipx.errors import UserError
from clipx.evals.features import Skip

FORMAT = 1
ABOUT = "embed.json"
SUFFIXES = {"img_emb": ".npy", "text_emb": ".npy", "metadata": ".parquet", "parts": ".json"}  # by folder
GROUP = 4096  # rows of the metadata that are read at once
TILE = 1 << 23  # values that are converted to float32 at once, 34 MB


@dataclass(frozen=True)
class Part:
    """N embedded samples."""

    images: Tensor  # (N, E) fp16 unit vectors
    texts: Tensor  # (N, E) fp16 unit vectors, of the first captions
    captions: list[str]  # N
    origins: list[Origin]  # N
    skipped: list[Skip]  # samples that could not be read


class Hit(NamedTuple):
    """A row that a search found."""

    cosine: float
    part: int
    row: int  # in the part


@dataclass(frozen=True)
class Index:
    """A directory of embeddings."""

    directory: Path
    about: Mapping[str, Any]  # what it was made from, plain values; embed.json

    @property
    def parts(self) -> list[range]:
        """Samples of each part."""
        return [*split_range(range(self.about["samples"]), self.about["part_size"])]

    def path(self, folder: str, part: int) -> Path:
        digits = max(4, len(str(len(self.parts) - 1)))
        return self.directory / folder / f"{folder}_{part:0{digits}}{SUFFIXES[folder]}"

    def write(self, number: int, part: Part) -> None:
        """Write a part; its record comes last, so that a part without one is not finished.  Raises OSError."""
        files = {"img_emb": npy(part.images), "text_emb": npy(part.texts), "metadata": parquet(part)}
        hashes = {folder: {"bytes": len(content), "blake2b": digest(content)} for folder, content in files.items()}
        record = {"rows": len(part.captions), "skipped": part.skipped, "files": hashes}
        files["parts"] = memoryview((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        for folder, content in files.items():
            path = self.path(folder, number)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, content)

    def record(self, number: int, thorough: bool = False) -> dict[str, Any] | None:
        """Return the record of a finished part, else None.

        Args:
            number: of the part.
            thorough: compare the bytes of its files, not only their number.
        """
        try:
            found = json.loads(self.path("parts", number).read_bytes())
            for folder, expected in found["files"].items():
                path = self.path(folder, number)
                if path.stat().st_size != expected["bytes"]:
                    return None
                if thorough and digest(path.read_bytes()) != expected["blake2b"]:
                    return None
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return found

    def row(self, hit: Hit) -> dict[str, Any]:
        """Read the metadata of a row."""
        from pyarrow.parquet import ParquetFile

        group, place = divmod(hit.row, GROUP)
        with ParquetFile(self.path("metadata", hit.part)) as file:
            return file.read_row_group(group).slice(place, 1).to_pylist()[0]

    def remove_unfinished(self) -> None:
        """Remove the files that a killed process was writing."""
        for path in (*self.directory.glob(f"{ABOUT}{WRITING}*"), *self.directory.glob(f"*/*{WRITING}*")):
            if path.parent.name in SUFFIXES or path.parent == self.directory:
                path.unlink()


def npy(rows: Tensor) -> memoryview:
    """The bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, rows.numpy())
    return file.getbuffer()


def parquet(part: Part) -> memoryview:
    """The bytes of a part's metadata; columns as clip-retrieval names them, and what it does not have."""
    import pyarrow
    from pyarrow.parquet import write_table

    columns = {
        "image_path": [one.path or one.key for one in part.origins],
        "caption": part.captions,
        "key": [one.key for one in part.origins],
        "shard": [one.shard for one in part.origins],
    }
    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    file = io.BytesIO()
    write_table(pyarrow.table(columns, schema), file, row_group_size=GROUP)
    return file.getbuffer()


def digest(content: bytes | memoryview) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def open_index(where: str, weights: str) -> Index:
    """Open a finished index.

    Args:
        where: its directory, the value of ``index``.
        weights: checksum of the model that searches it.

    Raises:
        UserError: there is none, a part is missing or incomplete, or other weights made it.
    """
    directory = Path(where).expanduser()
    about = read_about(directory, f"index={where}")
    if about is None:
        raise UserError(f"index={where} has no {ABOUT}; make it: python -m clipx.embed run=RUN data=... out={where}")
    if about["weights"] != weights:
        raise UserError(
            f"index={where} was made with other weights, run={about['run']}; search it with these, or embed the "
            "collection again with yours: python -m clipx.embed run=RUN data=... out=NEW"
        )
    index = Index(directory, about)
    if missing := [number for number in range(len(index.parts)) if index.record(number) is None]:
        raise UserError(
            f"index={where}: {len(missing):,} of its {len(index.parts):,} parts are missing or incomplete, such as "
            f"{index.path('img_emb', missing[0]).name}; rerun the python -m clipx.embed that made it, to complete it"
        )
    return index


def read_about(directory: Path, key: str) -> dict[str, Any] | None:
    """Read embed.json; None if there is none.

    Args:
        directory: of the index.
        key: and its value, for the error.

    Raises:
        UserError: it is damaged, or cannot be read.
    """
    path = directory / ABOUT
    try:
        about = json.loads(path.read_bytes())
        if about["format"] == FORMAT and {"run", "weights"} <= about.keys() and Index(directory, about).parts:
            return about
        reason = "its format is another version's"
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = f"it cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = "it is damaged"
    raise UserError(f"{key}: {path} was not written by this version of embed ({reason}); delete the directory")


def search_index(index: Index, query: Tensor, top: int) -> list[Hit]:
    """Find the pictures nearest to a query, exactly, best first.

    Args:
        index: finished.
        query: (E,) unit vector, float32.
        top: number of pictures.
    """
    best, places = torch.empty(0), torch.empty(0, 2, dtype=torch.int64)  # (K,), (K, 2) part and row
    size = max(1, TILE // len(query))
    tile = torch.empty(size, len(query))  # reused: new memory for each would take longer than the product
    for part in range(len(index.parts)):
        path = index.path("img_emb", part)
        for rows in split_range(range(len(open_memmap(path, "r"))), size):
            # mapped anew, as pages that were read count as this process's memory until they are unmapped
            vectors = torch.from_numpy(open_memmap(path, "c")[rows.start : rows.stop])
            cosine = tile[: len(rows)].copy_(vectors) @ query  # (T,)
            near = cosine.topk(min(top, len(rows)))
            found = torch.stack([torch.full_like(near.indices, part), near.indices + rows.start], dim=1)
            best, places = torch.cat([best, near.values]), torch.cat([places, found])
            order = best.argsort(descending=True, stable=True)[:top]
            best, places = best[order], places[order]
    return [Hit(value, *place) for value, place in zip(best.tolist(), places.tolist(), strict=True)]
