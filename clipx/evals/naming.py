"""Naming: rank all names for each held-out picture, and all pictures for each name."""

from collections.abc import Sequence
from pathlib import Path

import torch

from clipx.data.emoji import THINGS
from clipx.data.files import read_lines
from clipx.errors import UserError
from clipx.evals.features import EncodeTexts, Features
from clipx.evals.retrieval import ranks, recalls

SHUFFLE_SEED = 0


def naming(
    val: Features, encode_texts: EncodeTexts, names: str | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall of each picture's name among all names, and of each name's pictures among all pictures.

    Args:
        val: the encoded validation set; the first caption of a picture is its name.
        encode_texts: texts -> (M, E) unit vectors.
        names: file of all candidate names, one per line, including the validation set's; None: the embedded names.
        ks: cut-offs of the recall.

    Returns:
        i2t_r1, ..., t2i_r10 and median ranks; ``shuffled_...`` are the same with pictures assigned to names at
        random: chance.
    """
    file = Path(names).expanduser() if names else THINGS
    if not file.is_file():
        raise UserError(
            f"evals.naming.names={names}: there is no such file; expected a list of all names, one per line"
        )
    candidates = read_lines(file, "evals.naming.names")
    index = {name: i for i, name in enumerate(candidates)}
    own = [val.captions[i] for i in val.first.tolist()]
    unknown = set(own) - index.keys()
    if unknown:
        raise UserError(f"evals.naming.names: {file} lacks {min(unknown)!r}, the first caption of a validation picture")
    labels = torch.tensor([index[name] for name in own])  # (N,) name of each picture
    texts = encode_texts(candidates)
    metrics = score(val.images, texts, labels, ks)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    shuffled = score(val.images, texts, labels[order], ks)
    return {**metrics, **{f"shuffled_{key}": value for key, value in shuffled.items()}}


def score(images: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Recalls in both directions; ``labels`` (N,) is the index of each picture's text."""
    pictures = torch.arange(len(images))
    present, query = labels.unique(return_inverse=True)  # names that have pictures
    return recalls(ranks(images, texts, pictures, labels), ranks(texts[present], images, query, pictures), ks)
