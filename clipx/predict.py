"""``python -m clipx.predict``: pictures and texts -> scores, or the pictures nearest to a text."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clipx.config.cli import command
from clipx.config.console import columns
from clipx.config.resolve import resolve
from clipx.config.runs import check_exists
from clipx.config.schema import PredictConfig
from clipx.errors import UserError

logger = logging.getLogger("clipx")


def main() -> None:
    command("predict", predict)


def predict(composed: DictConfig, directory: Path) -> None:
    """Print the scores of each picture, or the results of a search.

    Raises:
        UserError: a key is wrong, or the model or a picture cannot be read.
    """
    config = resolve(composed, PredictConfig)
    if (config.texts is None) == (config.search is None):
        raise UserError('give either texts="a cat,a dog", to score each picture, or search="a red car", to find some')
    if (config.images is None) == (config.index is None):
        raise UserError("give either images=DIR, or index=DIR, which clipx.embed has written")
    check_exists("run", config.run)
    if config.index is not None:
        return search_index(config, config.index)
    assert config.images is not None
    from clipx.tools.predictions import encode_pictures, read_texts, score, search, show

    texts = read_texts(config.texts) if config.texts is not None else []
    pictures = encode_pictures(config.run, config.images, config.device, config.workers, config.trust, config.act)
    for path, reason in pictures.bad.items():
        logger.warning("%s is left out: it %s", path, reason)
    if config.search is None:
        print_rows(score(pictures, texts, config.top), config.json)
        return
    rows = search(pictures, config.search, config.top)
    print_rows(rows, config.json)
    files = {row["image"]: Path(row["image"]).read_bytes() for row in rows}
    show(rows, files, config.search, Path(config.out).expanduser())
    logger.info("%s shows them", config.out)


def search_index(config: PredictConfig, index: str) -> None:
    """Print and draw the pictures of an index that are nearest to a text.  Raises as ``predict``."""
    if config.search is None:
        raise UserError(f'index={index} is searched by text: give search="a red car"; texts=... needs images=DIR')
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"index={index} needs pyarrow to be read: pip install 'clipx[parquet]'")
    from clipx.tools.predictions import search_embeddings, show

    rows, files = search_embeddings(
        config.run, index, config.search, config.top, config.device, config.trust, config.act
    )
    print_rows(rows, config.json)
    if absent := [row["image"] for row in rows if row["image"] not in files]:
        logger.warning("%d of the pictures are not drawn, as they are no longer here: %s", len(absent), absent[0])
    if files:
        show(rows, files, config.search, Path(config.out).expanduser())
        logger.info("%s shows them", config.out)


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    keys = [key for key in ("image", "probability", "cosine", "text", "caption") if key in rows[0]]
    cells = [[f"{row[key]:.3f}" if isinstance(row[key], float) else row[key] for key in keys] for row in rows]
    print(*columns([["picture", *keys[1:]], *cells]), sep="\n")


if __name__ == "__main__":
    main()
