"""Retrieval: recall of captions by picture and of pictures by caption, over a whole validation set."""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from clipx.evals.features import EncodeTexts, Features

TILE = 1024  # queries ranked at once
CELLS = 1 << 25  # most similarities at once: 0.3 GB, for any number of items
SEED = 0  # of the bootstrap
TAIL = 0.025  # share of the resamples outside an interval, at either end


def ranks(queries: Tensor, items: Tensor, query: Tensor, item: Tensor) -> Tensor:
    """Rank of each query's best correct item among all items; 1 is first.

    A correct item competes with incorrect ones only, and every tie counts against it.

    Args:
        queries: (Q, E) unit vectors.
        items: (K, E) unit vectors.
        query: (P,) and
        item: (P,) indices of the correct pairs; every query has at least one.

    Returns:
        (Q,) int64.
    """
    rows, tile = [], max(1, min(TILE, CELLS // len(items)))
    for start in range(0, len(queries), tile):
        similarity = queries[start : start + tile] @ items.T  # (T, K)
        inside = (query >= start) & (query < start + len(similarity))
        correct = torch.zeros_like(similarity, dtype=torch.bool)
        correct[query[inside] - start, item[inside]] = True
        best = similarity.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)  # (T, 1)
        rows.append(1 + (~(similarity < best) & ~correct).sum(dim=1))  # NaN counts as a tie
    return torch.cat(rows)


def recalls(i2t: Tensor, t2i: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Metrics in both directions: ``i2t_r1``, ``i2t_median_rank``, ``i2t_mean_rank``, ``i2t_mrr`` (mean of 1 / rank).

    ``mean_recall`` is the mean of the recalls at all k in both directions.
    """
    metrics = {}
    for way, rank in (("i2t", i2t), ("t2i", t2i)):
        metrics.update({f"{way}_{name}": values.mean().item() for name, values in per_query(rank, ks).items()})
        metrics[f"{way}_median_rank"] = float(np.median(rank.numpy()))
    metrics["mean_recall"] = sum(metrics[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in ks) / (2 * len(ks))
    return metrics


def per_query(rank: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Values of each query, (Q,), by name; a metric is their mean."""
    hits = {f"r{k}": (rank <= k).double() for k in ks}
    return {**hits, "mean_rank": rank.double(), "mrr": 1 / rank.double()}


def intervals(i2t: Tensor, t2i: Tensor, owners: Tensor, ks: Sequence[int], resamples: int) -> dict[str, float]:
    """95 % bootstrap intervals of the metrics that are means: ``i2t_r1_low``, ``i2t_r1_high``, ...

    Resamples pictures with their captions, as captions of one picture are not independent.  The candidates stay the
    whole set.

    Args:
        i2t: (N,) rank of each picture.
        t2i: (M,) rank of each caption.
        owners: (M,) index of each caption's picture.
        ks: as in ``retrieval``.
        resamples: number of resamples.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile intervals).
    """
    pictures, generator = len(i2t), torch.Generator().manual_seed(SEED)
    own = torch.arange(pictures)
    columns, names = [], []
    for way, rank, owner in (("i2t", i2t, own), ("t2i", t2i, owners)):
        for name, values in {**per_query(rank, ks), "count": torch.ones(len(rank)).double()}.items():
            columns.append(torch.zeros(pictures).double().index_add(0, owner, values))
            names.append(f"{way}_{name}")
    table = torch.stack(columns, dim=1)  # (N, columns)
    sums = torch.stack([draw(pictures, generator) @ table for _ in range(resamples)])  # (resamples, columns)
    means = {name: sums[:, i] / sums[:, names.index(f"{name[:3]}_count")] for i, name in enumerate(names)}
    means["mean_recall"] = torch.stack([means[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in ks]).mean(dim=0)
    ends = torch.tensor([TAIL, 1 - TAIL]).double()
    bounds = {name: values.quantile(ends).tolist() for name, values in means.items() if not name.endswith("_count")}
    return {f"{name}_{end}": both[i] for name, both in bounds.items() for i, end in enumerate(("low", "high"))}


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` of ``range(count)`` with replacement -> (count,) how often each was drawn."""
    return torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count).double()


def retrieval(
    val: Features, encode_texts: EncodeTexts, ks: Sequence[int] = (1, 5, 10), bootstrap: PositiveInt | None = None
) -> dict[str, float]:
    """Recall over the whole validation set, counted as in the literature on COCO (5,000 pictures) and Flickr30k.

    Text retrieval (``i2t``): each picture is a query among all captions, correct at k if any of its own (five in both
    sets) is among the k nearest.  Image retrieval (``t2i``): each caption is a query among all pictures, 25,000 for
    COCO.  COCO's 5,000 are Karpathy's test split of val2014 (``prepare source.karpathy=...``), not val2017, which has
    5,000, too.

    Args:
        val: the encoded validation set.
        encode_texts: not used.
        ks: cut-offs of the recall.
        bootstrap: number of resamples for 95 % intervals; None: no intervals.

    Returns:
        i2t_r1, ..., t2i_r10, their mean ``mean_recall``, median and mean ranks, mean reciprocal ranks, intervals.

    Source: Karpathy and Fei-Fei 2015 (the splits and the counting); Radford et al. 2021, table 13.
    """
    captions = torch.arange(len(val.texts))
    i2t = ranks(val.images, val.texts, val.owners, captions)
    t2i = ranks(val.texts, val.images, captions, val.owners)
    metrics = recalls(i2t, t2i, ks)
    return {**metrics, **intervals(i2t, t2i, val.owners, ks, bootstrap)} if bootstrap else metrics
