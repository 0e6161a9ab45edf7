"""Pages of the pictures that prepare left out, one for each reason."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from clipx.data.images import decode
from clipx.data.prepare.claim import DROPPED
from clipx.data.prepare.layouts import Item
from clipx.data.prepare.pictures import readers
from clipx.data.sample import BadSample
from clipx.evals.figures import evenly_spaced, picture_grid, save_figure, shorten

SHOWN = 12  # pictures of a reason


def draw_pages(out: Path, root: Path, items: Iterable[Item]) -> None:
    """Write ``out``/left_out-REASON.png for each reason in dropped.jsonl, with some of its pictures.

    Args:
        out: the finished shards.
        root: of the layout.
        items: all of them, also those that were left out.
    """
    by_reason: dict[str, list[Mapping[str, str]]] = {}
    for line in (out / DROPPED).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_reason.setdefault(row["reason"].partition(":")[0], []).append(row)
    shown = {
        reason: [rows[place] for place in evenly_spaced(len(rows), SHOWN).tolist()]
        for reason, rows in by_reason.items()
    }
    wanted = {row[key] for rows in shown.values() for row in rows for key in ("picture", "like") if key in row}
    found = {str(item.picture): item for item in items if str(item.picture) in wanted}
    for reason, rows in shown.items():
        pictures, titles = [], []
        for row in rows:
            detail = row["reason"].partition(":")[2].strip()
            for name, said in ((row["picture"], detail), (row.get("like", ""), "like this one, which stays")):
                if name in found and (picture := read(root, found[name])):
                    pictures.append(picture)
                    titles.append(f"{shorten(found[name].captions[0])}\n{shorten(said)}")
        if pictures:
            name = re.sub(r"\W+", "_", reason)
            save_figure(picture_grid(pictures, titles), out / f"left_out-{name}.png")


def read(root: Path, item: Item) -> Image.Image | None:
    """The picture of an item; None if it does not decode, which may be why it was left out."""
    (source,) = readers(root, [item])
    try:
        return decode(source())
    except BadSample:
        return None
