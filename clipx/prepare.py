"""``python -m clipx.prepare``: a published layout -> indexed shards; or shards -> what is wrong with them."""

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from clipx.build import build
from clipx.config import Prepare, command, resolve
from clipx.errors import UserError

if TYPE_CHECKING:
    from clipx.data.layouts import Layout, Tars

logger = logging.getLogger("clipx")


def main() -> None:
    """The entry point."""
    command("prepare", prepare)


def prepare(composed: DictConfig, directory: Path) -> None:
    """One set of shards.

    Args:
        composed: the config, as Hydra composes it.
        directory: of a run; shards go where ``out`` says.
    """
    config = resolve(composed, Prepare)
    from clipx.data.catalogue import usable_cores
    from clipx.data.layouts import Layout

    workers = usable_cores() if config.workers == "auto" else config.workers
    try:
        found = build(config.source, "source")(config.src)
        job = make_shards if isinstance(found, Layout) else check_shards
        root, name = job(config, found, workers)
    except KeyboardInterrupt:
        raise UserError("interrupted; the same words go on where it stopped") from None
    logger.info("next      python -m clipx.train model=small data=%s %s", name, shlex.quote(f"data.root={root}"))


def make_shards(config: Prepare, layout: "Layout", workers: int) -> tuple[Path, str]:
    """Write shards and tell what they hold; gives back where they are, and the data config that reads them."""
    from clipx.data.pack import Packing, pack
    from clipx.data.report import tell

    if config.out is None:
        raise UserError("out has no value; add out=DIR, a new directory")
    out, source = Path(config.out).expanduser(), config.choices["source"]
    packing = Packing(
        source=source,
        samples_per_shard=config.samples_per_shard,
        shuffle=config.shuffle,
        seed=config.seed,
        resize=config.resize,
        encode=config.encode,
        quality=config.quality,
        min_size=config.min_size,
        drop_duplicates=config.drop_duplicates,
        verify=config.verify,
    )
    for line in tell(pack(layout, packing, out, workers), out):
        logger.info(line)
    return out, source if source in ("coco", "cc3m", "flickr30k") else "shards"


def check_shards(config: Prepare, tars: "Tars", workers: int) -> tuple[Path, str]:
    """Index shards that are there, and read them all with ``verify=true``."""
    from clipx.data.verify import index, verify

    index(tars)
    if config.verify:
        verify(tars, Path(config.out or tars.root).expanduser() / "bad.jsonl", workers)
    return tars.root, "shards"


if __name__ == "__main__":
    main()
