"""Runs and weights scored one after the other: numbers beside each, and one table of all."""

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from clipx import distributed
from clipx.config.instantiate import build
from clipx.config.runs import expand_runs
from clipx.config.schema import EvaluateConfig
from clipx.cores import limit_threads
from clipx.data.sample import Data, Source
from clipx.devices import PRECISIONS, select_device, select_workers
from clipx.errors import UserError
from clipx.evals.figures import save_figure
from clipx.evals.validation import LabelledEvaluation, Validation
from clipx.training.logs import SilentLog
from clipx.weights.load import load
from clipx.weights.peek import read_plain

logger = logging.getLogger("clipx")

RESULTS, LEFT_OUT = "metrics.json", "evaluate-skipped.jsonl"

Numbers = dict[str, float]      # by tag


@dataclass(frozen=True)
class Place:
    """Where the results of a run, or of weights, go."""

    directory: Path
    weights: str        # the file, as metrics.json names it
    run: bool           # whether it is a run's directory, which has TensorBoard's events
    step: int           # of the checkpoint

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Keep a figure of an evaluation."""
        save_figure(self.directory, tag, figure, "" if self.run else f"{Path(self.weights).stem}-")
        if self.run:
            with SummaryWriter(str(self.directory)) as tensorboard:
                tensorboard.add_figure(tag, figure, step)

    def write(self, numbers: Numbers, ids: Mapping[str, str], skipped: Sequence[Mapping[str, str]]) -> None:
        """Into metrics.json, by weights, data and evaluation, and to TensorBoard.

        Args:
            numbers: by tag.
            ids: what tells data from others of the same name, by ``<eval>@<data>``.
            skipped: pictures that are left out, which are listed beside.
        """
        fresh: dict[str, Numbers] = {}
        for tag, value in numbers.items():
            group, metric = parsed(tag)
            fresh.setdefault(group, {})[metric] = value
        with merged(self.directory / RESULTS) as results:
            if skipped:
                self.list_skipped(skipped)
            own = results.setdefault(self.weights, {})
            for group, found in fresh.items():
                (evaluation, _, data), source = group.partition("@"), ids[group]
                if own.get(data, {}).get(evaluation, {}).get("data", source) != source:
                    data += f"#{source[:8]}"        # other data of that name have been scored before
                own.setdefault(data, {})[evaluation] = {"step": self.step, "data": source, **found}
        if self.run:
            with SummaryWriter(str(self.directory)) as tensorboard:
                for tag, value in numbers.items():
                    if "/per_class/" not in tag:
                        tensorboard.add_scalar(tag, value, self.step)


    def list_skipped(self, skipped: Sequence[Mapping[str, str]]) -> None:
        """A line each, and once, however often these data are scored."""
        path = self.directory / LEFT_OUT
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        fresh = [json.dumps({"weights": self.weights, **record}, ensure_ascii=False) for record in skipped]
        path.write_text("".join(f"{line}\n" for line in dict.fromkeys([*before, *fresh])), encoding="utf-8")


def score(config: EvaluateConfig, directory: Path) -> None:
    """Evaluate all runs on all data, alone or as one of several ranks.

    Raises:
        UserError: a run, the data or an evaluation is not what it should be.
    """
    limit_threads()
    device, workers = select_device(config.device), select_workers(config.workers)
    runs = expand_runs(config.run)
    with distributed.process_group() as watchdog:
        with distributed.rank0_first(watchdog):
            evals = {name: build(node, f"evals.{name}", config.trust) for name, node in config.evals.items()}
            on_pairs = any(not isinstance(one, LabelledEvaluation) for one in evals.values())
            sources = sources_of(config) if on_pairs else {}
        places = {run: place_of(run, directory) for run in runs}
        for place in places.values() if distributed.rank() == 0 else ():
            check_results(place.directory / RESULTS)
        ids = ids_of(sources, evals)
        table: dict[str, Numbers] = {}
        for run, label in runs.items():
            model, _, tokenizer = load(run, device, config.trust, config.act)
            place = places[run]
            cache = Path(config.cache).expanduser() if config.cache else None
            validation = Validation(sources, evals, tokenizer, workers, PRECISIONS[config.amp], cache)
            table[label] = validation(model, place.step, SilentLog() if distributed.rank() else place)
            if distributed.rank() == 0:
                place.write(table[label], ids, validation.skipped)
                logger.info("%s: %s", label, place.directory / RESULTS)
    if distributed.rank() == 0:
        for line in lines(table):
            logger.info(line)


def sources_of(config: EvaluateConfig) -> dict[str, Source]:
    """The pictures and captions that are searched, by name."""
    if config.data is None:
        raise UserError(f"data has no value, and evals={list(config.evals)} score pictures with captions; add "
                        "data=coco|folder|shards|... data.root=DIR, or choose others: evals=[zero_shot]")
    data: Data = build(config.data, "data", config.trust)
    for note in data.notes:
        logger.info(note)
    option, root = config.choices.get("data", "data"), config.data.get("root") or config.data.get("val_shards")
    name = plain(Path(os.path.abspath(str(root))).name) if option in ("shards", "folder") and root else ""
    name = name or option
    if config.split == "train":
        return {name: data.train}
    if not data.vals:
        raise UserError(f"split=val: {name} has no validation pictures; split=train takes all, or give data.val=DIR")
    return {plain(own) or name: source for own, source in data.vals.items()}


def plain(name: str) -> str:
    """A name that fits into a tag."""
    return re.sub(r"[^\w.,=+-]", "-", name)


def ids_of(sources: Mapping[str, Source], evals: Mapping[str, Any]) -> dict[str, str]:
    """What tells data from others of the same name, by ``<eval>@<data>``."""
    found = {}
    for key, one in evals.items():
        used = {name: data.test for name, data in one.sets.items()} if isinstance(one, LabelledEvaluation) else sources
        found.update({f"{key}@{name}": blake2b(source.id.encode(), digest_size=8).hexdigest()
                      for name, source in used.items()})
    return found


def parsed(tag: str) -> tuple[str, str]:
    """``val/zero_shot@cifar10/top1`` -> ``zero_shot@cifar10`` and ``top1``."""
    _, group, metric = tag.split("/", 2)
    return group, metric


def lines(table: Mapping[str, Numbers]) -> Iterator[str]:
    """One column a run, one line a number, with its interval where it has one."""
    tags = list(dict.fromkeys(tag for numbers in table.values() for tag in numbers))
    shown = [tag for tag in tags if "/per_class/" not in tag and not tag.endswith(("_low", "_high"))]
    cells = [["", "", *table], *([*parsed(tag), *(cell(numbers, tag) for numbers in table.values())] for tag in shown)]
    cells = [["" if row and line[0] == cells[row - 1][0] else line[0], *line[1:]] for row, line in enumerate(cells)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def cell(numbers: Numbers, tag: str) -> str:
    if tag not in numbers:
        return "-"
    ends = [f"{numbers[f'{tag}_{end}']:.4g}" for end in ("low", "high") if f"{tag}_{end}" in numbers]
    return f"{numbers[tag]:.4g}" + (f" ({' to '.join(ends)})" if ends else "")


def place_of(run: str, directory: Path) -> Place:
    """Beside the weights, or in the run that they belong to."""
    path = Path(run)
    if (path / "checkpoints").is_dir():
        best, last = (path / "checkpoints" / f"clip_{which}.pt" for which in ("best", "last"))
        path = best if best.exists() else last
    if path.is_dir():
        return Place(path, path.name, False, 0)         # of another project
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        return Place(directory, run, False, 0)
    folder = path.parent if path.parent.name else path.absolute().parent
    if folder.name != "checkpoints" or not (folder.parent / "config.yaml").is_file():
        return Place(path.parent, path.name, False, 0)
    return Place(folder.parent, f"checkpoints/{path.name}", True, read_plain(path).get("step", 0))


@contextmanager
def merged(path: Path) -> Iterator[dict[str, Any]]:
    """A file of JSON, to be changed: no other process changes it meanwhile, and it is written whole or not at all."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            content = results_in(path)
            yield content
            temporary = path.with_name(f"{path.name}.writing")
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def results_in(path: Path) -> dict[str, Any]:
    """The numbers that a file holds; none where there is no file.

    Raises:
        UserError: it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if isinstance(content, dict):
            return content
        reason = f"it holds a {type(content).__name__}"
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
    raise UserError(f"{path} is not the JSON of evaluate ({reason}); move it away, and it is made anew")


def check_results(path: Path) -> None:
    """Before anything is scored.

    Raises:
        UserError: numbers could not be written there.
    """
    results_in(path)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {os.strerror(errno.EACCES)}; copy the run to where you can write, "
                        "or give run=FILE of a copy of its checkpoint")
