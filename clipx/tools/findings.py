"""Check a run before it starts, on the CPU, with the functions that will run it."""

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from clipx.config.instantiate import build
from clipx.config.schema import TrainConfig
from clipx.data.folder import Folder
from clipx.data.loader import make_prefetcher, train_ranges
from clipx.data.mix import Chain
from clipx.data.readers import Chunk, EvalReader, TrainReader
from clipx.data.sample import BadSample, Data, Source, Subset, captions_of, suggest_share
from clipx.data.shards import Shards
from clipx.devices import select_amp, select_device
from clipx.duration import Every
from clipx.errors import UserError
from clipx.evals.figures import picture_grid, save_figure, shorten
from clipx.evals.validation import LabelledEvaluation
from clipx.models.clip import CLIP
from clipx.tools.machine import Finding, check_device, check_disk, check_features, check_memory, check_workers
from clipx.training.header import describe_length, warmup_of
from clipx.training.loop import State
from clipx.training.memory import describe_trained, format_bytes
from clipx.training.parts import identify, initial_state, initial_weights, run_length, train_reader
from clipx.training.resume import restore
from clipx.training.teacher import load_teacher

logger = logging.getLogger("clipx")

CPU = torch.device("cpu")
PICTURE = Path("clipx-check.png")
DRAWN = 16  # samples in it
TRAIN_SAMPLES = 64  # checked: half the first ones, half spread over an epoch
VAL_SAMPLES = 32  # checked in each validation set
MANY_TRUNCATED = 0.1  # share of the captions
MOST_COMPARED = 512  # captions of a batch
MANY_EQUAL = 0.1  # share of them
MIN_VAL = 100  # pictures; below, recall at 10 is over 10 % by chance
CAPTION_LENGTH = 40  # characters of a caption in a message


