"""``python -m clipx.bench``: where the time and the memory of a run's data go on this machine."""

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveFloat, PositiveInt

from clipx.config import Train, command, resolve
from clipx.errors import UserError
from clipx.schema import check_call

if TYPE_CHECKING:
    from clipx.data.loader import TrainReader

logger = logging.getLogger("clipx")

STAGED = 256            # pictures whose stages are timed one by one


@dataclass(frozen=True)
class Bench:
    """What bench adds to the keys of a training run.  conf/bench.yaml says what each means."""

    vs: Literal["open_clip"] | None
    rounds: PositiveInt
    seconds: PositiveFloat
    peer_path: str | None


def main() -> None:
    """The entry point."""
    command("bench", bench)


def bench(composed: DictConfig, _directory: Path) -> None:
    """Time the stages of the loader in this process, then the loader alone, ours and the peer's in turns.

    Raises:
        UserError: the config, the data or the peer's environment is wrong.
    """
    own = [field.name for field in fields(Bench)]
    keys = Bench(**check_call(Bench, OmegaConf.to_container(OmegaConf.masked_copy(composed, own))))
    config = resolve(OmegaConf.masked_copy(composed, [key for key in composed if key not in own]))
    told = stages(config)
    logger.info("data      %s, %.1f kB a picture", config.choices["data"], told.pop("bytes") / 1e3)
    for stage, seconds in told.items():
        logger.info("%-9s %7.0f us a picture", stage, 1e6 * seconds)

    sides = {"clipx": ours} | ({"open_clip": peers} if keys.vs else {})
    rounds: dict[str, list[Mapping[str, float]]] = {side: [] for side in sides}
    for _ in range(keys.rounds):
        for side, run in sides.items():
            rounds[side].append(run(config, keys))
    for side, found in rounds.items():
        rates = [figures["pictures_per_s"] for figures in found]
        logger.info("%-9s %7.0f pictures/s (%.0f to %.0f), %.1f MB private memory a worker", side,
                    statistics.median(rates), min(rates), max(rates),
                    statistics.median(figures["worker_mb"] for figures in found))
    if keys.vs:
        for name in ("pictures_per_s", "worker_mb"):
            ratios = [a[name] / b[name] for a, b in zip(*rounds.values(), strict=True)]
            logger.info("%-14s clipx / open_clip = %.2f (%.2f to %.2f)", name, statistics.median(ratios), min(ratios),
                        max(ratios))


def stages(config: Train) -> dict[str, float]:
    """Seconds a picture for each stage, and bytes a picture."""
    import random

    import torch

    from clipx.data.images import resize
    from clipx.data.loader import shared_pixels

    torch.set_num_threads(1)
    reader = reader_of(config)
    places = [reader.plan[position] for position in range(STAGED)]
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[Any], Any], what: list[Any]) -> list[Any]:
        work(what[0])                           # what is made at the first use does not count
        began = time.perf_counter()
        done = [work(one) for one in what]
        seconds[stage] = (time.perf_counter() - began) / STAGED
        return done

    samples = timed("read", lambda place: reader.source.read(place.sample), places)
    cuts = timed("decode", lambda sample: reader.crop.cut(sample.picture, random.Random(0)).copy(), samples)
    pixels = shared_pixels(1, reader.crop.size)[0]
    timed("augment", lambda cut: resize(cut, pixels), cuts)
    timed("tokenise", reader.tokenizer, [sample.captions[:1] for sample in samples])
    chunk = shared_pixels(STAGED, reader.crop.size)
    timed("collate", lambda row: chunk[row].copy_(pixels), list(range(STAGED)))
    return {"bytes": statistics.mean(len(sample.picture) for sample in samples), **seconds}


def reader_of(config: Train) -> "TrainReader":
    """The training reader of a run."""
    import torch

    from clipx.build import build
    from clipx.run import train_reader

    with torch.device("meta"):
        model = build(config.model, "model", config.trust)
    data = build(config.data, "data", config.trust)
    return train_reader(config, data, data.plan(config.seed), model)


def ours(config: Train, keys: Bench) -> dict[str, float]:
    """The figures of our loader, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_ours, config, keys.seconds).result()


def measure_ours(config: Train, seconds: float) -> dict[str, float]:
    import torch

    from clipx.data.loader import read, steps, train_ranges
    from clipx.peer import measure
    from clipx.run import pick_workers

    set_start_method(None, force=True)          # a spawned process would spawn its workers, too; a run does not
    torch.set_num_threads(1)
    ranges = train_ranges(0, config.batch_size, config.micro_batch_size)
    chunks = read(reader_of(config), ranges, pick_workers(config.workers), pin=False)
    return measure(steps(chunks, config.batch_size), config.batch_size, seconds)


def peers(config: Train, keys: Bench) -> dict[str, float]:
    """The figures of open_clip's loader on the same shards, in a process of its own.

    Raises:
        UserError: its environment lacks something.
    """
    from clipx.run import pick_workers

    source = reader_of(config).source
    if not hasattr(source, "catalogue"):
        raise UserError("vs=open_clip reads shards; give data=shards data.root=DIR data.val=0")
    given = {
        "shards": "::".join(str(shard.resolve()) for shard in source.catalogue.shards),
        "batch_size": config.batch_size, "workers": pick_workers(config.workers), "seconds": keys.seconds,
        "size": reader_of(config).crop.size,
    }  # fmt: skip
    path = os.pathsep.join(filter(None, [keys.peer_path, os.environ.get("PYTHONPATH")]))
    ended = subprocess.run([sys.executable, "-W", "ignore", "-m", "clipx.peer", json.dumps(given)],
                           env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if ended.returncode:
        reason = ended.stderr.splitlines()[-1]
        raise UserError(
            f"peer_path={keys.peer_path}: open_clip's pipeline ends with {reason!r}; it needs webdataset<=0.2.86 and "
            "pandas in that directory"
        )
    return json.loads(ended.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
