"""Naming: does a held-out picture find its thing among all things, and a name one of its pictures?"""

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
    """Each picture among all names, and each name that has pictures among all pictures.

    Args:
        val: the encoded validation set; the first caption of a picture is its name.
        encode_texts: captions -> (M, E) unit vectors.
        names: file of all candidates, one a line, those of the validation set among them; None: the embedded things.
        ks: recall at each of these.

    Returns:
        i2t_r1, ..., t2i_r10 and medians; and as ``shuffled_...`` what the same features give when the pictures
        are dealt out to the names at random: chance.
    """
    file = Path(names).expanduser() if names else THINGS
    if not file.is_file():
        raise UserError(f"evals.naming.names={names}: there is no such file; it holds all names, one a line")
    candidates = read_lines(file, "evals.naming.names")
    number = {name: place for place, name in enumerate(candidates)}
    own = [val.captions[place] for place in val.first.tolist()]
    unknown = set(own) - number.keys()
    if unknown:
        raise UserError(f"evals.naming.names: {file} lacks {min(unknown)!r}, the first caption of a validation picture")
    thing = torch.tensor([number[name] for name in own])        # (N,) name of each picture
    texts = encode_texts(candidates)
    numbers = score(val.images, texts, thing, ks)
    deal = torch.randperm(len(thing), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    shuffled = score(val.images, texts, thing[deal], ks)
    return {**numbers, **{f"shuffled_{key}": value for key, value in shuffled.items()}}


def score(images: torch.Tensor, texts: torch.Tensor, thing: torch.Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Both directions; ``thing`` (N,) is the right text of each picture."""
    pictures = torch.arange(len(images))
    shown, query = thing.unique(return_inverse=True)        # the things that have pictures
    return recalls(ranks(images, texts, pictures, thing), ranks(texts[shown], images, query, pictures), ks)
