"""``python -m clipx.prepare``: images and captions -> indexed shards; or shards -> a check, or a choice of them."""

import importlib.util
import json
import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig

from clipx.config.cli import command
from clipx.config.instantiate import build
from clipx.config.resolve import resolve
from clipx.config.schema import PrepareConfig
from clipx.data.prepare.choice import Choice
from clipx.data.prepare.claim import PARTS, claimed, fingerprint
from clipx.data.prepare.layouts import Item, Layout, Tars
from clipx.data.prepare.pack import pack, survey
from clipx.data.prepare.report import describe_report
from clipx.data.prepare.reshard import open_splits, read_pool
from clipx.data.prepare.shard import Packing
from clipx.data.prepare.verify import index, verify
from clipx.data.shards import Shards
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
        check_choice(config, source)
        if isinstance(source, Layout):
            root, option = make_shards(config, source, workers)
        elif config.out is not None or config.dry_run:
            root, option = reshard(config, source, workers)
        else:
            root, option = check_shards(config, source, workers)
    except KeyboardInterrupt:
        raise UserError("interrupted; rerun the same command to resume") from None
    except OSError as error:
        where = error.filename or config.out
        raise UserError(f"{where}: {error.strerror or error}; fix that and rerun the same command to resume") from error
    if not config.dry_run:
        logger.info("next      python -m clipx.train model=small data=%s %s", option, shlex.quote(f"data.root={root}"))


def check_choice(config: PrepareConfig, source: Layout | Tars) -> None:
    """
    Raises:
        UserError: a key that chooses by features has no effect, or lacks another one.
    """
    choice = choice_of(config)
    given = {key: json.dumps(value) for key, value in choice.rules.items()}
    first = next((f"{key}={value}" for key, value in given.items()), "")
    if given and not isinstance(source, Tars):
        raise UserError(
            f"{first} chooses among shards; pack these pictures, then use source=shards src=SHARDS out=NEW {first}"
        )
    if given and config.by is None:
        raise UserError(f"{first} needs the model whose features decide; add by=outputs/NAME, or weights")
    alone = {"by", "device", "amp", "act", "trust"} if not given else set()
    alone |= {"exclude_similarity"} if not config.exclude else set()
    if unused := [f"{key}={getattr(config, key)}" for key in config.varied if key in alone]:
        raise UserError(
            f"{unused[0]} has no effect without a rule on features; add exclude=[DIR], max_similarity=0.95, "
            "min_score=0.2 or keep=0.5, or leave it out"
        )
    if given and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{first} needs pyarrow to write the features: pip install 'clipx[parquet]'")


def choice_of(config: PrepareConfig) -> Choice:
    return Choice(**{field.name: getattr(config, field.name) for field in fields(Choice)})


def packing_of(config: PrepareConfig) -> Packing:
    """
    Raises:
        UserError: a language is unknown.
    """
    packing = Packing(**{field.name: getattr(config, field.name) for field in fields(Packing)})
    packing.caption_rules()
    return packing


def out_of(config: PrepareConfig) -> Path:
    if config.out is None:
        raise UserError("out has no value; add out=DIR, a new directory")
    return Path(config.out).expanduser()


def make_shards(config: PrepareConfig, layout: Layout, workers: int) -> tuple[Path, str]:
    """Write shards and log what they hold; return their directory and the option of ``data`` that reads them."""
    name, packing = config.choices["source"], packing_of(config)
    if config.dry_run:
        log_report(survey(name, layout, packing, workers), None)
        return layout.root, name
    out = out_of(config)
    meaning = {"source": name, **asdict(packing), "items": fingerprint(layout.splits)}
    with claimed(out, meaning) as finished:
        log_report(finished or pack(name, layout, packing, out, workers, config.max_empty), out)
    return out, name if name in ("coco", "cc3m", "flickr30k") else "shards"


def reshard(config: PrepareConfig, tars: Tars, workers: int) -> tuple[Path, str]:
    """Choose from existing shards and pack them again; log and return as ``make_shards``."""
    packing, choice, sources = packing_of(config), choice_of(config), open_splits(tars)
    if config.dry_run:
        with TemporaryDirectory() as folder:
            layout, _ = choose_from(config, choice, tars.root, sources, Path(folder), workers)
            log_report(survey("shards", layout, packing, workers), None)
        return tars.root, "shards"
    out = out_of(config)
    ids = {split: source.id for split, source in sources.items()}
    meaning = {"source": "shards", **asdict(packing), **asdict(choice), "caption_key": tars.caption_key, "data": ids}
    with claimed(out, meaning) as report:
        if report is None:
            layout, items = choose_from(config, choice, tars.root, sources, out / PARTS / "embeddings", workers)
            report = pack("shards", layout, packing, out, workers, config.max_empty)
            from clipx.tools.left_out import draw_pages  # imports matplotlib

            draw_pages(out, tars.root, items)
        log_report(report, out)
    return out, "shards"


def choose_from(
    config: PrepareConfig, choice: Choice, root: Path, sources: Mapping[str, Shards], folder: Path, workers: int
) -> tuple[Layout, list[Item]]:
    """Return what the rules on features leave, and all items.

    Args:
        config: of the command.
        choice: the rules.
        root: of the source.
        sources: its splits.
        folder: takes the features.
        workers: processes that read.
    """
    pool = read_pool(root, sources)
    items = [item for split in pool.items.values() for item in split.values()]
    if not choice.rules:
        return pool.layout({}), items
    if "train" not in sources:
        raise UserError(f"src={config.src} has no training shards to choose from (*.tar, train/*.tar)")
    from clipx.tools.curation import choose  # imports torch

    chosen = choose(choice, sources["train"], folder, workers, config.device, config.amp, config.trust, config.act)
    return pool.layout(chosen.dropped)._replace(scores=chosen.percentiles()), items


def log_report(report: Mapping[str, Any], out: Path | None) -> None:
    for line in describe_report(report, out):
        logger.info(line)
    if out is None:
        logger.info("dry run: nothing was written")


def check_shards(config: PrepareConfig, tars: Tars, workers: int) -> tuple[Path, str]:
    """Index existing shards, and with ``verify=true`` read every sample.

    Raises:
        UserError: training would fail on a shard, or a key has no effect.
    """
    shaping = {"max_empty"} | {field.name for kind in (Packing, Choice) for field in fields(kind)} - {"verify"}
    if unused := [f"{key}={json.dumps(getattr(config, key))}" for key in config.varied if key in shaping]:
        raise UserError(
            f"{unused[0]} has no effect on existing shards, which are only indexed and verified; leave it out, or add "
            "out=NEW, which packs them again"
        )
    if tars.caption_key is not None and not config.verify:
        raise UserError(
            f"source.caption_key={tars.caption_key} has no effect on an index; add verify=true, which "
            "reads captions, or leave it out"
        )
    whole, bad = tars, 0
    if config.verify:
        folder = tars.root if os.access(tars.root, os.W_OK) else temporary_dir()
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
