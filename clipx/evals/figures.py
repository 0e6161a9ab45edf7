"""Figures of pictures and captions, for TensorBoard and for files."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipx.evals.features import Features

SHOWN = 8           # pictures in the retrieval figure
NEAREST = 5         # captions beside each
MATRIX = 24         # pictures in the similarity matrix
CELL = 44           # characters of a caption that a figure has room for


def save_figure(directory: Path, tag: str, figure: Any, name: str = "") -> None:
    """Write a figure as a PNG that is called after its tag (without ``val/``)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # of letters that the font has not
        figure.savefig(directory / f"{name}{tag.removeprefix('val/').replace('/', '-')}.png")


def page(pictures: Sequence[Image.Image], titles: Sequence[str], columns: int = 4) -> Any:
    """A figure: pictures in rows, each below its title."""
    from matplotlib.figure import Figure

    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(3 * columns, 3.4 * rows + 0.4), layout="constrained")
    for place, (picture, title) in enumerate(zip(pictures, titles, strict=True), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(picture)
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    return figure


def spread(count: int, wanted: int) -> Tensor:
    """At most ``wanted`` of ``range(count)``, evenly spread."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()


def nearest_captions(val: Features) -> Any:
    """A figure: some held-out pictures, each with the captions nearest to it, its own in green."""
    from matplotlib.figure import Figure

    chosen = spread(len(val.shown), SHOWN).tolist()
    figure = Figure(figsize=(12, 1.35 * len(chosen)), layout="tight")
    similarity = val.images[chosen] @ val.texts.T                       # (8, M)
    for row, picture in enumerate(chosen):
        left, right = figure.add_subplot(len(chosen), 2, 2 * row + 1), figure.add_subplot(len(chosen), 2, 2 * row + 2)
        left.imshow(val.shown[picture].permute(1, 2, 0).numpy())
        left.axis("off")
        own = val.owners == picture
        left.set_title(short(val.captions[int(val.first[picture])]), fontsize=8)
        right.axis("off")
        for line, caption in enumerate(similarity[row].topk(min(NEAREST, len(val.texts))).indices.tolist()):
            mark, colour = ("✓", "green") if own[caption] else ("  ", "black")
            right.text(0, 0.9 - 0.2 * line, f"{similarity[row, caption]:.2f} {mark} {short(val.captions[caption])}",
                       color=colour, fontsize=9, family="monospace", va="center")
    return figure


def similarity_matrix(val: Features) -> Any:
    """A figure: cosine of some held-out pictures (rows) with the first caption of each (columns)."""
    from matplotlib.figure import Figure

    chosen = spread(len(val.images), MATRIX)
    first = val.first[chosen]
    cosine = (val.images[chosen] @ val.texts[first].T).numpy()          # (24, 24)
    names = [short(val.captions[place]) for place in first.tolist()]
    figure = Figure(figsize=(9, 8), layout="tight")
    axes = figure.add_subplot()
    figure.colorbar(axes.imshow(cosine, cmap="viridis"), label="cosine")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylabel("picture of")
    axes.set_xlabel("caption")
    return figure


def short(caption: str) -> str:
    """A caption in the room that a figure has, its characters free of meaning to the plotter."""
    return (caption if len(caption) <= CELL else caption[: CELL - 1] + "…").replace("$", r"\$")
