"""Score runs and weights one after the other: metrics next to each, and one table of all."""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from clipx import distributed
from clipx.config.console import columns
from clipx.config.instantiate import build
from clipx.config.runs import expand_runs
from clipx.config.schema import EvaluateConfig
from clipx.data.files import write_atomic
from clipx.data.remote.cache import Cache
from clipx.data.sample import Data, Source
from clipx.data.shard_paths import expand
from clipx.data.shards import open_shards, open_validation
from clipx.devices import autocast_dtype, limit_threads, select_amp, select_device, select_workers
from clipx.errors import UserError
from clipx.evals.features import Features
from clipx.evals.figures import figure_name, save_figure
from clipx.evals.validation import FigureLog, LabelledEvaluation, Validation
from clipx.models.clip import CLIP
from clipx.tools.benchmark import BenchmarkSet, own_shards, sanitise
from clipx.tools.score_table import write_outs
from clipx.training.logs import SilentLog
from clipx.weights.checkpoint import best_or_last
from clipx.weights.load import load
from clipx.weights.mix import mixtures
from clipx.weights.peek import read_plain

logger = logging.getLogger("clipx")

RESULTS, SKIPPED = "metrics.json", "evaluate-skipped.jsonl"

Metrics = dict[str, float]  # by tag


@dataclass(frozen=True)
class ResultsWriter(FigureLog):
    """Writer of the results of a run, or of weights."""

    directory: Path
    weights: str  # name of the file in metrics.json
    is_run: bool  # whether the directory is a run's, with events of TensorBoard
    step: int  # of the checkpoint
    prefix: str  # of the names of figures

    def pictures(self, val: Features, step: int) -> None:
        """Not called: every set that evaluate scores has a name."""

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Save a figure as a PNG, and to a run's TensorBoard."""
        save_figure(figure, self.directory / f"{self.prefix}{figure_name(tag)}")
        if self.is_run:
            with SummaryWriter(str(self.directory)) as tensorboard:
                tensorboard.add_figure(tag, figure, step)

    def write(self, metrics: Metrics, ids: Mapping[str, str], skipped: Sequence[Mapping[str, str]]) -> None:
        """Write to metrics.json, by weights, data and evaluation, and to a run's TensorBoard.

        Args:
            metrics: by tag.
            ids: by ``<eval>@<data>``; they distinguish data sets of the same name.
            skipped: records of skipped pictures, for evaluate-skipped.jsonl.
        """
        groups: dict[str, Metrics] = {}
        for tag, value in metrics.items():
            group, metric = parse_tag(tag)
            groups.setdefault(group, {})[metric] = value
        with locked_json(self.directory / RESULTS) as results:
            if skipped:
                self.write_skipped(skipped)
            own = results.setdefault(self.weights, {})
            for group, found in groups.items():
                (evaluation, _, data), source = group.partition("@"), ids[group]
                if own.get(data, {}).get(evaluation, {}).get("data", source) != source:
                    data += f"#{source[:8]}"  # other data with this name were scored before
                own.setdefault(data, {})[evaluation] = {"step": self.step, "data": source, **found}
        if self.is_run:
            with SummaryWriter(str(self.directory)) as tensorboard:
                for tag, value in metrics.items():
                    if "/per_class/" not in tag:
                        tensorboard.add_scalar(tag, value, self.step)

    def write_skipped(self, skipped: Sequence[Mapping[str, str]]) -> None:
        """Append a line for each skipped picture, unless it is listed already."""
        path = self.directory / SKIPPED
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        fresh = [json.dumps({"weights": self.weights, **record}, ensure_ascii=False) for record in skipped]
        path.write_text("".join(f"{line}\n" for line in dict.fromkeys([*before, *fresh])), encoding="utf-8")


