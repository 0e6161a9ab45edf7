"""Retrieval: does a picture find its captions, and a caption its picture, among all of the validation set?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipx.evals.features import EncodeTexts, Features

TILE = 1024         # queries ranked at once; memory is TILE x items


def ranks(queries: Tensor, items: Tensor, query: Tensor, item: Tensor) -> Tensor:
    """The rank of each query's best right item among all items.

    A right item competes with the wrong ones only, and every tie counts against it: 1 is first.

    Args:
        queries: (Q, E) unit vectors.
        items: (K, E) unit vectors.
        query: (P,) and
        item: (P,) the pairs that are right; every query has one.

    Returns:
        (Q,) int64.
    """
    found = []
    for start in range(0, len(queries), TILE):
        similarity = queries[start : start + TILE] @ items.T                        # (T, K)
        inside = (query >= start) & (query < start + len(similarity))
        right = torch.zeros_like(similarity, dtype=torch.bool)
        right[query[inside] - start, item[inside]] = True
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)  # (T, 1)
        found.append(1 + ((similarity >= best) & ~right).sum(dim=1))
    return torch.cat(found)


def recalls(i2t: Tensor, t2i: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Recall at each k both ways (``i2t_r1``), their mean (``mean_recall``), and ``i2t_median_rank``."""
    numbers = {}
    for way, rank in (("i2t", i2t), ("t2i", t2i)):
        numbers.update({f"{way}_r{k}": (rank <= k).double().mean().item() for k in ks})
        numbers[f"{way}_median_rank"] = rank.double().median().item()
    numbers["mean_recall"] = sum(numbers[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in ks) / (2 * len(ks))
    return numbers


def retrieval(val: Features, encode_texts: EncodeTexts, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall over the whole validation set; a picture with several captions is found by any of them.

    Args:
        val: the encoded validation set.
        encode_texts: not used here.
        ks: recall at each of these.

    Returns:
        i2t_r1, ..., t2i_r10, ``mean_recall`` over all k both ways, and median ranks.
    """
    captions = torch.arange(len(val.texts))
    i2t = ranks(val.images, val.texts, val.owners, captions)
    t2i = ranks(val.texts, val.images, captions, val.owners)
    return recalls(i2t, t2i, ks)
