"""``python -m clipx.bench``: where the time and the memory of a run go on this machine, and what to change."""

import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveFloat, PositiveInt

from clipx.config import Train, command, resolve
from clipx.errors import UserError
from clipx.schema import check_call

logger = logging.getLogger("clipx")

WAITS = 0.05            # share of the time: more of it waiting for data is worth a word
SLOW = 0.25             # share of the time that the optimiser may take

Rounds = dict[str, list[dict[str, float]]]      # by side: what each round has shown


@dataclass(frozen=True)
class Bench:
    """What bench adds to the keys of a training run.  conf/bench.yaml says what each means."""

    vs: Literal["open_clip"] | None
    parts: list[Literal["loader", "step"]]
    rounds: PositiveInt
    steps: PositiveInt
    seconds: PositiveFloat
    trace: bool
    json: str | None
    peer_path: str | None


def main() -> None:
    """The entry point."""
    command("bench", bench)


def bench(composed: DictConfig, directory: Path) -> None:
    """Measure the loader alone, then the training step, ours and the peer's in turns.

    Raises:
        UserError: the config, the data or the peer's environment is wrong.
    """
    own = [field.name for field in fields(Bench)]
    keys = Bench(**check_call(Bench, OmegaConf.to_container(OmegaConf.masked_copy(composed, own))))
    config = resolve(OmegaConf.masked_copy(composed, [key for key in composed if key not in own]))
    found: dict[str, Any] = {}
    if "loader" in keys.parts:
        found["loader"] = bench_loader(config, keys)
    if "step" in keys.parts:
        found["step"] = bench_step(config, keys, directory / "trace" if keys.trace else None)
        tell_bound(config, found)
    if keys.json:
        Path(keys.json).write_text(json.dumps(found, indent=2) + "\n")


def bench_loader(config: Train, keys: Bench) -> dict[str, Any]:
    """The loader: stage by stage in one process, then alone with its workers."""
    from clipx.measure import measure_loader, stages

    told = stages(config)
    logger.info("data      %s, %.1f kB a picture", config.choices["data"], told["bytes"] / 1e3)
    for stage, seconds in told.items():
        if stage != "bytes":
            logger.info("%-9s %7.0f us a picture", stage, 1e6 * seconds)
    sides = {"clipx": partial(in_process, measure_loader, config, keys.seconds)}
    if keys.vs:
        sides["open_clip"] = partial(peers_loader, config, keys)
    rounds = in_turns(sides, keys.rounds)
    for side, found in rounds.items():
        logger.info("%-9s %s pictures/s, %.1f MB private memory a worker", side, spread(found, "pictures_per_s"),
                    middle(found, "worker_mb"))
    return {"stages": told, "rounds": rounds, **ratios(rounds, "pictures_per_s", "worker_mb")}


def bench_step(config: Train, keys: Bench, trace: Path | None) -> dict[str, Any]:
    """The step: samples a second on batches in memory and from the loader, shares, FLOPs, memory."""
    from clipx.measure import Steps
    from clipx.peer import PeerSteps

    with ExitStack() as stack:
        made = {"clipx": stack.enter_context(living(Steps, config))}
        if keys.vs:
            made["open_clip"] = stack.enter_context(living(PeerSteps, config))
        first = {side: call("from_memory", 1) for side, call in made.items()}       # compiles, takes memory
        if config.compile:
            logger.info("compile   the first step took %.0f s", config.batch_size / first["clipx"])
        turns = {
            side: lambda call=call: {"samples_per_s": call("from_memory", keys.steps)} for side, call in made.items()
        }
        rounds = in_turns(turns, keys.rounds)
        ours = made["clipx"]
        memory = {side: call("memory") for side, call in made.items()}
        told = {"memory_gb": memory, "from_data": ours("from_data", keys.steps), "shares": ours("shares", keys.steps)}
        told |= ours("figures")
        if trace:
            ours("trace", trace)
            logger.info("trace     tensorboard --logdir %s (with pip install torch-tb-profiler)", trace)
    for side, found in rounds.items():
        logger.info("%-9s %s samples/s on batches in memory, peak %.2f GB", side, spread(found, "samples_per_s"),
                    memory[side])
    logger.info("%-9s %.1f samples/s from the loader", "clipx", told["from_data"])
    logger.info("shares    %s", "  ".join(f"{part} {share:.0%}" for part, share in told["shares"].items()))
    achieved = told["flops_per_sample"] * middle(rounds["clipx"], "samples_per_s")
    peak = told.get("peak_flops")
    logger.info("FLOPs     %.2f GFLOP a sample, %.3g TFLOP/s%s", told["flops_per_sample"] / 1e9, achieved / 1e12,
                f", model FLOPs utilisation {achieved / peak:.0%}" if peak else "; the device's peak is not known")
    compared = ratios(rounds, "samples_per_s")
    if keys.vs:
        compared["memory"] = memory["clipx"] / memory["open_clip"]
        logger.info("%-14s clipx / open_clip = %.2f", "peak memory", compared["memory"])
    return {"rounds": rounds, **told, **compared}


