"""Retrieval: does a picture find its captions, and a caption its picture, among all of the validation set?"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from clipx.evals.features import EncodeTexts, Features

TILE = 1024         # queries ranked at once, and
CELLS = 1 << 25     # similarities at most: 0.3 GB, however many items there are
SEED = 0            # of the pictures that are drawn again
OUTSIDE = 0.025     # share of what was drawn that an interval leaves out at either end


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
    found, tile = [], max(1, min(TILE, CELLS // len(items)))
    for start in range(0, len(queries), tile):
        similarity = queries[start : start + tile] @ items.T                        # (T, K)
        inside = (query >= start) & (query < start + len(similarity))
        right = torch.zeros_like(similarity, dtype=torch.bool)
        right[query[inside] - start, item[inside]] = True
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)  # (T, 1)
        found.append(1 + (~(similarity < best) & ~right).sum(dim=1))           # NaN is a tie, too
    return torch.cat(found)


def recalls(i2t: Tensor, t2i: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Both ways, from the ranks: ``i2t_r1``, ``i2t_median_rank``, ``i2t_mean_rank``, ``i2t_mrr`` (mean of 1 / rank).

    ``mean_recall`` is the mean of the recalls at all k both ways.
    """
    numbers = {}
    for way, rank in (("i2t", i2t), ("t2i", t2i)):
        numbers.update({f"{way}_{name}": values.mean().item() for name, values in scored(rank, ks).items()})
        numbers[f"{way}_median_rank"] = float(np.median(rank.numpy()))
    numbers["mean_recall"] = sum(numbers[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in ks) / (2 * len(ks))
    return numbers


def scored(rank: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """By name, what each query is worth, (Q,): what is told is the mean of it."""
    hits = {f"r{k}": (rank <= k).double() for k in ks}
    return {**hits, "mean_rank": rank.double(), "mrr": 1 / rank.double()}


def intervals(i2t: Tensor, t2i: Tensor, owners: Tensor, ks: Sequence[int], resamples: int) -> dict[str, float]:
    """95 % bootstrap intervals of all that are means: ``i2t_r1_low``, ``i2t_r1_high``, ...

    Pictures are drawn again with replacement, each with its captions, since captions of one picture are not
    independent; what they are searched among stays whole.

    Args:
        i2t: (N,) the rank of each picture,
        t2i: (M,) and of each caption.
        owners: (M,) the picture of each caption.
        ks: as in ``retrieval``.
        resamples: how often all pictures are drawn.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile intervals).
    """
    pictures, generator = len(i2t), torch.Generator().manual_seed(SEED)
    own = torch.arange(pictures)
    sums, names = [], []
    for way, rank, owner in (("i2t", i2t, own), ("t2i", t2i, owners)):
        for name, values in {**scored(rank, ks), "count": torch.ones(len(rank)).double()}.items():
            sums.append(torch.zeros(pictures).double().index_add(0, owner, values))
            names.append(f"{way}_{name}")
    table = torch.stack(sums, dim=1)                                                        # (N, columns)
    drawn = torch.stack([draw(pictures, generator) @ table for _ in range(resamples)])      # (resamples, columns)
    means = {name: drawn[:, place] / drawn[:, names.index(f"{name[:3]}_count")] for place, name in enumerate(names)}
    means["mean_recall"] = torch.stack([means[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in ks]).mean(dim=0)
    ends = torch.tensor([OUTSIDE, 1 - OUTSIDE]).double()
    found = {name: values.quantile(ends).tolist() for name, values in means.items() if not name.endswith("_count")}
    return {f"{name}_{end}": both[place] for name, both in found.items() for place, end in enumerate(("low", "high"))}


def draw(count: int, generator: torch.Generator) -> Tensor:
    """(count,) how often each is among as many drawn with replacement."""
    return torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count).double()


def retrieval(
    val: Features, encode_texts: EncodeTexts, ks: Sequence[int] = (1, 5, 10), bootstrap: PositiveInt | None = None
) -> dict[str, float]:
    """Recall over the whole validation set, as the literature counts it on COCO's 5,000 and Flickr30k's 1,000 pictures.

    Text retrieval (``i2t``): each picture is one query among all captions, and found at k if any of its own (five, in
    these two) is among the k nearest.  Image retrieval (``t2i``): each caption is one query, 25,000 of COCO, among
    all pictures.  COCO's 5,000 are val2014's part of Karpathy's split (``prepare source.karpathy=...``), not all of
    val2017, though both have 5,000.

    Args:
        val: the encoded validation set.
        encode_texts: not used here.
        ks: recall at each of these.
        bootstrap: how often pictures are drawn again for 95 % intervals; None: none are given.

    Returns:
        i2t_r1, ..., t2i_r10, their mean ``mean_recall``, median and mean ranks, mean reciprocal ranks, intervals.

    Source: Karpathy and Fei-Fei 2015 (the splits and the counting); Radford et al. 2021, table 13.
    """
    captions = torch.arange(len(val.texts))
    i2t = ranks(val.images, val.texts, val.owners, captions)
    t2i = ranks(val.texts, val.images, captions, val.owners)
    numbers = recalls(i2t, t2i, ks)
    return {**numbers, **intervals(i2t, t2i, val.owners, ks, bootstrap)} if bootstrap else numbers