def score(config: EvaluateConfig, directory: Path, sets: Mapping[str, BenchmarkSet]) -> None:
    """Evaluate all runs on all data, alone or as one of several ranks.

    Args:
        config: with the sets that have classes in its evaluations.
        directory: for results of weights that are not a file.
        sets: those that ``config.sets`` names.

    Raises:
        UserError: a run, the data or an evaluation is wrong.
    """
    limit_threads()
    device = select_device(config.device)
    runs = expand_runs(config.run)
    with distributed.process_group() as watchdog:
        with distributed.rank0_first(watchdog):
            evals = {name: build(node, f"evals.{name}", config.trust) for name, node in config.evals.items()}
            on_pairs = any(not isinstance(one, LabelledEvaluation) for one in evals.values())
            sources = open_sources(config, sets) if on_pairs else {}
        writers = {run: writer_for(run, directory) for run in runs}
        for writer in writers.values() if distributed.rank() == 0 else ():
            check_writable(writer.directory / RESULTS)
        ids = data_ids(sources, evals)
        workers, amp = select_workers(config.workers, device), autocast_dtype(select_amp(config.amp, device))
        table: dict[str, Metrics] = {}
        steps: list[int] = []
        cache = Path(config.cache).expanduser() if config.cache else None
        for label, model, writer in candidates(config, runs, writers, device):
            validation = Validation(sources, evals, model.text.tokenizer, workers, amp, cache)
            steps.append(writer.step)
            table[label] = validation(model, writer.step, SilentLog() if distributed.rank() else writer)
            if distributed.rank() == 0:
                writer.write(table[label], ids, validation.skipped)
                logger.info("%s: %s", label, writer.directory / RESULTS)
    if distributed.rank() == 0:
        for line in table_lines(table, with_intervals=config.mix is None):
            logger.info(line)
        of_one_run = len({writer.directory for writer in writers.values()}) == 1 < len(set(steps)) == len(steps)
        write_outs(config.out, table, steps if of_one_run else None)


def candidates(
    config: EvaluateConfig, runs: Mapping[str, str], writers: Mapping[str, ResultsWriter], device: torch.device
) -> Iterator[tuple[str, CLIP, ResultsWriter]]:
    """Yield what is scored, one at a time, with its label: each run, or each mixture of a run with other weights."""
    if config.mix is None or config.alphas is None:
        for run, label in runs.items():
            yield label, load(run, device, config.trust, config.act)[0], writers[run]
        return
    (run,) = runs
    for alpha, model in mixtures(run, config.mix, config.alphas, device, config.trust, config.act):
        label, writer = f"alpha={alpha:g}", writers[run]
        weights, prefix = f"{writer.weights} mix={config.mix} {label}", f"{writer.prefix}{label}-"
        yield label, model, replace(writer, weights=weights, is_run=False, prefix=prefix)


def open_sources(config: EvaluateConfig, sets: Mapping[str, BenchmarkSet]) -> dict[str, Source]:
    """Open the data sets of pictures and captions, by name."""
    sources = {name: open_pairs(one) for name, one in sets.items() if one.has_captions}
    return sources if sources and config.data is None else {**open_data(config), **sources}


def open_pairs(one: BenchmarkSet) -> Source:
    """Open a data set of pictures and captions; remote shards are copied and kept."""
    if "cache" not in one.shards:
        return open_shards(str(own_shards(one.texts)[0].parent), val=0.0).train
    copies = Cache.unlimited(one.shards["cache"], "sets_cache")
    return open_validation(expand(one.shards["shards"], "sets"), copies, caption_key=None)


def open_data(config: EvaluateConfig) -> dict[str, Source]:
    """Open the validation sets of ``data``, by name, or its training set."""
    if config.data is None:
        raise UserError(
            f"data has no value, and evals={list(config.evals)} score pictures with captions; add "
            "data=coco|folder|shards|... data.root=DIR, or choose others: evals=[zero_shot]"
        )
    data: Data = build(config.data, "data", config.trust)
    for note in data.notes:
        logger.info(note)
    option, root = config.choices.get("data", "data"), config.data.get("root") or config.data.get("val_shards")
    name = sanitise(Path(os.path.abspath(str(root))).name) if option in ("shards", "folder") and root else ""
    name = name or option
    if config.split == "train":
        return {name: data.train}
    if not data.vals:
        raise UserError(f"split=val: {name} has no validation pictures; split=train scores all, or give data.val=DIR")
    return {sanitise(own) or name: source for own, source in data.vals.items()}


