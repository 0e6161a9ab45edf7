"""``python -m clipx.prepare``: images and captions -> indexed shards; or shards -> a check of them."""

import json
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
from clipx.data.prepare.layouts import Layout, Tars
from clipx.data.prepare.pack import Packing, pack
from clipx.data.prepare.report import describe_report
from clipx.data.prepare.verify import index, verify
from clipx.data.tar.index import temporary_dir
from clipx.devices import available_cores
from clipx.errors import UserError

logger = logging.getLogger("clipx")


def main() -> None:
    command("prepare", prepare)


def prepare(composed: DictConfig, directory: Path) -> None:
    """Make or check one set of shards.

    Args:
        composed: the config that Hydra composed.
        directory: unused; the shards go to ``out``.

    Raises:
        UserError: the config or the source is wrong, or the command was interrupted.
    """
    config = resolve(composed, PrepareConfig)
    workers = available_cores() if config.workers == "auto" else config.workers
    try:
        source = build(config.source, "source")(config.src)
        process = make_shards if isinstance(source, Layout) else check_shards
        root, option = process(config, source, workers)
    except KeyboardInterrupt:
        raise UserError("interrupted; rerun the same command to resume") from None
    except OSError as error:
        where = error.filename or config.out
        raise UserError(f"{where}: {error.strerror or error}; fix that and rerun the same command to resume") from error
    logger.info("next      python -m clipx.train model=small data=%s %s", option, shlex.quote(f"data.root={root}"))


def make_shards(config: PrepareConfig, layout: Layout, workers: int) -> tuple[Path, str]:
    """Write shards and log what they hold; return their directory and the option of ``data`` that reads them."""
    if config.out is None:
        raise UserError("out has no value; add out=DIR, a new directory")
    out, source = Path(config.out).expanduser(), config.choices["source"]
    packing = Packing(**{field.name: getattr(config, field.name) for field in fields(Packing)})
    for line in describe_report(pack(source, layout, packing, out, workers, config.max_empty), out):
        logger.info(line)
    return out, source if source in ("coco", "cc3m", "flickr30k") else "shards"


def check_shards(config: PrepareConfig, tars: Tars, workers: int) -> tuple[Path, str]:
    """Index existing shards, and with ``verify=true`` read every sample.

    Raises:
        UserError: training would fail on a shard, or a key has no effect.
    """
    shaping = {field.name for field in fields(Packing)} - {"verify"} | {"max_empty"}
    if unused := [f"{key}={json.dumps(getattr(config, key))}" for key in config.varied if key in shaping]:
        raise UserError(
            f"{unused[0]} has no effect on existing shards, which are only indexed and verified; leave it out"
        )
    if config.out is not None and not config.verify:
        raise UserError(f"out={config.out} has no effect on an index; add verify=true, which writes bad.jsonl there")
    if tars.caption_key is not None and not config.verify:
        raise UserError(
            f"source.caption_key={tars.caption_key} has no effect on an index; add verify=true, which "
            "reads captions, or leave it out"
        )
    whole, bad = tars, 0
    if config.verify:
        default = tars.root if os.access(tars.root, os.W_OK) else temporary_dir()
        folder = Path(config.out).expanduser() if config.out else default
        whole, bad = verify(tars, folder / "bad.jsonl", workers)
    index(whole, bad)
    if broken := [shard.name for shard in tars.shards if shard not in whole.shards]:
        raise UserError(
            f"training would fail on {len(broken)} of {len(tars.shards)} files ({', '.join(broken[:3])}); "
            f"pack the incomplete tars again, or move them out of {tars.root}"
        )
    return tars.root, "shards"


if __name__ == "__main__":
    main()
