"""``python -m clipx.predict``: pictures and words -> scores, or the pictures nearest to some words."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

from clipx.config.cli import command
from clipx.config.resolve import resolve
from clipx.config.runs import check_exists
from clipx.errors import UserError

logger = logging.getLogger("clipx")


@dataclass(frozen=True)
class Predict:
    """The schema of asking a model.  conf/predict.yaml says what each key means and holds the defaults."""

    run: str
    images: str
    texts: str | None
    search: str | None
    top: PositiveInt
    out: str
    json: bool
    device: str
    workers: Literal["auto"] | NonNegativeInt
    act: Literal["quick_gelu", "gelu"] | None
    trust: list[str]


def main() -> None:
    """The entry point."""
    command("predict", predict)


def predict(composed: DictConfig, directory: Path) -> None:
    """Tell the scores of each picture, or show the pictures that a search has found.

    Args:
        composed: the config, as Hydra composes it.
        directory: is not used.

    Raises:
        UserError: a key is wrong, the model or a picture cannot be read.
    """
    config = resolve(composed, Predict)
    if (config.texts is None) == (config.search is None):
        raise UserError('give either texts="a cat,a dog", to score each picture, or search="a red car", to find some')
    check_exists("run", config.run)
    from clipx.tools.predictions import encode_pictures, read_texts, score, search, show

    texts = None if config.texts is None else read_texts(config.texts)
    found = encode_pictures(config.run, config.images, config.device, config.workers, config.trust, config.act)
    for place, reason in found.bad.items():
        logger.warning("%s is left out: it %s", place, reason)
    if texts is not None:
        rows = score(found, texts, config.top)
        tell(rows, config.json)
        return
    rows = search(found, config.search, config.top)
    tell(rows, config.json)
    show(rows, config.search, Path(config.out).expanduser())
    logger.info("%s shows them", config.out)


def tell(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows on standard output."""
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    width = max(len(row["image"]) for row in rows)
    keys = [key for key in ("probability", "cosine", "text") if key in rows[0]]
    print(f"{'picture':<{width}}  {'  '.join(keys)}")
    for row in rows:
        print(f"{row['image']:<{width}}  {'  '.join(cell(key, row[key]) for key in keys)}")


def cell(key: str, value: float | str) -> str:
    """A value below its key."""
    return f"{value:<{len(key)}.3f}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()
