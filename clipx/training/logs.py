"""What a run leaves behind for people: train.log, metrics.jsonl, summary.json, TensorBoard, and a progress bar."""

import json
import logging
import math
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from clipx.cores import one_of_several_jobs
from clipx.errors import UserError
from clipx.evals.features import Features
from clipx.evals.figures import nearest_captions, save_figure, similarity_matrix
from clipx.training import tensorboard
from clipx.training.closing import Bests, closing, note_bests

logger = logging.getLogger("clipx")


class RunLog:
    """The written side of a run, for the length of a ``with``; how that ends is the run's state in summary.json.

    Args:
        directory: the run's.
        config: as text, for TensorBoard.
        about: what summary.json says of the run itself, for those who compare.
        hparams: what TensorBoard's HPARAMS shows of it.
        steps: the run's length, for the progress bar.
        step: where the run goes on; what was logged behind it is dropped.
        samples: likewise.
        seconds: how long the run has taken before.
        epoch_samples: samples of an epoch.
        early: holds what has been logged before, and passes on to train.log what is logged from then on.
    """

    def __init__(
        self, directory: Path, config: str, about: Mapping[str, Any], hparams: Mapping[str, Any], steps: int,
        step: int, samples: int, seconds: float, epoch_samples: int, early: MemoryHandler,
    ):
        self.directory, self.config, self.epoch_samples, self.early = directory, config, epoch_samples, early
        self.began = time.monotonic() - seconds
        self.summary: dict[str, Any] = {"state": "running", "step": step, "steps": steps, "final": {}, "best": {}}
        self.summary.update(about)
        self.bests: Bests = {}
        self.mode = {about["objective"]: about["mode"]}
        self.hparams, self.steps, self.step, self.samples = hparams, steps, step, samples

    def __enter__(self) -> "RunLog":
        for row in cut(self.directory / "metrics.jsonl", self.samples):
            self.summary["final"].update({tag: value for tag, value in row.items() if "/" in tag})
            note_bests(self.bests, row, row["step"], self.mode)
        cut(self.directory / "skipped.jsonl", self.samples)
        self.file = logging.FileHandler(self.directory / "train.log", encoding="utf-8")
        self.file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.early.setTarget(self.file)
        self.early.flush()
        self.metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(self.directory), purge_step=self.step + 1)
        self.tensorboard.add_text("config", f"```yaml\n{self.config}```", self.step)
        tensorboard.introduce(self.tensorboard, self.hparams, self.summary["objective"])
        self.bar = tqdm(desc=self.directory.name, total=self.steps, initial=self.step, unit="step", leave=False,
                        disable=one_of_several_jobs() or None, dynamic_ncols=True)
        self.write_summary()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.metrics.close()
        self.tensorboard.close()
        if error is not None:
            self.summary["state"], self.summary["reason"] = "failed", str(error) or kind.__name__
            logger.debug("".join(traceback.format_exception(error)))
        if self.directory.is_dir():
            self.write_summary()
        self.early.setTarget(None)
        self.file.close()

    @property
    def seconds(self) -> float:
        """How long the run has taken, its earlier parts included."""
        return time.monotonic() - self.began

    def scalars(self, numbers: Mapping[str, float], step: int, samples: int) -> None:
        """Write numbers by tag, to TensorBoard and as one line of metrics.jsonl; without those that are not finite."""
        self.check_place()
        for tag in [tag for tag, value in numbers.items() if not math.isfinite(value)]:
            self.summary["final"].pop(tag, None)
        numbers = {tag: value for tag, value in numbers.items() if math.isfinite(value)}
        for tag, value in {**numbers, **tensorboard.at_a_glance(numbers, self.summary["objective"])}.items():
            self.tensorboard.add_scalar(tag, value, step)
        epoch = round(samples / self.epoch_samples, 4)
        head = {"step": step, "samples": samples, "epoch": epoch, "seconds": round(self.seconds, 3)}
        self.metrics.write(json.dumps({**head, **numbers}) + "\n")
        self.metrics.flush()
        self.summary.update(head)
        self.summary["final"].update(numbers)
        note_bests(self.bests, numbers, step, self.mode)

    def best(self, found: Mapping[str, Any], step: int) -> None:
        """Keep what was best so far: metric, value and step."""
        self.summary["best"] = dict(found)
        if found:
            self.tensorboard.add_scalar(tensorboard.best_tag(found["metric"]), found["value"], step)
        self.write_summary()

    def progress(self, step: int, numbers: Mapping[str, float]) -> None:
        """Move the bar and set what stands behind it."""
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in numbers.items()}, refresh=False)
        self.bar.update(step - self.bar.n)

    def skipped(self, records: list[dict[str, Any]]) -> None:
        """Append lines to skipped.jsonl."""
        if not records:
            return
        with (self.directory / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def pictures(self, val: Features, step: int) -> None:
        """Show held-out pictures with their nearest captions, and who resembles whom."""
        self.check_place()
        self.tensorboard.add_figure("val/nearest_captions", nearest_captions(val), step)
        self.tensorboard.add_figure("val/similarity", similarity_matrix(val), step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Show a figure of an evaluation, and keep the latest as a PNG in the run."""
        self.check_place()
        save_figure(self.directory, tag, figure)
        self.tensorboard.add_figure(tag, figure, step)

    def finish(self, state: str) -> None:
        """Tell how the run, or its part in this process, ended."""
        self.summary["state"] = state
        if state == "finished":
            tensorboard.end(self.tensorboard)
        for line in closing(self.directory, self.summary, self.bests):
            logger.info(line)

    def flush(self) -> None:
        """See that what has been written is in the files, whatever happens next."""
        self.check_place()
        self.tensorboard.flush()
        os.fsync(self.metrics.fileno())

    def check_place(self) -> None:
        """
        Raises:
            UserError: the files are no longer there; TensorBoard's thread would end with a traceback.
        """
        if not (self.directory / "metrics.jsonl").exists():
            raise UserError(gone(self.directory))

    def write_summary(self) -> None:
        """Rewrite summary.json, whole or not at all."""
        self.summary["seconds"] = round(self.seconds, 3)
        temporary = self.directory / "summary.json.writing"
        temporary.write_text(json.dumps(self.summary, indent=2) + "\n")
        os.replace(temporary, self.directory / "summary.json")


@contextmanager
def holding() -> Iterator[MemoryHandler]:
    """Hold what is logged before train.log is open: warnings about data come while these are looked through."""
    early = MemoryHandler(capacity=0, flushLevel=logging.NOTSET, flushOnClose=False)
    logger.addHandler(early)
    try:
        yield early
    finally:
        logger.removeHandler(early)
        early.close()


def gone(directory: Path) -> str:
    """What is said of a directory that somebody has taken away."""
    return f"{directory} was moved or deleted during the run; rerun the same command to resume from what is there"


class SilentLog:
    """The log of a rank that writes nothing."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.seconds = 0.0

    def __enter__(self) -> "SilentLog":
        return self

    def __exit__(self, *_ended: object) -> None:
        pass

    def ignore(self, *_given: object) -> None:
        pass

    scalars = best = progress = skipped = pictures = figure = finish = flush = write_summary = ignore


def cut(path: Path, samples: int) -> list[dict[str, Any]]:
    """Drop the lines of a .jsonl file that were written behind a number of samples; gives the others."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [(line, row) for line, row in rows if row["samples"] <= samples]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".writing")
        temporary.write_text("".join(line for line, _ in kept), encoding="utf-8")
        os.replace(temporary, path)
    return [row for _, row in kept]
