"""Figures of pictures and captions, for TensorBoard and for files."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipx.evals.features import Features

NUM_SHOWN = 8  # pictures in the retrieval figure
NUM_NEAREST = 5  # captions next to each
COLUMNS = 4  # of a grid of pictures
MATRIX_SIZE = 24  # pictures in the similarity matrix
MAX_CAPTION = 44  # characters of a caption in a figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure without warnings about glyphs missing from the font."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(path)


def figure_name(tag: str) -> str:
    """The file name of an evaluation's figure: ``val/zero_shot@x/mistakes`` -> ``zero_shot@x-mistakes.png``."""
    return f"{tag.removeprefix('val/').replace('/', '-')}.png"


def picture_grid(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Any:
    """A figure of pictures in rows, each with a title."""
    from matplotlib.figure import Figure

    rows = -(-len(pictures) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 3.4 * rows + 0.4), layout="constrained")
    for index, (picture, title) in enumerate(zip(pictures, titles, strict=True), 1):
        axes = figure.add_subplot(rows, COLUMNS, index)
        axes.imshow(picture)
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    return figure


def evenly_spaced(count: int, most: int) -> Tensor:
    """At most ``most`` of ``range(count)``, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def nearest_captions(val: Features) -> Any:
    """A figure of held-out pictures, each with its nearest captions; its own are green."""
    from matplotlib.figure import Figure

    chosen = evenly_spaced(len(val.shown), NUM_SHOWN).tolist()
    figure = Figure(figsize=(12, 1.35 * len(chosen)), layout="tight")
    similarity = val.images[chosen] @ val.texts.T  # (8, M)
    for row, picture in enumerate(chosen):
        left, right = figure.add_subplot(len(chosen), 2, 2 * row + 1), figure.add_subplot(len(chosen), 2, 2 * row + 2)
        left.imshow(val.shown[picture].permute(1, 2, 0).numpy())
        left.axis("off")
        own = {val.captions[index] for index in (val.owners == picture).nonzero()[:, 0].tolist()}
        left.set_title(shorten(val.captions[int(val.first[picture])]), fontsize=8)
        right.axis("off")
        for line, (caption, cosine) in enumerate(nearest(val.captions, similarity[row])):
            mark, colour = ("✓", "green") if caption in own else ("  ", "black")
            right.text(
                0,
                0.9 - 0.2 * line,
                f"{cosine:.2f} {mark} {shorten(caption)}",
                color=colour,
                fontsize=9,
                family="monospace",
                va="center",
            )
    return figure


def nearest(captions: Sequence[str], similarity: Tensor) -> list[tuple[str, float]]:
    """The most similar captions, each once though several pictures may have it, with their similarity (M,)."""
    best: dict[str, float] = {}
    for index in similarity.argsort(descending=True).tolist():
        best.setdefault(captions[index], similarity[index].item())
        if len(best) == NUM_NEAREST:
            break
    return list(best.items())


def similarity_matrix(val: Features) -> Any:
    """A figure of the cosines between held-out pictures (rows) and their first captions (columns)."""
    from matplotlib.figure import Figure

    chosen = evenly_spaced(len(val.images), MATRIX_SIZE)
    first = val.first[chosen]
    cosine = (val.images[chosen] @ val.texts[first].T).numpy()  # (24, 24)
    names = [shorten(val.captions[index]) for index in first.tolist()]
    figure = Figure(figsize=(9, 8), layout="tight")
    axes = figure.add_subplot()
    figure.colorbar(axes.imshow(cosine, cmap="viridis"), label="cosine")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylabel("picture of")
    axes.set_xlabel("caption")
    return figure


def shorten(caption: str) -> str:
    """Cut a caption to fit a figure, and escape ``$``, which starts a formula in matplotlib."""
    return (caption if len(caption) <= MAX_CAPTION else caption[: MAX_CAPTION - 1] + "…").replace("$", r"\$")
