"""Build a folder of clip art with captions from Debian's openclipart packages, which are in the public domain.

    apt-get download openclipart-png openclipart-svg
    for package in openclipart-*.deb; do dpkg-deb -x $package unpacked; done
    python experiments/clipart/build.py unpacked outputs/clipart
    python -m clipx.train data=folder data.root=outputs/clipart

The drawings come from the PNG package, at 96 pixels on white; titles and keywords from the metadata of the SVG.
"""

import argparse
import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image

SIZE = 96  # pixels, of the longer side
NAMES = {"dc": "http://purl.org/dc/elements/1.1/", "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#"}
WORK = ".//{http://web.resource.org/cc/}Work"
MAX_KEYWORDS = 6
MAX_SAME_TITLE = 3  # drawings; more have the title of their set
MAX_BYTES = 1 << 20  # of a PNG; a few are renderings of thousands of pixels
UNTITLED = re.compile(r"|untitled|unnamed|title|drawing|clip ?art|svg|new document", re.IGNORECASE)


def captions_of(svg: Path) -> list[str]:
    """Title, and title with keywords; empty if the drawing has neither a title nor metadata that can be read."""
    try:
        work = ElementTree.parse(svg).find(WORK)
    except ElementTree.ParseError:
        return []
    if work is None:
        return []
    title = clean(work.findtext("dc:title", "", NAMES))
    if UNTITLED.fullmatch(title):
        return []
    authors = {clean(name.text).lower() for name in work.iterfind("dc:creator//dc:title", NAMES)}
    words = dict.fromkeys(clean(item.text).lower() for item in work.iterfind("dc:subject//rdf:li", NAMES))
    keywords = [word for word in words if word and word not in authors | {title.lower(), "clip art", "clipart", "svg"}]
    with_keywords = [f"{title}: {', '.join(keywords[:MAX_KEYWORDS])}"] if keywords else []
    theme = svg.parent.name.replace("_", " ").replace("-", " ")
    return [title, *with_keywords, f"a drawing of {title}, on a page about {theme}"]


def clean(text: str | None) -> str:
    """The text on one line, with spaces in place of underscores and without entities."""
    return " ".join(html.unescape(text or "").replace("_", " ").split())


class Drawing(NamedTuple):
    """A drawing and its captions, of which the first is its title."""

    name: str
    png: Path
    captions: list[str]


def titled_drawings(unpacked: Path) -> list[Drawing]:
    """The drawings, without those whose title is that of a whole set."""
    found = list(drawings(unpacked))
    titles = Counter(drawing.captions[0] for drawing in found)
    return [drawing for drawing in found if titles[drawing.captions[0]] <= MAX_SAME_TITLE]


def drawings(unpacked: Path) -> Iterator[Drawing]:
    """Each drawing that has a title, in the order of their names; a drawing in two folders comes once."""
    root = unpacked / "usr/share/openclipart"
    seen: set[bytes] = set()
    for svg in sorted((root / "svg").rglob("*.svg")):
        png = root / "png" / svg.relative_to(root / "svg").with_suffix(".png")
        if not png.exists() or png.stat().st_size > MAX_BYTES:
            continue
        digest = hashlib.sha256(png.read_bytes()).digest()
        captions = captions_of(svg) if digest not in seen else []
        seen.add(digest)
        if captions:
            yield Drawing(svg.relative_to(root / "svg").with_suffix("").as_posix().replace("/", "-"), png, captions)


def on_white(png: Path) -> Image.Image:
    """The drawing in the middle of a white square."""
    drawing = Image.open(png).convert("RGBA")
    drawing.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIZE, SIZE), "white")
    square.alpha_composite(drawing, ((SIZE - drawing.width) // 2, (SIZE - drawing.height) // 2))
    return square.convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpacked", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    images = arguments.out / "images"
    images.mkdir(parents=True)
    lines: list[str] = []
    for name, png, captions in titled_drawings(arguments.unpacked):
        on_white(png).save(images / f"{name}.png")
        lines += [f"{name}.png\t{caption}\n" for caption in captions]
    (arguments.out / "captions.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
