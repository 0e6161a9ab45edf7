"""How the rows of a batch relate: which are positives of each other, and which are left out."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipx import distributed
from clipx.loss.tiles import tile_slices

Same = Literal["keep", "mask", "positive"]


@dataclass(frozen=True)
class Relations:
    """Which texts of the whole batch are positives of this rank's images, and which are masked.

    Here B is the number of images on all ranks, b that of this rank, t that of a tile.
    """

    captions: int  # K of each image
    first: int  # number of the rank's first image in the batch
    ids: Tensor | None  # (b, 1 + K) of this rank; None if rows with the same picture or caption do not matter
    all_ids: Tensor | None  # (B, 1 + K)
    same: Same

    @classmethod
    def of(cls, image: Tensor, text: Tensor, ids: Tensor | None, same: Same) -> "Relations":
        all_ids = None if ids is None else distributed.gather(ids)
        return cls(len(text) // len(image), distributed.rank() * len(image), ids, all_ids, same)

    def own(self, logits: Tensor, part: slice) -> Tensor:
        """View of the entries of (B K, t) that belong to the images' own texts, (K, t)."""
        return logits.unflatten(0, (-1, self.captions)).diagonal(-self.first - part.start, dim1=0, dim2=2)

    def alike(self, part: slice) -> Tensor | None:
        """Whether text and image have the same picture or caption, (B K, t) bool; None if that does not matter."""
        if self.ids is None or self.all_ids is None:
            return None
        pictures, captions = self.all_ids[:, :1].expand(-1, self.captions).flatten(), self.all_ids[:, 1:].flatten()
        alike = pictures[:, None] == self.ids[part, 0]
        for own in self.ids[part, 1:].unbind(1):
            alike |= captions[:, None] == own
        return alike

    def masked(self, logits: Tensor, part: slice, value: float = -torch.inf) -> Tensor:
        """Set the logits (B K, t) of masked texts to ``value``, in place."""
        hidden = self.hidden(part)
        return logits if hidden is None else logits.masked_fill_(hidden, value)

    def hidden(self, part: slice) -> Tensor | None:
        """The texts that are masked, (B K, t) bool; None if there are none."""
        hidden = self.alike(part) if self.same == "mask" else None
        if hidden is not None:
            self.own(hidden, part).fill_(False)
        return hidden

    def positives(self, logits: Tensor, part: slice) -> Tensor:
        """The positives among the texts, (B K, t) bool, for logits of that shape."""
        alike = self.alike(part) if self.same == "positive" else None
        if alike is None:
            alike = torch.zeros_like(logits, dtype=torch.bool)
        self.own(alike, part).fill_(True)
        return alike


@dataclass(frozen=True)
class SoftTargets:
    """Targets of a softmax other than the own texts alone.

    Positives share ``1 - smoothing`` evenly, and all that is not masked shares ``smoothing``.
    """

    relations: Relations
    smoothing: float
    of_image: Tensor  # (2, b) numbers of positives, and of texts that are not masked, of each image
    of_text: Tensor  # (2, B K) the same of images, on all ranks

    @classmethod
    def count(cls, relations: Relations, smoothing: float, image: Tensor, texts: Tensor) -> "SoftTargets":
        of_image, of_text = image.new_zeros(2, len(image)), image.new_zeros(2, len(texts))
        for part in tile_slices(image, len(texts)):
            ones = image.new_ones(len(texts), part.stop - part.start)
            chosen = torch.stack([relations.positives(ones, part).to(ones.dtype), relations.masked(ones, part, 0)])
            of_image[:, part] = chosen.sum(dim=1)
            of_text += chosen.sum(dim=2)
        return cls(relations, smoothing, of_image, distributed.all_sum(of_text))

    def __call__(self, logits: Tensor, part: slice) -> Tensor:
        """K times the targets over texts plus the targets over images, (B K, t), for unmasked logits of that shape."""
        positives = self.relations.positives(logits, part)
        by_positives, by_all = (
            (self.relations.captions * share / of_image[part]) + (share / of_text)[:, None]
            for share, of_image, of_text in zip(
                (1 - self.smoothing, self.smoothing), self.of_image, self.of_text, strict=True
            )
        )
        return by_positives.mul_(positives).add_(self.relations.masked(by_all, part, 0))
