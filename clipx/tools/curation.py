"""Choose training pictures by the features of a model: near-duplicates, evaluation sets, scores."""

import logging
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from clipx.data.catalogue import open_catalogue
from clipx.data.files import Files, find_pictures
from clipx.data.loader import split_range
from clipx.data.prepare.choice import Choice
from clipx.data.prepare.reshard import Reason
from clipx.data.sample import Source
from clipx.data.shards import Shards
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import INDEX_DIR, expand_home
from clipx.devices import Amp, autocast_dtype, limit_threads, select_amp, select_device
from clipx.errors import UserError
from clipx.evals.encoder import EvalEncoder, evaluating, join
from clipx.evals.features import Skip
from clipx.tools.benchmark import own_shards
from clipx.tools.embeddings import claim, describe, write_missing
from clipx.tools.index import Index
from clipx.weights.load import Act, load

logger = logging.getLogger("clipx")

TILE = 4096  # pictures of each side that are compared at once
PART = 10_000  # samples whose features are written at once


class Near(NamedTuple):
    """What a picture is too similar to."""

    other: int
    cosine: float


class Embedded(NamedTuple):
    """N samples that could be read."""

    samples: list[int]  # N, ascending
    images: Tensor  # (N, E) fp16 unit vectors
    scores: Tensor  # (N,) cosine of each picture and its first caption


class Chosen(NamedTuple):
    """The decision about all samples that could be read."""

    dropped: dict[int, Reason]  # by sample
    scores: Tensor  # (N,)

    def percentiles(self) -> dict[str, float]:
        """Quantiles of the scores, by name."""
        names = {"minimum": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "maximum": 1.0}
        found = np.quantile(self.scores.numpy(), list(names.values())).tolist() if len(self.scores) else []
        return {name: round(value, 4) for name, value in zip(names, found, strict=False)}


class PictureShards(Shards):
    """Tars of pictures, with or without captions."""

    def captions_among(self, *_: object) -> list[str]:
        return [""]


def choose(
    choice: Choice, source: Source, folder: Path, workers: int, device: str, amp: Amp | Literal["auto"],
    trust: list[str], act: Act | None,
) -> Chosen:  # fmt: skip
    """Apply the rules to the training samples of a source.

    Args:
        choice: the rules; ``by`` is set.
        source: the samples.
        folder: takes the features, part by part; finished parts are kept, so that the same command resumes.
        workers: processes that read.
        device: name of the device.
        amp: precision.
        trust: packages besides clipx that the model's config may name.
        act: activation of weights that do not record it.

    Raises:
        UserError: the weights or a set of ``exclude`` are wrong, or ``folder`` cannot be written.
    """
    assert choice.by is not None
    limit_threads()
    on = select_device(device)
    model, _, tokenizer = load(choice.by, on, trust, act)
    encoder = EvalEncoder(model, tokenizer, workers, autocast_dtype(select_amp(amp, on)))
    sets = {name: open_pictures(name) for name in choice.exclude}  # refused before the long part
    index = Index(folder, describe(choice.by, model, source, encoder.amp, PART, "train"))
    folder.mkdir(parents=True, exist_ok=True)
    claim(index)
    write_missing(index, encoder, source)
    found = read_embedded(index, source)
    reasons: dict[int, Reason] = {}
    for name, pictures in sets.items():
        others, samples = encode_pictures(encoder, pictures)
        for row, near in overlaps(found.images, others, choice.exclude_similarity, on).items():
            place = f"{name}, {pictures.locate(samples[near.other])}"
            reasons[row] = Reason(f"stands in an evaluation set: cosine {near.cosine:.3f} to {place}")
    apply_rules(choice, found, reasons, on)
    dropped = {
        found.samples[row]: Reason(text, None if like is None else found.samples[like])
        for row, (text, like) in reasons.items()
    }
    return Chosen(dropped, found.scores)


def apply_rules(choice: Choice, found: Embedded, reasons: dict[int, Reason], device: torch.device) -> None:
    """Add a reason for each row that ``max_similarity``, ``min_score`` or ``keep`` leaves out of what is left."""

    def left() -> list[int]:
        return [row for row in range(len(found.samples)) if row not in reasons]

    if choice.max_similarity is not None:
        rows = left()
        for row, (other, cosine) in near_duplicates(found.images[rows], choice.max_similarity, device).items():
            reasons[rows[row]] = Reason(f"is a near-duplicate: cosine {cosine:.3f}", rows[other])
    if choice.min_score is not None:
        for row in left():
            if found.scores[row] < choice.min_score:
                reasons[row] = Reason(f"has a low score: {found.scores[row]:.3f}")
    if choice.keep is not None:
        rows = left()
        best_first = found.scores[rows].argsort(descending=True, stable=True).tolist()
        for place in best_first[round(choice.keep * len(rows)) :]:
            reasons[rows[place]] = Reason(f"is not among the best: score {found.scores[rows[place]]:.3f}")