def data_ids(sources: Mapping[str, Source], evals: Mapping[str, Any]) -> dict[str, str]:
    """Hash of each data set's id, by ``<eval>@<data>``."""
    found = {}
    for key, one in evals.items():
        used = {name: data.test for name, data in one.sets.items()} if isinstance(one, LabelledEvaluation) else sources
        found.update(
            {f"{key}@{name}": blake2b(source.id.encode(), digest_size=8).hexdigest() for name, source in used.items()}
        )
    return found


def parse_tag(tag: str) -> tuple[str, str]:
    """``val/zero_shot@cifar10/top1`` -> ``zero_shot@cifar10`` and ``top1``."""
    _, group, metric = tag.split("/", 2)
    return group, metric


def table_lines(table: Mapping[str, Metrics], with_intervals: bool = True) -> list[str]:
    """Format a table: a column for each run, a line for each metric, with its interval if it has one."""
    tags = list(dict.fromkeys(tag for metrics in table.values() for tag in metrics))
    shown = [tag for tag in tags if "/per_class/" not in tag and not tag.endswith(("_low", "_high"))]
    rows = (
        [*parse_tag(tag), *(format_cell(metrics, tag, with_intervals) for metrics in table.values())] for tag in shown
    )
    cells = [["", "", *table], *rows]
    cells = [["" if row and line[0] == cells[row - 1][0] else line[0], *line[1:]] for row, line in enumerate(cells)]
    return columns(cells)


def format_cell(metrics: Metrics, tag: str, with_interval: bool) -> str:
    if tag not in metrics:
        return "-"
    bounds = ("low", "high") if with_interval else ()
    ends = [f"{metrics[f'{tag}_{end}']:.4g}" for end in bounds if f"{tag}_{end}" in metrics]
    return f"{metrics[tag]:.4g}" + (f" ({' to '.join(ends)})" if ends else "")


def writer_for(run: str, directory: Path) -> ResultsWriter:
    """Write next to the weights, or into the run that they belong to."""
    path = Path(run)
    if (path / "checkpoints").is_dir():
        path = best_or_last(path)
    if path.is_dir():
        return ResultsWriter(path, path.name, False, 0, f"{path.stem}-")  # of another project
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        return ResultsWriter(directory, run, False, 0, f"{Path(run).stem}-")
    folder = path.parent if path.parent.name else path.absolute().parent
    if folder.name != "checkpoints" or not (folder.parent / "config.yaml").is_file():
        return ResultsWriter(path.parent, path.name, False, 0, f"{path.stem}-")
    tracked = any(folder.parent.glob("events.out.tfevents.*"))  # track=[] has none
    return ResultsWriter(folder.parent, f"checkpoints/{path.name}", tracked, read_plain(path).get("step", 0), "")


@contextmanager
def locked_json(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the content of a JSON file under a lock, and write it back atomically."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            content = read_results(path)
            yield content
            write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def read_results(path: Path) -> dict[str, Any]:
    """Read metrics.json; empty if there is no file.

    Raises:
        UserError: the file is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if isinstance(content, dict):
            return content
        reason = f"it holds a {type(content).__name__}"
    except OSError as error:
        reason = str(error.strerror)
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{path} was not written by evaluate ({reason}); move it away, and evaluate writes a new one")


def check_writable(path: Path) -> None:
    """
    Raises:
        UserError: metrics cannot be written to ``path``.
    """
    read_results(path)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written: {os.strerror(errno.EACCES)}; copy the run to a "
            "writable place, or give run=FILE of a copy of its checkpoint"
        )
