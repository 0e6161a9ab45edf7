"""Logs of a run: train.log, metrics.jsonl, summary.json, trackers, and a progress bar."""

import json
import logging
import math
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from clipx.data.files import write_atomic
from clipx.devices import one_of_several_jobs
from clipx.errors import UserError
from clipx.evals.features import Features
from clipx.evals.figures import figure_name, nearest_captions, save_figure, similarity_matrix
from clipx.track import TrackedRun, Tracker, tags_of
from clipx.training.final_report import Bests, final_report, note_bests

logger = logging.getLogger("clipx")


class RunLog:
    """Write the logs of a run, as a context manager; an error on exit marks the run as failed in summary.json.

    Args:
        directory: of the run.
        trackers: that receive what is logged.
        config: for the trackers.
        about: further entries of summary.json, for compare.
        hparams: hyperparameters, for the trackers.
        steps: length of the run, for the progress bar.
        step: last step done; trackers drop what was logged after it.
        samples: drop lines of metrics.jsonl and skipped.jsonl logged after this position.
        seconds: duration of the run so far.
        epoch_samples: samples per epoch.
        early: buffer of earlier log records; forwards them and later ones to train.log.
    """

    def __init__(
        self,
        directory: Path,
        trackers: Sequence[Tracker],
        config: Mapping[str, Any],
        about: Mapping[str, Any],
        hparams: Mapping[str, Any],
        steps: int,
        step: int,
        samples: int,
        seconds: float,
        epoch_samples: int,
        early: MemoryHandler,
    ):
        self.directory, self.trackers, self.config = directory, trackers, config
        self.epoch_samples, self.early = epoch_samples, early
        self.start = time.monotonic() - seconds
        self.summary: dict[str, Any] = {"state": "running", "step": step, "steps": steps, "final": {}, "best": {}}
        self.summary.update(about)
        self.bests: Bests = {}
        self.mode = {about["objective"]: about["mode"]}
        self.hparams, self.steps, self.step, self.samples = hparams, steps, step, samples

    def __enter__(self) -> "RunLog":
        rows = truncate_jsonl(self.directory / "metrics.jsonl", self.samples)
        for row in rows:
            self.summary["final"].update(tags_of(row))
            note_bests(self.bests, row, row["step"], self.mode)
        truncate_jsonl(self.directory / "skipped.jsonl", self.samples)
        self.start_trackers(rows)
        self.file = logging.FileHandler(self.directory / "train.log", encoding="utf-8")
        self.file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.early.setTarget(self.file)
        self.early.flush()
        self.metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        self.bar = tqdm(
            desc=self.directory.name,
            total=self.steps,
            initial=self.step,
            unit="step",
            leave=False,
            disable=one_of_several_jobs() or None,
            dynamic_ncols=True,
        )
        self.write_summary()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.metrics.close()
        if error is not None:
            self.summary["state"], self.summary["reason"] = "failed", str(error) or type(error).__name__
            logger.debug("".join(traceback.format_exception(error)))
        for tracker in self.trackers:
            tracker.close(self.summary["state"])
        if self.directory.is_dir():
            self.write_summary()
        self.early.setTarget(None)
        self.file.close()

    def start_trackers(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Start the trackers; if one cannot, close those that have."""
        objective = self.summary["objective"]
        run = TrackedRun(self.directory, self.config, self.hparams, objective, self.step, rows)
        with ExitStack() as started:
            for tracker in self.trackers:
                tracker.start(run)
                started.callback(tracker.close, "failed")
            started.pop_all()

    @property
    def objective(self) -> float | None:
        """The last value of the objective."""
        return self.summary["final"].get(self.summary["objective"])

    @property
    def seconds(self) -> float:
        """Duration of the run, including earlier processes."""
        return time.monotonic() - self.start

    def scalars(self, numbers: Mapping[str, float], step: int, samples: int) -> None:
        """Write the finite numbers as one line of metrics.jsonl, and to the trackers."""
        self.check_directory()
        for tag in [tag for tag, value in numbers.items() if not math.isfinite(value)]:
            self.summary["final"].pop(tag, None)
        numbers = {tag: value for tag, value in numbers.items() if math.isfinite(value)}
        epoch = round(samples / self.epoch_samples, 4)
        head = {"step": step, "samples": samples, "epoch": epoch, "seconds": round(self.seconds, 3)}
        self.metrics.write(json.dumps({**head, **numbers}) + "\n")
        self.metrics.flush()
        for tracker in self.trackers:
            tracker.log({**head, **numbers})
        self.summary.update(head)
        self.summary["final"].update(numbers)
        note_bests(self.bests, numbers, step, self.mode)

    def best(self, best: Mapping[str, Any], step: int) -> None:
        """Record the best metric, value and step so far."""
        self.summary["best"] = dict(best)
        for tracker in self.trackers if best else ():
            tracker.best(best["metric"], best["value"], step)
        self.write_summary()

    def progress(self, step: int, numbers: Mapping[str, float]) -> None:
        """Update the progress bar."""
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in numbers.items()}, refresh=False)
        self.bar.update(step - self.bar.n)

    def skipped(self, records: list[dict[str, Any]]) -> None:
        """Append records to skipped.jsonl."""
        if not records:
            return
        with (self.directory / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def pictures(self, val: Features, step: int) -> None:
        """Log validation pictures with their nearest captions, and the similarity matrix."""
        if self.trackers:
            self.track_figure("val/nearest_captions", nearest_captions(val), step)
            self.track_figure("val/similarity", similarity_matrix(val), step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Log a figure of an evaluation, and keep the latest as a PNG in the run's directory."""
        self.check_directory()
        save_figure(figure, self.directory / figure_name(tag))
        self.track_figure(tag, figure, step)

    def track_figure(self, tag: str, figure: Any, step: int) -> None:
        """Pass a figure to the trackers."""
        self.check_directory()
        for tracker in self.trackers:
            tracker.figure(tag, figure, step)

    def finish(self, state: str) -> None:
        """Log how the run, or this process's part of it, ended."""
        self.summary["state"] = state
        views = [view for tracker in self.trackers if (view := tracker.view())]
        for line in final_report(self.directory, self.summary, self.bests, views):
            logger.info(line)

    def flush(self) -> None:
        """Flush the logs to disk."""
        self.check_directory()
        for tracker in self.trackers:
            tracker.flush()
        os.fsync(self.metrics.fileno())

    def check_directory(self) -> None:
        """
        Raises:
            UserError: the files are gone; TensorBoard's thread would end with a traceback.
        """
        if not (self.directory / "metrics.jsonl").exists():
            raise UserError(missing_message(self.directory))

    def write_summary(self) -> None:
        """Rewrite summary.json atomically."""
        self.summary["seconds"] = round(self.seconds, 3)
        write_atomic(self.directory / "summary.json", (json.dumps(self.summary, indent=2) + "\n").encode())


@contextmanager
def buffered_logs() -> Iterator[MemoryHandler]:
    """Buffer log records until train.log is open: building the data already logs warnings."""
    early = MemoryHandler(capacity=0, flushLevel=logging.NOTSET, flushOnClose=False)
    logger.addHandler(early)
    try:
        yield early
    finally:
        logger.removeHandler(early)
        early.close()


def missing_message(directory: Path) -> str:
    """The error for a directory that was moved or deleted."""
    return f"{directory} was moved or deleted during the run; rerun the same command to resume from what is left"


class SilentLog:
    """Log of a rank that writes nothing."""

    objective = None
    seconds = 0.0

    def __enter__(self) -> "SilentLog":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def ignore(self, *_args: object, **_kwargs: object) -> None:
        pass

    scalars = best = progress = skipped = pictures = figure = finish = flush = ignore


def truncate_jsonl(path: Path, samples: int) -> list[dict[str, Any]]:
    """Drop the lines of a .jsonl file written after a number of samples; return the other rows."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [(line, row) for line, row in rows if row["samples"] <= samples]
    if len(kept) < len(lines):
        write_atomic(path, "".join(line for line, _ in kept).encode())
    return [row for _, row in kept]
