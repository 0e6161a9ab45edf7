"""Learn from a teacher's features besides the pairs, by the terms of CLIP-KD."""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipx import distributed
from clipx.loss.contrastive import Smoothing, clip_loss
from clipx.loss.relations import Same
from clipx.loss.tiles import tile_slices
from clipx.models.layers import linear

Weight = Annotated[float, Field(ge=0)]


class Teacher(NamedTuple):
    """A teacher's features of a batch, and the learnt matrices that take the student's to their width."""

    image: Tensor  # (N, F) unit vectors
    text: Tensor  # (M, F) unit vectors, K = M / N for each picture, in the order of the pictures
    scale: Tensor  # () inverse temperature
    projections: tuple[Tensor, ...] = ()  # (F, E) for pictures and for texts; none if F = E


def distill_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None = None,
    *,
    teacher: Teacher,
    same: Same = "keep",
    label_smoothing: Smoothing = 0.0,
    feature: Weight = 2000.0,
    interactive: Weight = 1.0,
    relational: Weight = 1.0,
) -> Tensor:
    """The contrastive loss of the pairs, plus what a teacher's features tell of them.

    ``feature`` times the mean squared difference between the student's features and the teacher's (FD), plus
    ``interactive`` times the contrastive loss of the student's pictures against the teacher's texts, and of its texts
    against the teacher's pictures (ICL), plus ``relational`` times the divergence of the student's distributions over
    the batch from the teacher's (CRD).  Where the widths differ, FD and ICL compare the student's features after a
    learnt projection.  Ranks, gradients and memory are as for ``clip_loss``.

    Args:
        image: (N, E) unit vectors, float32 or wider.
        text: (M, E) unit vectors, float32 or wider.
        scale: () inverse temperature, of the pairs and of ICL.
        ids: as ``clip_loss`` takes them.
        teacher: its features of the same samples.
        same: as ``clip_loss`` takes it.
        label_smoothing: as ``clip_loss`` takes it, for the pairs.
        feature: weight of FD.
        interactive: weight of ICL.
        relational: weight of CRD.

    Returns:
        () loss.

    Source: Yang et al. 2024 (arXiv 2307.12732), equations 3 to 8, with the weights of section 4.1; there, ICL has a
    temperature of its own in the published code.
    """
    pairs = clip_loss(image, text, scale, ids, same, label_smoothing)
    masked = None if same == "keep" else ids
    return pairs + teacher_terms(image, text, scale, masked, teacher, feature, interactive, relational)


def teacher_terms(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    teacher: Teacher,
    feature: float,
    interactive: float,
    relational: float,
) -> Tensor:
    """What ``distill_loss`` adds to the loss of the pairs; ``ids`` are None if equal rows are negatives of ICL."""
    projected = project(image, text, teacher.projections)
    own = scale.new_zeros(())
    if feature:
        own = own + feature * feature_term(*projected, teacher)
    if interactive:
        own = own + interactive * interactive_term(*projected, scale, ids, teacher)
    if relational:
        own = own + relational * relational_term(image, text, scale, teacher)
    everywhere = distributed.all_sum(own.detach().clone()) / distributed.world_size()
    return own + (everywhere - own.detach())  # the value of all ranks, the gradient of the own rows


