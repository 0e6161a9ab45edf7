"""``python -m clipx.prepare``: a published layout -> indexed shards; or shards -> what is wrong with them."""

import logging
import os
import shlex
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig

from clipx.config.cli import command
from clipx.config.instantiate import build
from clipx.config.resolve import resolve
from clipx.config.schema import PrepareConfig
from clipx.cores import available_cores
from clipx.data.prepare.layouts import Layout, Tars
from clipx.data.prepare.pack import Packing, pack
from clipx.data.prepare.report import describe_report
from clipx.data.prepare.verify import index, verify
from clipx.data.tar.index import temporary_dir
from clipx.errors import UserError

logger = logging.getLogger("clipx")


def main() -> None:
    """The entry point."""
    command("prepare", prepare)


def prepare(composed: DictConfig, directory: Path) -> None:
    """One set of shards, made or checked.

    Args:
        composed: the config, as Hydra composes it.
        directory: of a run; shards go where ``out`` says.
    """
    config = resolve(composed, PrepareConfig)
    workers = available_cores() if config.workers == "auto" else config.workers
    try:
        found = build(config.source, "source")(config.src)
        job = make_shards if isinstance(found, Layout) else check_shards
        root, name = job(config, found, workers)
    except KeyboardInterrupt:
        raise UserError("interrupted; the same words take it up again") from None
    except OSError as error:
        where = error.filename or config.out
        raise UserError(f"{where}: {error.strerror or error}; when that is mended, the same words go on") from error
    logger.info("next      python -m clipx.train model=small data=%s %s", name, shlex.quote(f"data.root={root}"))


def make_shards(config: PrepareConfig, layout: Layout, workers: int) -> tuple[Path, str]:
    """Write shards and tell what they hold; gives back where they are, and the data config that reads them."""
    if config.out is None:
        raise UserError("out has no value; add out=DIR, a new directory")
    out, source = Path(config.out).expanduser(), config.choices["source"]
    packing = Packing(**{field.name: getattr(config, field.name) for field in fields(Packing)})
    for line in describe_report(pack(source, layout, packing, out, workers, config.max_empty), out):
        logger.info(line)
    return out, source if source in ("coco", "cc3m", "flickr30k") else "shards"


def check_shards(config: PrepareConfig, tars: Tars, workers: int) -> tuple[Path, str]:
    """Index shards that are there, and with ``verify=true`` read them all.

    Raises:
        UserError: training would stop at one of them, or a key has no effect.
    """
    if tars.caption_key is not None and not config.verify:
        raise UserError(f"source.caption_key={tars.caption_key} has no effect on an index; add verify=true, which "
                        "reads captions, or leave it out")
    whole, bad = tars, 0
    if config.verify:
        beside = tars.root if os.access(tars.root, os.W_OK) else temporary_dir()
        place = Path(config.out).expanduser() if config.out else beside
        whole, bad = verify(tars, place / "bad.jsonl", workers)
    index(whole, bad)
    if broken := [shard.name for shard in tars.shards if shard not in whole.shards]:
        raise UserError(f"training would stop at {', '.join(broken[:3])}, {len(broken)} of {len(tars.shards)} files; "
                        f"pack what is no whole tar again, or move it out of {tars.root}")
    return tars.root, "shards"


if __name__ == "__main__":
    main()
