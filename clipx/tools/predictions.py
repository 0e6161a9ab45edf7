"""Encode pictures with a trained model; score them against texts, or search them."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipx.data.catalogue import open_catalogue
from clipx.data.files import Files, find_pictures, read_lines, read_picture
from clipx.data.images import decode, eval_crop
from clipx.data.sample import BadSample
from clipx.data.shards import Shards
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import INDEX_DIR, expand_home
from clipx.devices import limit_threads, select_device, select_workers
from clipx.errors import UserError
from clipx.evals.encoder import CPU_BATCH, EvalEncoder
from clipx.evals.features import Skip
from clipx.evals.figures import picture_grid, save_figure, shorten
from clipx.models.clip import CLIP
from clipx.models.layers import Act
from clipx.tokenizer import Tokenizer
from clipx.tools.index import open_index, search_index
from clipx.weights.checkpoint import checksum
from clipx.weights.load import load

THUMBNAIL = 224  # pixels
LIKE_A_FILE = re.compile(r"^[^,]*(/[^,]*|\.[A-Za-z]\w{0,4})$")  # one text with a slash or an extension


@dataclass(frozen=True)
class EncodedPictures:
    """N pictures encoded by a model."""

    model: CLIP
    tokenizer: Tokenizer
    paths: list[Path]  # N
    features: Tensor  # (N, E) unit vectors
    bad: dict[str, str]  # reason by path, of pictures that are left out

    def encode_texts(self, texts: list[str]) -> Tensor:
        """(M, E) unit vectors."""
        return EvalEncoder(self.model, self.tokenizer).encode_texts(texts)


@torch.no_grad()
def encode_pictures(
    run: str, images: str, device: str, workers: str | int, trust: Sequence[str], act: Act | None
) -> EncodedPictures:
    """Load a model and encode pictures.

    Raises:
        UserError: the model cannot be loaded, or no picture can be read.
    """
    limit_threads()
    paths = find_pictures(images)
    place = select_device(device)
    model, _, tokenizer = load(run, place, trust, act)
    encoder = EvalEncoder(model, tokenizer, select_workers(workers, place) if len(paths) > CPU_BATCH else 0)
    kept, features = [], []
    skipped: list[Skip] = []
    for chunk, image in encoder.encode_images(Files(paths), skipped):
        features.append(image)
        kept += [paths[sample] for sample in chunk.samples.tolist()]
    if not kept:
        first, reason = skipped[0]
        raise UserError(f"images={images}: no picture can be read, for example {first}: {reason}")
    return EncodedPictures(model, tokenizer, kept, torch.cat(features), dict(skipped))


def read_texts(given: str) -> list[str]:
    """Read texts from a file, one per line, or split them at commas.

    Raises:
        UserError: there are no texts, the file is not UTF-8, or what looks like a file does not exist.
    """
    file = os.path.expanduser(given)  # os.path: Path raises for a long text
    if os.path.isfile(file):
        texts = read_lines(Path(file), "texts")
    elif LIKE_A_FILE.search(given) or os.path.isdir(file):
        raise UserError(
            f"texts={given}: there is no such file; expected a file with one text per line, or texts separated by "
            'commas: "a cat,a dog"'
        )
    else:
        texts = [part.strip() for part in given.split(",") if part.strip()]
    if not texts:
        raise UserError(f'texts={given} is empty; expected, for example, "a cat,a dog"')
    return texts


@torch.no_grad()
def score(found: EncodedPictures, texts: list[str], top: int) -> list[dict[str, Any]]:
    """Return the best texts for each picture, with their cosines and their probabilities among all texts."""
    cosine = found.features @ found.encode_texts(texts).T  # (N, M)
    probability = (found.model.logit_scale.exp().cpu() * cosine).softmax(dim=-1)
    best = probability.topk(min(top, len(texts)), dim=-1).indices.tolist()
    return [
        {"image": str(path), "text": texts[index], "probability": probability[row, index].item(),
         "cosine": cosine[row, index].item()}
        for row, path in enumerate(found.paths) for index in best[row]
    ]  # fmt: skip


@torch.no_grad()
def search(found: EncodedPictures, text: str, top: int) -> list[dict[str, Any]]:
    """Return the pictures nearest to a text, with their cosines."""
    cosine = (found.features @ found.encode_texts([text]).T)[:, 0]  # (N,)
    best = cosine.topk(min(top, len(cosine)))
    return [
        {"image": str(found.paths[index]), "cosine": value}
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


@torch.no_grad()
def search_embeddings(
    run: str, index: str, text: str, top: int, device: str, trust: Sequence[str], act: Act | None
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Return the pictures of an index that are nearest to a text, and the encoded files of those that can be read.

    Raises:
        UserError: the model cannot be loaded, or the index is incomplete or of other weights.
    """
    limit_threads()
    model, _, tokenizer = load(run, select_device(device), trust, act)
    found = open_index(index, checksum(model.state_dict()))
    hits = search_index(found, EvalEncoder(model, tokenizer).encode_texts([text])[0], top)
    rows, pictures = [], {}
    for hit in hits:
        row = found.row(hit)
        image = f"{row['shard']}/{row['key']}" if row["shard"] else row["image_path"]
        rows.append({"image": image, "cosine": hit.cosine, "caption": row["caption"]})
        if (picture := read_again(row)) is not None:
            pictures[image] = picture
    return rows, pictures


def read_again(row: Mapping[str, Any]) -> bytes | None:
    """Read the picture of a row of an index; None if it is not here any more, or was never a file."""
    where = Path(row["shard"] or row["image_path"])
    if not where.is_file():
        return None
    try:
        if row["shard"] is None:
            return read_picture(where)
        shard = Shards(open_catalogue([where], expand_home(INDEX_DIR)), None)
        (found,) = np.flatnonzero(shard.keys(0) == row["key"].encode())[:1]
        return shard.read(int(found)).picture
    except (DataError, BadSample, ValueError):  # the file has changed
        return None


def show(rows: list[dict[str, Any]], files: Mapping[str, bytes], text: str, out: Path) -> None:
    """Draw the pictures of a search, nearest first, cropped as the model sees them.

    Args:
        rows: of the search.
        files: encoded pictures, by name in the rows; others are left out.
        text: that was searched.
        out: the page.

    Raises:
        UserError: ``out`` cannot be written.
    """
    rows = [row for row in rows if row["image"] in files]
    pictures = [eval_crop(decode(files[row["image"]]), THUMBNAIL) for row in rows]
    figure = picture_grid(pictures, [f"{row['cosine']:.3f}  {shorten(Path(row['image']).name)}" for row in rows])
    figure.suptitle(shorten(text))
    try:
        save_figure(figure, out)
    except (OSError, ValueError) as error:
        raise UserError(f"out={out} cannot be written ({error}); expected the path of a .png or .pdf") from error
