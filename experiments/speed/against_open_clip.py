"""Compare the loader and the step of a run with open_clip's, alternating, each side in its own process.

    python experiments/speed/against_open_clip.py model=small data=coco 'parts=[step]'
    python experiments/speed/against_open_clip.py data=shards data.root=DIR data.val=0 workers=1 'parts=[loader]' \
        peer_path=PEER

The arguments are those of clipx.bench.  open_clip's data pipeline needs an older webdataset, in a directory of its own:
pip install --no-deps --target PEER 'webdataset<=0.2.86' pandas python-dateutil pytz six
"""

import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from open_clip_side import OpenClipSteps

from clipx.bench import split_config
from clipx.config.cli import command
from clipx.config.schema import BenchConfig, TrainConfig
from clipx.devices import select_device, select_workers
from clipx.errors import UserError
from clipx.tools.bench import spread
from clipx.tools.measure import StepBenchmark, load_batches, make_reader, measure_loader

logger = logging.getLogger("clipx")

Sides = dict[str, list[dict[str, float]]]  # figures of each round, by side


def compare(composed: DictConfig, _directory: Path, peer_path: str) -> None:
    """Measure both sides and log the ratios.

    Raises:
        UserError: the config, the data or open_clip's environment is wrong.
    """
    keys, config = split_config(composed)
    found: dict[str, Any] = {}
    if "loader" in keys.parts:
        sides = in_turns(
            keys.rounds,
            {
                "clipx": partial(in_process, clipx_loader, config, keys.seconds),
                "open_clip": partial(open_clip_loader, config, keys.seconds, peer_path),
            },
        )
        found["loader"] = {"rounds": sides, **report(sides, "pictures_per_s", "worker_mb")}
    if "step" in keys.parts:
        found["step"] = compare_steps(config, keys)
    if keys.json:
        Path(keys.json).write_text(json.dumps(found, indent=2) + "\n")


def compare_steps(config: TrainConfig, keys: BenchConfig) -> dict[str, Any]:
    """Samples/s on the same batches in memory, and peak memory.

    On a CPU, whose speed varies, the sides alternate; on a GPU each has the card and its memory to itself.
    """
    kinds = {"clipx": StepBenchmark, "open_clip": OpenClipSteps}
    alone = select_device(config.device).type == "cuda"
    sides: Sides = {}
    memory: dict[str, float] = {}
    for group in [[side] for side in kinds] if alone else [list(kinds)]:
        with ExitStack() as stack:
            runs = {side: stack.enter_context(in_own_process(kinds[side], config)) for side in group}
            for call in runs.values():
                call("from_memory", 1)  # compiles and allocates memory
            sides |= in_turns(
                keys.rounds, {side: partial(samples_per_s, call, keys.steps) for side, call in runs.items()}
            )
            memory |= {side: call("memory") for side, call in runs.items()}
    ratios = report(sides, "samples_per_s")
    ratios["memory"] = memory["clipx"] / memory["open_clip"]
    logger.info(
        "%-14s clipx %.2f GB, open_clip %.2f GB, clipx / open_clip = %.2f",
        "peak memory",
        *memory.values(),
        ratios["memory"],
    )
    return {"rounds": sides, "memory_gb": memory, **ratios}


def samples_per_s(call: Callable[..., Any], steps: int) -> dict[str, float]:
    """Run steps on batches in memory, in the process of ``call``."""
    return {"samples_per_s": call("from_memory", steps)}


def in_turns(rounds: int, sides: Mapping[str, Callable[[], dict[str, float]]]) -> Sides:
    """Run each side once a round."""
    found: Sides = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            found[side].append(run())
    return found


def report(sides: Sides, *names: str) -> dict[str, float]:
    """Log each side's figures and their ratios; return the median ratios."""
    ratios = {}
    for name in names:
        for side, rounds in sides.items():
            logger.info("%-14s %-9s %s", name, side, spread(rounds, name))
        each = [ours[name] / theirs[name] for ours, theirs in zip(sides["clipx"], sides["open_clip"], strict=True)]
        ratios[f"ratio_{name}"] = statistics.median(each)
        logger.info(
            "%-14s clipx / open_clip = %.2f (%.2f to %.2f)", name, statistics.median(each), min(each), max(each)
        )
    return ratios


def clipx_loader(config: TrainConfig, seconds: float) -> dict[str, float]:
    """Measure clipx's loader, in a spawned process."""
    set_start_method(None, force=True)  # otherwise its workers would be spawned, too, unlike in a run
    torch.set_num_threads(1)
    return measure_loader(load_batches(config), config.batch_size, seconds)


def open_clip_loader(config: TrainConfig, seconds: float, peer_path: str) -> dict[str, float]:
    """Measure open_clip's loader on the same shards, in its own process.

    Raises:
        UserError: the data is not shards, or a package is missing.
    """
    reader = make_reader(config)
    if not hasattr(reader.source, "catalogue"):
        raise UserError("open_clip reads shards; give data=shards data.root=DIR data.val=0, or parts=[step]")
    workers = select_workers(config.workers, select_device(config.device))
    arguments = {
        "shards": "::".join(str(shard.resolve()) for shard in reader.source.catalogue.shards),
        "batch_size": config.batch_size, "workers": workers, "seconds": seconds,
        "size": reader.crop.size,
    }  # fmt: skip
    path = os.pathsep.join(filter(None, [peer_path, os.environ.get("PYTHONPATH")]))
    script = str(Path(__file__).with_name("open_clip_side.py"))
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", script, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        reason = ended.stderr.splitlines()[-1]
        raise UserError(
            f"peer_path={peer_path}: open_clip's pipeline ends with {reason!r}; it needs "
            "webdataset<=0.2.86 and pandas in that directory"
        )
    return json.loads(ended.stdout.splitlines()[-1])


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


@contextmanager
def in_own_process(kind: type, *arguments: Any) -> Iterator[Callable[..., Any]]:
    """Make an object in a new process; yield a function that calls its methods by name."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, kind, arguments))
    process.start()
    there.close()

    def call(*method: Any) -> Any:
        here.send(method)
        try:
            answer = here.recv()
        except EOFError as error:
            raise UserError(
                f"the process of {kind.__name__} has ended; if it ran out of memory, try a smaller "
                "batch_size or micro_batch_size"
            ) from error
        if isinstance(answer, UserError):
            raise answer
        return answer

    try:
        yield call
    finally:
        here.close()
        process.join()


def serve(connection: Connection, kind: type, arguments: tuple[Any, ...]) -> None:
    """The other end of ``in_own_process``."""
    set_start_method(None, force=True)  # otherwise its workers would be spawned, too, unlike in a run
    made = None
    while True:
        try:
            method, *rest = connection.recv()
            made = made or kind(*arguments)
            connection.send(getattr(made, method)(*rest))
        except EOFError:
            return
        except UserError as error:
            connection.send(error)


def main() -> None:
    """The entry point."""
    own = [argument for argument in sys.argv[1:] if argument.startswith("peer_path=")]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in own]
    peer_path = own[-1].partition("=")[2] if own else ""
    command("bench", partial(compare, peer_path=peer_path))


if __name__ == "__main__":
    main()
