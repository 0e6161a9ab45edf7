"""What a trained model says of pictures."""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipx.cores import limit_threads
from clipx.data.files import Files, find_pictures, read_lines
from clipx.data.images import Normalise, decode, eval_crop
from clipx.data.loader import load_chunks, split_range
from clipx.data.readers import EvalReader
from clipx.devices import select_device, select_workers
from clipx.errors import UserError
from clipx.evals.features import encode_texts
from clipx.evals.figures import page, short
from clipx.models.clip import CLIP
from clipx.models.layers import Act
from clipx.tokenizer import SimpleTokenizer
from clipx.weights.load import load

SHOWN = 224         # pixels of a picture on it
CHUNK = 64          # pictures that a worker reads at once
LIKE_A_FILE = re.compile(r"^[^,]*(/[^,]*|\.[A-Za-z]\w{0,4})$")      # one text, with a slash or an extension


@dataclass(frozen=True)
class Found:
    """N pictures as a model sees them."""

    model: CLIP
    tokenizer: SimpleTokenizer
    paths: list[Path]       # N
    features: Tensor        # (N, E) unit vectors
    bad: dict[str, str]     # why pictures are left out, by path

    def texts(self, texts: list[str]) -> Tensor:
        """(M, E) unit vectors."""
        return encode_texts(self.model, self.tokenizer, self.model.logit_scale.device, texts)


@torch.no_grad()
def encode_pictures(
    run: str, images: str, device: str, workers: str | int, trust: Sequence[str], act: Act | None
) -> Found:
    """Load a model and show it pictures.

    Raises:
        UserError: the model cannot be loaded, or there is no picture that can be read.
    """
    limit_threads()
    paths = find_pictures(images)
    model, _, tokenizer = load(run, select_device(device), trust, act)
    place, size = model.logit_scale.device, model.visual.size
    reader, normalise = EvalReader(Files(paths), size, tokenizer), Normalise(place)
    processes = select_workers(workers) if len(paths) > CHUNK else 0
    kept, features, bad = [], [torch.empty(0, model.visual.embed)], {}
    for chunk in load_chunks(reader, split_range(range(len(paths)), CHUNK), processes, pin=place.type == "cuda"):
        if len(chunk):
            features.append(model.encode_image(normalise(chunk.images.to(place)), True).cpu())
        kept += [paths[sample] for sample in chunk.samples.tolist()]
        bad.update({record.place: record.reason for record in chunk.skipped})
    if not kept:
        raise UserError(f"images={images}: no picture can be read, such as {next(iter(bad))}: {bad[next(iter(bad))]}")
    return Found(model, tokenizer, kept, torch.cat(features), bad)


def read_texts(given: str) -> list[str]:
    """The texts in a file, one a line, or parted by commas.

    Raises:
        UserError: there are none, the file is not UTF-8 text, or what looks like a file is not there.
    """
    file = os.path.expanduser(given)        # os.path takes a long text for no file, where Path raises
    if os.path.isfile(file):
        texts = read_lines(Path(file), "texts")
    elif LIKE_A_FILE.search(given) or os.path.isdir(file):
        raise UserError(f"texts={given}: there is no such file; expected one with a text a line, or texts with commas "
                        'between them: "a cat,a dog"')
    else:
        texts = [part.strip() for part in given.split(",") if part.strip()]
    if not texts:
        raise UserError(f'texts={given} holds none; expected some, such as "a cat,a dog"')
    return texts


@torch.no_grad()
def score(found: Found, texts: list[str], top: int) -> list[dict[str, Any]]:
    """The texts that fit each picture best, with their probabilities among all texts, and cosines."""
    cosine = found.features @ found.texts(texts).T                          # (N, M)
    chance = (found.model.logit_scale.exp().cpu() * cosine).softmax(dim=-1)
    best = chance.topk(min(top, len(texts)), dim=-1).indices.tolist()
    return [
        {"image": str(path), "text": texts[place], "probability": chance[row, place].item(),
         "cosine": cosine[row, place].item()}
        for row, path in enumerate(found.paths) for place in best[row]
    ]  # fmt: skip


@torch.no_grad()
def search(found: Found, text: str, top: int) -> list[dict[str, Any]]:
    """The pictures nearest to a text, with their cosines."""
    cosine = (found.features @ found.texts([text]).T)[:, 0]                 # (N,)
    best = cosine.topk(min(top, len(cosine)))
    return [
        {"image": str(found.paths[place]), "cosine": value}
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def show(rows: list[dict[str, Any]], text: str, out: Path) -> None:
    """Draw the pictures of a search, nearest first, as much of them as the model sees.

    Raises:
        UserError: ``out`` cannot be written.
    """
    pictures = [eval_crop(decode(Path(row["image"]).read_bytes()), SHOWN) for row in rows]
    figure = page(pictures, [f"{row['cosine']:.3f}  {short(Path(row['image']).name)}" for row in rows])
    figure.suptitle(short(text))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # of letters that the font has not
            figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UserError(f"out={out} cannot be written ({error}); expected the path of a .png or .pdf") from error