def tell_bound(config: Train, found: Mapping[str, Any]) -> None:
    """Say what bounds the run, and what to change."""
    from clipx.cores import usable_cores
    from clipx.run import pick_device, pick_workers

    step, workers = found["step"], pick_workers(config.workers)
    shares = step["shares"]
    if shares["wait"] > WAITS:
        needed = middle(step["rounds"]["clipx"], "samples_per_s")
        told = f"loader-bound: the device waits {shares['wait']:.0%} of the time"
        if "loader" in found:
            one = middle(found["loader"]["rounds"]["clipx"], "pictures_per_s") / max(1, workers)
            enough, cores = int(needed / one) + 1, usable_cores()
            told += f"; workers={enough} would do" if enough <= cores else (
                f"; workers={enough} would do, but there are {cores} cores: pack the pictures smaller "
                "(clipx.prepare resize=256)")
        logger.info("bound     %s", told)
    elif shares["optimiser"] > SLOW:
        logger.info("bound     optimiser-bound: it takes %.0f %% of the time; a larger batch_size shares it among more "
                    "samples", 100 * shares["optimiser"])
    else:
        slow = config.amp == "none" and pick_device(config.device).type == "cuda"
        remedy = ", ".join(["amp=bf16"] * slow + ["compile=true"] * (not config.compile))
        logger.info("bound     compute-bound%s", f"; try {remedy}" if remedy else "")


def in_turns(sides: Mapping[str, Callable[[], dict[str, float]]], rounds: int) -> Rounds:
    """Each side once a round."""
    found: Rounds = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            found[side].append(run())
    return found


def middle(found: list[dict[str, float]], name: str) -> float:
    return statistics.median(figures[name] for figures in found)


def spread(found: list[dict[str, float]], name: str) -> str:
    values = [figures[name] for figures in found]
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def ratios(rounds: Rounds, *names: str) -> dict[str, float]:
    """Ours to the peer's, round by round; the medians, told with their spread."""
    found = {}
    for name in names if len(rounds) == 2 else ():
        each = [a[name] / b[name] for a, b in zip(*rounds.values(), strict=True)]
        found[f"ratio_{name}"] = statistics.median(each)
        logger.info("%-14s clipx / open_clip = %.2f (%.2f to %.2f)", name, statistics.median(each), min(each),
                    max(each))
    return found


def in_process(work: Callable[..., Any], *given: Any) -> Any:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


@contextmanager
def living(kind: type, *given: Any) -> Iterator[Callable[..., Any]]:
    """An object in a process of its own, as what calls its methods."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, kind, given))
    process.start()
    there.close()

    def call(*method: Any) -> Any:
        here.send(method)
        try:
            answer = here.recv()
        except EOFError as error:
            raise UserError(f"the process of {kind.__name__} has ended; with too little memory try a smaller "
                            "batch_size or micro_batch_size") from error
        if isinstance(answer, UserError):
            raise answer
        return answer

    try:
        yield call
    finally:
        here.close()
        process.join()


def serve(connection: Connection, kind: type, given: tuple[Any, ...]) -> None:
    """The other end of ``living``."""
    from multiprocessing import set_start_method

    set_start_method(None, force=True)          # a spawned process would spawn its workers, too; a run does not
    made = None
    while True:
        try:
            method, *arguments = connection.recv()
            made = made or kind(*given)
            connection.send(getattr(made, method)(*arguments))
        except EOFError:
            return
        except UserError as error:
            connection.send(error)


def peers_loader(config: Train, keys: Bench) -> dict[str, float]:
    """The figures of open_clip's loader on the same shards, in a process of its own.

    Raises:
        UserError: its environment lacks something.
    """
    from clipx.measure import reader_of
    from clipx.run import pick_workers

    reader = reader_of(config)
    if not hasattr(reader.source, "catalogue"):
        raise UserError("vs=open_clip reads shards; give data=shards data.root=DIR data.val=0, or parts=[step]")
    given = {
        "shards": "::".join(str(shard.resolve()) for shard in reader.source.catalogue.shards),
        "batch_size": config.batch_size, "workers": pick_workers(config.workers), "seconds": keys.seconds,
        "size": reader.crop.size,
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