def read_embedded(index: Index, source: Source) -> Embedded:
    """Read the features of a finished index."""
    samples: list[int] = []
    images, scores = [torch.empty(0, 0)], [torch.empty(0)]
    for number, part in enumerate(index.parts):
        record = index.record(number)
        assert record is not None
        skipped = {place for place, _ in record["skipped"]}
        samples += [sample for sample in part if not skipped or source.locate(sample) not in skipped]
        image, text = (
            torch.from_numpy(open_memmap(index.path(folder, number), "c")) for folder in ("img_emb", "text_emb")
        )
        images.append(image)
        scores.append((image.float() * text.float()).sum(dim=1))
    return Embedded(samples, torch.cat(images[1:]), torch.cat(scores))


def open_pictures(name: str) -> Source:
    """Open the pictures of an evaluation set: a directory of shards, or of pictures at any depth.

    Raises:
        UserError: there are none.
    """
    path = Path(name).expanduser()
    if tars := own_shards(path):
        return PictureShards(open_catalogue(tars, expand_home(INDEX_DIR)), None)
    try:
        return Files(find_pictures(name))
    except DataError:
        raise UserError(f"exclude={name} holds neither shards (*.tar, test/*.tar) nor pictures") from None


def encode_pictures(encoder: EvalEncoder, source: Source) -> tuple[Tensor, list[int]]:
    """Encode all pictures: (M, E) unit vectors, and the sample of each."""
    skipped: list[Skip] = []
    images, samples = [], []
    with evaluating(encoder.model):
        for chunk, image in encoder.encode_images(source, skipped):
            images.append(image)
            samples += chunk.samples.tolist()
    if skipped:
        logger.warning("exclude: skipped %d pictures; for example %s: %s", len(skipped), *skipped[0])
    return join(images, encoder.model.visual.embed), samples


def overlaps(images: Tensor, others: Tensor, limit: float, device: torch.device) -> dict[int, Near]:
    """Find the pictures that are similar to one of another set.

    Args:
        images: (N, E) unit vectors.
        others: (M, E) unit vectors.
        limit: least cosine.
        device: of the computation.

    Returns:
        The most similar other picture, by row.
    """
    found = {}
    for rows in split_range(range(len(images)), TILE):
        cosine, other = most_similar(images[rows.start : rows.stop], others, device)
        found.update(
            {rows[row]: Near(int(other[row]), float(cosine[row])) for row in (cosine >= limit).nonzero()[:, 0].tolist()}
        )
    return found


def near_duplicates(images: Tensor, limit: float, device: torch.device) -> dict[int, Near]:
    """Find the pictures that are similar to an earlier one which is not itself left out for this reason.

    Args:
        images: (N, E) unit vectors.
        limit: least cosine.
        device: of the computation.

    Returns:
        The earlier picture, by row.

    Source: SemDeDup, Abbas et al. 2023 (arXiv 2303.09540), over all pairs in place of clusters.
    """
    found: dict[int, Near] = {}
    kept = torch.ones(len(images), dtype=torch.bool)
    for rows in split_range(range(len(images)), TILE):
        block, before = images[rows.start : rows.stop], kept[: rows.start].nonzero()[:, 0]
        cosine, other = most_similar(block, images[before], device)
        own = (block.to(device).float() @ block.to(device).float().T).tril(-1).cpu()  # (T, T) with earlier ones only
        for row in ((cosine >= limit) | (own >= limit).any(dim=1)).nonzero()[:, 0].tolist():
            value, place = torch.where(kept[rows.start : rows.stop], own[row], -1).max(dim=0)
            near = Near(rows[int(place)], float(value))
            if cosine[row] > value:
                near = Near(int(before[other[row]]), float(cosine[row]))
            if near.cosine >= limit:  # else it is like one of this tile that is itself left out
                kept[rows[row]] = False
                found[rows[row]] = near
    return found


def most_similar(block: Tensor, others: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The largest cosine of each row with a row of others, -1 if there are none, and which row that is."""
    queries = block.to(device).float()
    best = torch.full((len(block),), -1.0)
    which = torch.zeros(len(block), dtype=torch.int64)
    for rows in split_range(range(len(others)), TILE):
        cosine, place = (queries @ others[rows.start : rows.stop].to(device).float().T).cpu().max(dim=1)
        better = cosine > best
        best[better], which[better] = cosine[better], place[better] + rows.start
    return best, which