class Report:
    """Log findings, and count those that would stop the run."""

    def __init__(self) -> None:
        self.wrong = 0

    @contextmanager
    def part(self, name: str) -> Iterator[Callable[[Iterable[Finding]], None]]:
        """Yield a function that logs the findings of one part.  A UserError ends this part only, as a finding."""
        log = partial(self.log, name)
        try:
            yield log
        except UserError as error:
            log([Finding("WRONG", str(error))])

    def log(self, part: str, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.wrong += finding.level == "WRONG"
            logger.info("%-6s%-10s%s", finding.level, part, finding.message)


def examine(config: TrainConfig, directory: Path) -> int:
    """Log what is wrong or odd about a run, and draw its first training samples in clipx-check.png.

    Returns:
        Number of findings that would stop the run.
    """
    report = Report()
    device = state = data = length = teacher = None
    with report.part("device") as log:
        device = select_device(config.device)
        log(check_device(device, select_amp(config.amp, device)))
    config = replace(config, amp=select_amp(config.amp, device or CPU))
    with report.part("model") as log:
        state = initial_state(config, CPU, teacher := load_teacher(config, CPU))
        tokens = state.model.text.context
        log([Finding("ok", f"trains {describe_trained(state.model, state.optimizer)}")])
    with report.part("data") as log:
        data = build(config.data, "data", config.trust)
        plan = data.plan(config.seed)
        log(check_data(data))
    if data:
        with report.part("length") as log:
            log(check_length(config, plan.samples, length := run_length(config, plan)))
    if data and state:
        if length:
            with report.part("run") as log:
                restored = restore(state, config, directory, identify(config, data, plan, teacher))
                if not restored and (origin := initial_weights(state.model, config)):
                    log([Finding("ok", f"weights {origin}")])
                log([*check_progress(directory, state, length), *check_features(config, data, state, teacher, device)])
        with report.part("samples") as log:
            reader = train_reader(config, data, plan, state.model)
            make_prefetcher(reader, next(train_ranges(state.samples, config.batch_size)), fill=False).check_all_fit()
            chunks, last = first_chunks(reader, state.samples), state.samples + min(config.batch_size, plan.samples)
            log(check_samples(data, chunks))
            log(check_captions(reader, chunks))
            log(check_equal(reader, range(state.samples, last), config.loss.get("same")))
            log(show(chunks[0]))
            tokens = max(int(chunk.tokens.lengths.max()) for chunk in chunks)
        with report.part("evals") as log:
            log(check_evals(config, data, state.model))
    with report.part("track"):
        build(config.track, "track", config.trust)
    if state:
        report.log("workers", check_workers(config.workers, device or CPU, config.batch_size, state.model.visual.size))
        with report.part("memory") as log:
            log(check_memory(config, state, teacher, tokens, device))
        with report.part("disk") as log:
            log(check_disk(config, directory, state, length or 0, plan.samples if length else 1))
    return report.wrong


def check_data(data: Data) -> Iterator[Finding]:
    tars = [source.catalogue.rows for source in shards_of(data.train)]
    size = sum(rows["bytes"].sum() for rows in tars)
    where = f" in {sum(map(len, tars)):,} shards of {format_bytes(size)}" if tars else ""
    yield Finding("ok", f"{sum(data.train.sizes):,} pictures to train{where}")
    yield from (Finding("ok", note) for note in data.notes)
    whole = data.train.source if isinstance(data.train, Subset) else data.train
    if isinstance(whole, Folder) and (unlisted := whole.matched[1]):
        yield Finding(
            "odd",
            f"{len(unlisted):,} pictures are not in captions.txt and are not trained on, for example {unlisted[0]}",
        )
    if data.lost:
        names = ", ".join(list(data.lost)[:3])
        yield Finding(
            "odd",
            f"{sum(data.lost.values()):,} samples are lost to truncated shards ({names}); fetch or pack these again",
        )


def shards_of(source: Source) -> list[Shards]:
    """Return the sets of tars that a source reads."""
    if isinstance(source, Subset):
        return shards_of(source.source)
    if isinstance(source, Chain):
        return [tars for part in source.sources for tars in shards_of(part)]
    return [source] if isinstance(source, Shards) else []


def check_length(config: TrainConfig, samples: int, length: int) -> Iterator[Finding]:
    build(config.sched, "sched", config.trust)(length)
    epoch = samples / config.batch_size
    yield Finding("ok", f"{describe_length(config, samples, length)}; {epoch:,.4g} batches an epoch")
    if (warmup_of(config, length) or 0) >= length:
        yield Finding("odd", f"warm-up lasts for all {length:,} steps; sched.warmup_cap=0.1 shortens it")
    for key in ("log_every", "eval_every", "save_every", "keep_every"):
        steps = Every(getattr(config, key), length, epoch).in_steps
        if steps is not None and steps > length:
            yield Finding(
                "odd", f"{key}={getattr(config, key)} is {steps:,} steps, more than the run has; try {key}=25%"
            )


def check_progress(directory: Path, state: State, length: int) -> Iterator[Finding]:
    if state.step >= length:
        yield Finding(
            "odd", f"{directory} is finished, so this command would change nothing; name=... starts another run"
        )
    else:
        yield Finding("ok", f"{directory}, " + (f"resuming after step {state.step:,}" if state.step else "a new run"))


def first_chunks(reader: TrainReader, start: int) -> list[Chunk]:
    """Read the first training samples, in one chunk, and others spread over an epoch, in chunks of one."""
    first = min(TRAIN_SAMPLES // 2, reader.plan.samples)
    rest = range(start + first, start + reader.plan.samples)
    spread = rest[:: -(-len(rest) // (TRAIN_SAMPLES // 2)) or 1]
    return [reader.chunk(range(start, start + first)), *(reader.chunk(range(at, at + 1)) for at in spread)]


def check_samples(data: Data, chunks: list[Chunk]) -> Iterator[Finding]:
    good = {sample for chunk in chunks for sample in chunk.samples.tolist()}
    bad = {record.sample: record for chunk in chunks for record in chunk.skipped}
    read = len(good) + len(bad)
    share = len(bad) / read
    yield Finding("ok", f"{len(good)} of {read} samples checked ({1 - share:.0%}) have a picture and a caption")
    places = {record.reason: record.place for record in bad.values()}
    for reason, count in Counter(record.reason for record in bad.values()).most_common():
        yield Finding(
            "odd",
            f'{count / read:.0%}: {reason} ({places[reason]}); for shards, "python -m clipx.prepare '
            'source=shards src=DIR verify=true" lists them all',
        )
    lower_bound = share - 3 * (share * (1 - share) / read) ** 0.5  # three standard errors
    if lower_bound * sum(data.train.sizes) > data.bad_limit - sum(data.lost.values()):
        yield Finding(
            "WRONG",
            f"more samples are bad than data.max_skipped={data.max_skipped} allows; fix them, or "
            f"train without them (data.max_skipped={min(1, 2 * share):.2f})",
        )


def check_captions(reader: TrainReader, chunks: list[Chunk]) -> Iterator[Finding]:
    captions = chunks[0].captions + [chunk.captions[0] for chunk in chunks[1:]]
    lengths, context = [reader.tokenizer.count(caption) for caption in captions], reader.tokenizer.context
    truncated = sum(length > context for length in lengths) / len(lengths)
    message = (
        f"captions have a median of {statistics.median(lengths):.0f} tokens and at most {max(lengths)}; "
        f"{truncated:.0%} are truncated at model.text.context={context}"
    )
    if truncated > MANY_TRUNCATED:
        yield Finding("odd", f"{message}; shorten them, or raise it")
    else:
        yield Finding("ok", message)


def check_equal(reader: TrainReader, batch: range, same: str | None) -> Iterator[Finding]:
    """Count the captions of the first batch that several of its pictures share: as negatives they are wrong."""
    captions = Counter(captions_at(reader, batch[:MOST_COMPARED]))
    rows, equal = captions.total(), sum(count for count in captions.values() if count > 1)
    message = f"{equal} of the first {rows} captions of a batch are equal to another one"
    if equal:
        caption, times = captions.most_common(1)[0]
        message += f", for example {caption[:CAPTION_LENGTH]!r}, {times} times"
    if same == "keep" and equal > MANY_EQUAL * rows:
        yield Finding(
            "odd", f"{message}; with loss.same=mask, pictures with equal captions are not treated as negatives"
        )
    else:
        yield Finding("ok", message)


def captions_at(reader: TrainReader, positions: range) -> Iterator[str]:
    """Yield the captions drawn at these positions, without bad samples; no picture is read."""
    for position in positions:
        place = reader.place(position)
        try:
            drawn = reader.draw_captions(place, captions_of(reader.source, place.sample))
            yield from dict.fromkeys(one.whole for one in drawn)
        except BadSample:
            continue


def show(chunk: Chunk) -> Iterator[Finding]:
    """Draw the first training samples as the model will see them."""
    firsts = chunk.captions[:: len(chunk.captions) // len(chunk)]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in chunk.images[:DRAWN]]
    try:
        save_figure(picture_grid(pictures, [shorten(caption) for caption in firsts[:DRAWN]]), PICTURE)
        yield Finding("ok", f"{PICTURE} shows the first ones, cropped as in training")
    except OSError as error:
        yield Finding("odd", f"{PICTURE} cannot be written ({error.strerror}); run check in a writable directory")


def check_evals(config: TrainConfig, data: Data, model: CLIP) -> Iterator[Finding]:
    evals = {name: build(node, f"evals.{name}", config.trust) for name, node in config.evals.items()}
    labelled = {key: one.sets for key, one in evals.items() if isinstance(one, LabelledEvaluation)}
    if len(labelled) < len(evals) and not data.vals:
        remedy = suggest_share(int(sum(data.train.sizes))) if "val" in config.data else "give each source some"
        remedy = "data.val_samples=256 makes some" if "val_samples" in config.data else remedy
        yield Finding("odd", f"there are no validation pictures, so nothing is scored; {remedy}")
    vals = dict(data.vals) if len(labelled) < len(evals) else {}
    vals |= {f"{key}@{name}": found.test for key, sets in labelled.items() for name, found in sets.items()}
    for name, source in vals.items():
        samples = int(sum(source.sizes))
        message = f"{samples:,} pictures to validate" + (f" of {name}" if name else "")
        if not samples:
            yield Finding("WRONG", f"{message}; give others (data.val=..., data.val_shards=...), or set evals=[]")
            continue
        if samples < MIN_VAL and "@" not in name:
            whole = sum(source.source.sizes) if isinstance(source, Subset) else 0
            remedy = suggest_share(int(whole), MIN_VAL) if whole else f"give {MIN_VAL} or more"
            chance = min(1, 10 / samples)
            yield Finding("odd", f"{message}: recall at 10 is {chance:.0%} by chance; {remedy}")
        else:
            yield Finding("ok", message)
        reader = EvalReader(source, model.visual.preprocessing, model.text.tokenizer)
        chunk = reader.chunk(range(min(VAL_SAMPLES, samples)))
        if chunk.skipped:
            first = chunk.skipped[0]
            yield Finding(
                "odd",
                f"{len(chunk.skipped)} of the first {VAL_SAMPLES} are skipped, for example "
                f"{first.place}: {first.reason}; fix them to score all pictures",
            )
    for tag in sorted({tag for tag in (config.objective, config.best) if tag}):
        name, _, at = (f"{tag}//").split("/")[1].partition("@")
        known = labelled.get(name, data.vals) if name in evals else ()
        if (data.vals or labelled) and tag.startswith("val/") and at not in known:
            yield Finding(
                "odd", f"no evaluation computes {tag} (objective or best); this run has evals={list(config.evals)}"
            )