def project(image: Tensor, text: Tensor, projections: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Project the student's features into the teacher's space: (N, E), (M, E) -> unit vectors (N, F), (M, F)."""
    if not projections:
        return image, text
    for_image, for_text = projections
    return F.normalize(linear(image, for_image), dim=-1), F.normalize(linear(text, for_text), dim=-1)


def feature_term(image: Tensor, text: Tensor, teacher: Teacher) -> Tensor:
    """Mean squared difference of this rank's features, (N, F) and (M, F), from the teacher's. -> ()."""
    return F.mse_loss(image, teacher.image) + F.mse_loss(text, teacher.text)


def interactive_term(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None, teacher: Teacher) -> Tensor:
    """Contrastive loss of this rank's features, (N, F) and (M, F), against all of the teacher's. -> ()."""
    captions = len(text) // len(image)
    of_texts = teacher.text.unflatten(0, (-1, captions)).mean(dim=1)  # (N, F), of each picture
    of_images = teacher.image.repeat_interleave(captions, dim=0)  # (M, F), of each text
    pairs = scale * ((image * of_texts).sum(dim=1).mean() + (text * of_images).sum(dim=1).mean())
    with_texts = with_images = None
    if ids is not None:
        own_images, own_texts = sides(ids, distributed.rank() * len(image), captions)
        all_images, all_texts = sides(distributed.gather(ids), 0, captions)
        with_texts, with_images = (own_images, all_texts), (own_texts, all_images)
    over_texts = log_sums(image, distributed.gather(teacher.text), scale, with_texts)
    over_images = log_sums(text, distributed.gather(teacher.image), scale, with_images)
    return (over_texts.mean() + over_images.mean() - pairs) / 2


class Side(NamedTuple):
    """What tells which pictures, or which texts, are the same: n of them."""

    pairs: Tensor  # (n,) number of the pair in the batch
    pictures: Tensor  # (n,) ids
    captions: Tensor  # (n, K) ids of a picture's captions, or (n, 1) of a text


def sides(ids: Tensor, first: int, captions: int) -> tuple[Side, Side]:
    """Pictures and texts of the rows of ``ids``, (N, 1 + K), the first of which is pair number ``first``."""
    images = Side(torch.arange(first, first + len(ids), device=ids.device), ids[:, 0], ids[:, 1:])
    pairs, pictures = (x.repeat_interleave(captions) for x in images[:2])
    return images, Side(pairs, pictures, images.captions.reshape(-1, 1))


def log_sums(rows: Tensor, columns: Tensor, scale: Tensor, likes: tuple[Side, Side] | None) -> Tensor:
    """logsumexp of the logits of each row, (n, F), (m, F), () -> (n,); ``likes`` excludes columns that are the same."""

    def tile(part: slice, scaled: Tensor) -> Tensor:
        logits = linear(scaled, columns)  # (t, m)
        if likes is not None:
            own, other = likes
            alike = own.pictures[part, None] == other.pictures  # (t, m)
            alike |= (own.captions[part, None] == other.captions).any(dim=2)
            logits = logits.masked_fill(alike & (own.pairs[part, None] != other.pairs), -torch.inf)
        return logits.logsumexp(dim=1)

    return torch.cat(
        [checkpoint(tile, part, scale * rows[part], use_reentrant=False) for part in tile_slices(rows, len(columns))]
    )


def relational_term(image: Tensor, text: Tensor, scale: Tensor, teacher: Teacher) -> Tensor:
    """Divergence of this rank's distributions over all texts, and over all pictures, from the teacher's. -> ()."""
    images, texts = distributed.gather_with_gradient(image), distributed.gather_with_gradient(text)
    over_texts = divergence(image, texts, scale, teacher.image, distributed.gather(teacher.text), teacher.scale)
    over_images = divergence(text, images, scale, teacher.text, distributed.gather(teacher.image), teacher.scale)
    return (over_texts + over_images) / 2


def divergence(
    rows: Tensor, columns: Tensor, scale: Tensor, target_rows: Tensor, target_columns: Tensor, target_scale: Tensor
) -> Tensor:
    """Mean divergence of a softmax of each row from that of the targets: (n, E), (m, E), (n, F), (m, F) -> ()."""

    def tile(part: Tensor, target: Tensor, columns: Tensor) -> Tensor:
        with torch.no_grad():
            expected = linear(target_scale * target, target_columns).log_softmax(dim=1)
        found = linear(scale * part, columns).log_softmax(dim=1)
        return F.kl_div(found, expected, reduction="sum", log_target=True)

    parts = tile_slices(rows, len(columns))
    sums = [checkpoint(tile, rows[part], target_rows[part], columns, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum() / len(rows)
