"""Benchmark the loader by stage and the training step by part, and report what bounds the run."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipx.config.schema import TrainConfig
from clipx.devices import available_cores, select_device, select_workers
from clipx.tools.measure import StepBenchmark, load_batches, measure_loader, time_stages

logger = logging.getLogger("clipx")

MAX_WAIT = 0.05  # share of the time waiting for data; above it, the run is loader-bound
MAX_OPTIMISER = 0.25  # share of the time in the optimiser; above it, the run is optimiser-bound

Rounds = Sequence[Mapping[str, float]]  # figures of each round


def bench_loader(config: TrainConfig, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure the loader: each stage in one process, then the whole of it with its workers."""
    per_stage = time_stages(config)
    logger.info("data      %s, %.1f kB per picture", config.choices["data"], per_stage["bytes"] / 1e3)
    for stage, cost in per_stage.items():
        if stage != "bytes":
            logger.info("%-9s %7.0f us per picture", stage, 1e6 * cost)
    found = [measure_loader(load_batches(config), config.batch_size, seconds) for _ in range(rounds)]
    logger.info(
        "loader    %s pictures/s, %.1f MB private memory per worker",
        spread(found, "pictures_per_s"),
        median(found, "worker_mb"),
    )
    return {"stages": per_stage, "rounds": found}


def bench_step(config: TrainConfig, rounds: int, steps: int, trace: Path | None) -> dict[str, Any]:
    """Measure the step: samples/s from memory and from the loader, time by part, FLOPs, memory."""
    run = StepBenchmark(config)
    if run.frozen or run.teacher:
        when = f", as in the first {config.views} epochs of the run" if config.views else ""
        logger.info("features  computed in each step%s", when)
    first = run.from_memory(1)  # compiles and allocates memory
    if config.compile:
        logger.info("compile   the first step took %.0f s", config.batch_size / first)
    found = [{"samples_per_s": run.from_memory(steps)} for _ in range(rounds)]
    figures: dict[str, Any] = {
        "memory_gb": run.memory(),
        "from_data": run.from_data(steps),
        "shares": run.shares(steps),
        **run.figures(),
    }
    logger.info(
        "step      %s samples/s on batches in memory, peak %.2f GB",
        spread(found, "samples_per_s"),
        figures["memory_gb"],
    )
    logger.info("          %.1f samples/s from the loader", figures["from_data"])
    logger.info("shares    %s", "  ".join(f"{part} {share:.0%}" for part, share in figures["shares"].items()))
    achieved = figures["flops_per_sample"] * median(found, "samples_per_s")
    peak = figures.get("peak_flops")
    logger.info(
        "FLOPs     %.2f GFLOP per sample, %.3g TFLOP/s%s",
        figures["flops_per_sample"] / 1e9,
        achieved / 1e12,
        f", model FLOPs utilisation {achieved / peak:.0%}" if peak else "; the device's peak is unknown",
    )
    if trace:
        figures["operations"] = run.trace(trace)
        for operation, share in figures["operations"].items():
            logger.info("profile   %2.0f %% %s", 100 * share, operation)
        logger.info("trace     %s (open it in ui.perfetto.dev)", trace)
    return {"rounds": found, **figures}


def report_bound(config: TrainConfig, found: Mapping[str, Any]) -> None:
    """Log what bounds the run, and what to change."""
    step, workers = found["step"], select_workers(config.workers, select_device(config.device))
    shares = step["shares"]
    if shares["wait"] > MAX_WAIT:
        needed = median(step["rounds"], "samples_per_s")
        bound = f"loader-bound: the device waits {shares['wait']:.0%} of the time"
        if "loader" in found:
            per_worker = median(found["loader"]["rounds"], "pictures_per_s") / max(1, workers)
            enough, cores = int(needed / per_worker) + 1, available_cores()
            bound += (
                f"; use workers={enough}"
                if enough <= cores
                else (
                    f"; it would take workers={enough}, more than the {cores} cores: make the pictures "
                    "smaller (clipx.prepare resize=256)"
                )
            )
        logger.info("bound     %s", bound)
    elif shares["optimiser"] > MAX_OPTIMISER:
        logger.info(
            "bound     optimiser-bound: it takes %.0f %% of the time; a larger batch_size runs it less often",
            100 * shares["optimiser"],
        )
    else:
        slow = config.amp == "none" and select_device(config.device).type == "cuda"
        remedy = ", ".join(["amp=bf16"] * slow + ["compile=true"] * (not config.compile))
        logger.info("bound     compute-bound%s", f"; try {remedy}" if remedy else "")


def median(rounds: Rounds, name: str) -> float:
    return statistics.median(figures[name] for figures in rounds)


def spread(rounds: Rounds, name: str) -> str:
    """Format the median, minimum and maximum."""
    values = [figures[name] for figures in rounds]
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"
