"""What a worker makes for a teacher: the same crops and captions as the student's, as the teacher takes them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipx.data.draw_captions import Drawn
from clipx.data.features import FeatureFile, Stored
from clipx.data.images import TrainCrop
from clipx.data.pixels import shared_pixels
from clipx.data.sample import NUM_PROBED, BadSample, Source, captions_of
from clipx.tokenizer import Tokenizer, Tokens


class TeacherChunk(NamedTuple):
    """The N pictures and M captions of a chunk, as a teacher takes them: those whose features are not stored."""

    images: Tensor  # (n, 3, S, S) uint8, channels last in memory
    tokens: Tokens  # of m captions
    rows: dict[str, Tensor]  # (N,) and (M,) int64, row in the files of features, by tower
    stored: dict[str, Stored]  # what these files hold, by tower; nothing without files


class Lesson(NamedTuple):
    """A picture and its captions as a teacher takes them."""

    image: np.ndarray | None  # (E,) fp16, if its feature is stored
    pixels: Tensor | None  # (S, S, 3) uint8, if not
    texts: list[np.ndarray | None]  # (E,) fp16 of each caption, if it is stored
    captions: list[str]  # those whose features are not
    image_row: int
    text_rows: list[int]  # of each caption


def most_captions(source: Source) -> int:
    """The largest number of captions among a few samples, spread over a source."""
    count, most = int(sum(source.sizes)), 1
    for sample in range(0, count, max(1, count // NUM_PROBED)):
        with suppress(BadSample):
            most = max(most, len(captions_of(source, sample)))
    return most


@dataclass(frozen=True)
class TeacherReader:
    """Collects pictures and captions for a teacher, unless its features of them are stored.

    The row of a picture is that of its view; the row of caption c of sample s is c times the number of samples, plus s,
    so that captions can be drawn anew in each epoch.  The file of texts may end before the last captions of samples
    that have many: their features are computed each time, and so are those of texts that are no caption as a whole,
    whose rows are below 0.

    Args:
        crop: decodes and crops the pictures.
        tokenizer: for the captions.
        samples: number of them, of all sources.
        files: the teacher's features, by tower; none if they are not stored.
    """

    crop: TrainCrop
    tokenizer: Tokenizer
    samples: int
    files: Mapping[str, FeatureFile]

    def find(self, tower: str, row: int) -> np.ndarray | None:
        """Return a stored feature, (E,) fp16."""
        file = self.files.get(tower)
        return file.read(row) if file and 0 <= row < file.rows else None

    def empty(self) -> Tensor:
        """Room for a picture, (S, S, 3) uint8."""
        return torch.empty(self.crop.size, self.crop.size, 3, dtype=torch.uint8)

    def prepare(
        self,
        row: int,
        image: np.ndarray | None,
        pixels: Tensor | None,
        sample: int,
        captions: Sequence[Drawn],
    ) -> Lesson:
        """Collect what is needed of one sample.

        Args:
            row: of the picture's view.
            image: its stored feature.
            pixels: of the picture, if its feature is not stored.
            sample: its id.
            captions: those drawn.
        """
        rows = [-1 - sample if one.number is None else one.number * self.samples + sample for one in captions]
        texts = [self.find("text", row) for row in rows]
        unknown = [one.text for one, text in zip(captions, texts, strict=True) if text is None]
        return Lesson(image, pixels, texts, unknown, row, rows)

    def collate(self, lessons: Sequence[Lesson]) -> TeacherChunk:
        """Join samples to a chunk."""
        pixels = [lesson.pixels for lesson in lessons if lesson.pixels is not None]
        images = shared_pixels(len(pixels), self.crop.size)
        if pixels:
            torch.stack(pixels, out=images)
        texts = [text for lesson in lessons for text in lesson.texts]
        found = {"image": [lesson.image for lesson in lessons], "text": texts}
        rows = {
            "image": torch.tensor([lesson.image_row for lesson in lessons], dtype=torch.int64),
            "text": torch.tensor([row for lesson in lessons for row in lesson.text_rows], dtype=torch.int64),
        }
        return TeacherChunk(
            images.permute(0, 3, 1, 2),
            self.tokenizer.flat([caption for lesson in lessons for caption in lesson.captions]),
            rows,
            {tower: Stored.of(found[tower], file.width) for tower, file in self.files.items()},
        )
