"""What can be told of a run before it starts: found with the functions that will run it, on the CPU."""

import logging
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from clipx.config.instantiate import build
from clipx.config.schema import TrainConfig
from clipx.data.folder import Folder
from clipx.data.loader import make_prefetcher, train_ranges
from clipx.data.mix import Chain
from clipx.data.readers import Chunk, EvalReader, TrainReader
from clipx.data.sample import BadSample, Data, Source, Subset, suggest_share
from clipx.data.shards import Shards
from clipx.devices import select_device
from clipx.duration import Every
from clipx.errors import UserError
from clipx.evals.figures import short
from clipx.evals.validation import LabelledEvaluation
from clipx.sched import warmup_steps
from clipx.tools.machine import Finding, check_device, check_disk, check_memory, check_workers, in_bytes
from clipx.training.loop import State
from clipx.training.parts import describe_length, identify, initial_state, run_length, train_reader
from clipx.training.resume import restore
from clipx.weights.load import initialise

logger = logging.getLogger("clipx")

PICTURE = Path("clipx-check.png")
GRID = 4                # rows of it, and columns
LOOKED_AT = 64          # training samples: half of them the first, half spread over an epoch
LOOKED_AT_VAL = 32      # pictures of each validation set
MANY_CUT = 0.1          # share of the captions
MOST_COMPARED = 512     # captions of a batch
MANY_EQUAL = 0.1        # share of them
FEW_VAL = 100           # pictures; of fewer, one in ten is found at 10 by chance
SHOWN = 40              # characters of a caption


class Findings:
    """Tells findings as they are made, and counts those that would stop the run."""

    def __init__(self):
        self.wrong = 0

    @contextmanager
    def part(self, name: str) -> Iterator[Callable[[Iterable[Finding]], None]]:
        """Gives what tells the findings of one part; what ends it is a finding, too, and the other parts follow."""
        tell = partial(self.tell, name)
        try:
            yield tell
        except UserError as error:
            tell([("WRONG", str(error))])

    def tell(self, name: str, findings: Iterable[Finding]) -> None:
        for mark, text in findings:
            self.wrong += mark == "WRONG"
            logger.info("%-6s%-10s%s", mark, name, text)


def examine(config: TrainConfig, directory: Path) -> int:
    """Tell what is wrong or odd about a run, and show in clipx-check.png what it would read first.

    Returns:
        How many of the findings would stop the run.
    """
    found = Findings()
    device = state = data = length = None
    with found.part("device") as tell:
        device = select_device(config.device)
        tell(check_device(device, config.amp))
    with found.part("model") as tell:
        state = initial_state(config, torch.device("cpu"))
        tokens = state.model.text.context
        tell([("ok", f"{sum(p.numel() for p in state.model.parameters()):,} parameters")])
    with found.part("data") as tell:
        data = build(config.data, "data", config.trust)
        plan = data.plan(config.seed)
        tell(check_data(data))
    if data:
        with found.part("length") as tell:
            length = run_length(config, plan)
            tell(check_length(config, plan.samples, length))
    if data and state:
        if length:
            with found.part("run") as tell:
                found_at = restore(state, config, directory, identify(config, data, plan))
                if config.init_from and not found_at:
                    tell([("ok", f"starts {initialise(state.model, config.init_from)}")])
                tell(check_progress(directory, state, length))
        with found.part("samples") as tell:
            reader = train_reader(config, data, plan, state.model)
            make_prefetcher(reader, next(train_ranges(state.samples, config.batch_size)), fill=False).hold_all()
            chunks = first_chunks(reader, state.samples)
            tell(check_samples(data, chunks))
            tell(check_captions(reader, chunks))
            batch = range(state.samples, state.samples + min(config.batch_size, plan.samples))
            tell(check_equal(reader, batch, config.loss.get("same")))
            tell(show(chunks[0]))
            tokens = max(chunk.tokens.shape[1] for chunk in chunks)
        with found.part("evals") as tell:
            tell(check_evals(config, data, partial(EvalReader, size=reader.crop.size, tokenizer=reader.tokenizer)))
    if state:
        with found.part("workers") as tell:
            tell(check_workers(config.workers, config.batch_size, state.model.visual.size))
        with found.part("memory") as tell:
            tell(check_memory(config, state, tokens, device))
        with found.part("disk") as tell:
            every = Every(config.keep_every, length, plan.samples / config.batch_size).in_steps if length else None
            tell(check_disk(directory, state, length // every if every else 0))
    return found.wrong


def check_data(data: Data) -> Iterator[Finding]:
    tars = [source.catalogue.rows for source in shards_of(data.train)]
    size = sum(rows["bytes"].sum() for rows in tars)
    where = f" in {sum(map(len, tars)):,} shards of {in_bytes(size)}" if tars else ""
    yield "ok", f"{sum(data.train.sizes):,} pictures to train{where}"
    for note in data.notes:
        yield "ok", note
    whole = data.train.source if isinstance(data.train, Subset) else data.train
    if isinstance(whole, Folder) and (unlisted := whole.matched[1]):
        yield "odd", f"{len(unlisted):,} pictures are not in captions.txt and do not train, such as {unlisted[0]}"
    if data.lost:
        names = ", ".join(list(data.lost)[:3])
        yield "odd", f"{sum(data.lost.values()):,} samples are lost with the ends of {names}; fetch or pack these again"


def shards_of(source: Source) -> list[Shards]:
    """The sets of tars that a source reads."""
    if isinstance(source, Subset):
        return shards_of(source.source)
    if isinstance(source, Chain):
        return [tars for part in source.sources for tars in shards_of(part)]
    return [source] if isinstance(source, Shards) else []


def check_length(config: TrainConfig, samples: int, length: int) -> Iterator[Finding]:
    build(config.sched, "sched", config.trust)(length)
    epoch = samples / config.batch_size
    yield "ok", f"{describe_length(config, samples, length)}; {epoch:,.4g} batches an epoch"
    if {"warmup", "warmup_cap"} <= config.sched.keys():
        warm = warmup_steps(length, config.sched["warmup"], config.sched["warmup_cap"])
        if warm >= length:
            yield "odd", f"the learning rate rises for all {length:,} steps; sched.warmup_cap=0.1 lets it fall again"
    for key in ("log_every", "eval_every", "save_every", "keep_every"):
        steps = Every(getattr(config, key), length, epoch).in_steps
        if steps is not None and steps > length:
            yield "odd", f"{key}={getattr(config, key)} is {steps:,} steps and never comes due; {key}=25% does"


def check_progress(directory: Path, state: State, length: int) -> Iterator[Finding]:
    if state.step >= length:
        yield "odd", f"{directory} is finished, and the same words change nothing; name=... starts another run"
    else:
        yield "ok", f"{directory}, " + (f"goes on behind step {state.step:,}" if state.step else "a new one")


def first_chunks(reader: TrainReader, start: int) -> list[Chunk]:
    """What training would read first, in one chunk, and chunks of one sample, spread over an epoch."""
    first = min(LOOKED_AT // 2, reader.plan.samples)
    rest = range(start + first, start + reader.plan.samples)
    spread = rest[:: -(-len(rest) // (LOOKED_AT // 2)) or 1]
    return [reader.chunk(range(start, start + first)), *(reader.chunk(range(place, place + 1)) for place in spread)]


def check_samples(data: Data, chunks: list[Chunk]) -> Iterator[Finding]:
    good = {sample for chunk in chunks for sample in chunk.samples.tolist()}
    bad = {record.sample: record for chunk in chunks for record in chunk.skipped}
    read = len(good) + len(bad)
    share = len(bad) / read
    yield "ok", f"{len(good)} of {read} looked at ({1 - share:.0%}) have a picture and a caption"
    places = {record.reason: record.place for record in bad.values()}
    for reason, count in Counter(record.reason for record in bad.values()).most_common():
        yield "odd", (f"{count / read:.0%}: {reason} ({places[reason]}); of shards, \"python -m clipx.prepare "
                      "source=shards src=DIR verify=true\" lists all")
    surely = share - 3 * (share * (1 - share) / read) ** 0.5            # three standard errors below what was seen
    if surely * sum(data.train.sizes) > data.bad_limit - sum(data.lost.values()):
        yield "WRONG", (f"more are bad than data.max_skipped={data.max_skipped} lets pass; mend them, or go on without "
                        f"them (data.max_skipped={min(1, 2 * share):.2f})")


def check_captions(reader: TrainReader, chunks: list[Chunk]) -> Iterator[Finding]:
    captions = chunks[0].captions + [chunk.captions[0] for chunk in chunks[1:]]
    lengths, context = [len(reader.tokenizer.ids(caption)) + 2 for caption in captions], reader.tokenizer.context
    cut = sum(length > context for length in lengths) / len(lengths)
    told = (f"captions have {statistics.median(lengths):.0f} tokens in the median, {max(lengths)} at most; "
            f"{cut:.0%} are cut at model.text.context={context}")
    yield ("odd", f"{told}; shorten them, or raise it") if cut > MANY_CUT else ("ok", told)


def check_equal(reader: TrainReader, batch: range, same: str | None) -> Iterator[Finding]:
    """Count the captions of the first batch that another picture in it has, too: as negatives they teach nonsense."""
    captions = Counter(captions_at(reader, batch[:MOST_COMPARED]))
    rows, equal = captions.total(), sum(count for count in captions.values() if count > 1)
    told = f"{equal} of the first {rows} captions of a batch are equal to another one"
    if equal:
        caption, times = captions.most_common(1)[0]
        told += f", such as {caption[:SHOWN]!r}, {times} times"
    if same == "keep" and equal > MANY_EQUAL * rows:
        yield "odd", f"{told}; with loss.same=mask pictures that have the same one are not each other's negatives"
    else:
        yield "ok", told


def captions_at(reader: TrainReader, positions: range) -> Iterator[str]:
    """The captions that train there, of samples that can be read; no picture is decoded."""
    for position in positions:
        place = reader.plan[position]
        try:
            yield reader.draw(place, reader.source.read(place.sample))
        except BadSample:
            continue


def show(chunk: Chunk) -> Iterator[Finding]:
    """Draw the first of what trains, as the model will see it."""
    from matplotlib.figure import Figure

    figure, most = Figure(figsize=(3 * GRID, 3.2 * GRID)), GRID * GRID
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.97, 0.03, 0.1)
    for place, (image, caption) in enumerate(zip(chunk.images[:most], chunk.captions[:most], strict=True), 1):
        axes = figure.add_subplot(GRID, GRID, place)
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(short(caption), fontsize=8)
        axes.axis("off")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # of letters that the font has not
            figure.savefig(PICTURE)
        yield "ok", f"{PICTURE} shows the first of them, cropped as they train"
    except OSError as error:
        yield "odd", f"{PICTURE} cannot be written ({error.strerror}); from a directory of your own it can"


def check_evals(config: TrainConfig, data: Data, reader: Callable[[Source], EvalReader]) -> Iterator[Finding]:
    evals = {name: build(node, f"evals.{name}", config.trust) for name, node in config.evals.items()}
    labelled = {key: one.sets for key, one in evals.items() if isinstance(one, LabelledEvaluation)}
    if len(labelled) < len(evals) and not data.vals:
        remedy = suggest_share(int(sum(data.train.sizes))) if "val" in config.data else "give each source some"
        remedy = "data.val_samples=256 makes some" if "val_samples" in config.data else remedy
        yield "odd", f"there are no validation pictures, so nothing is scored; {remedy}"
    vals = dict(data.vals) if len(labelled) < len(evals) else {}
    vals |= {f"{key}@{name}": found.test for key, sets in labelled.items() for name, found in sets.items()}
    for name, source in vals.items():
        samples = int(sum(source.sizes))
        told = f"{samples:,} pictures to validate" + (f" of {name}" if name else "")
        if not samples:
            yield "WRONG", f"{told}; give others (data.val=..., data.val_shards=...), or set evals=[]"
            continue
        if samples < FEW_VAL and "@" not in name:
            whole = sum(source.source.sizes) if isinstance(source, Subset) else 0
            remedy = suggest_share(int(whole), FEW_VAL) if whole else f"give {FEW_VAL} or more"
            yield "odd", f"{told}: recall at 10 of so few is {min(1, 10 / samples):.0%} by chance; {remedy}"
        else:
            yield "ok", told
        chunk = reader(source).chunk(range(min(LOOKED_AT_VAL, samples)))
        if chunk.skipped:
            yield "odd", (f"{len(chunk.skipped)} of the first {LOOKED_AT_VAL} are left out, such as "
                          f"{chunk.skipped[0].place}: {chunk.skipped[0].reason}; mend them for scores of all")
    for tag in sorted({config.objective, config.best} - {None}):
        name, _, at = (f"{tag}//").split("/")[1].partition("@")
        known = labelled.get(name, data.vals) if name in evals else ()
        if (data.vals or labelled) and tag.startswith("val/") and at not in known:
            yield "odd", f"nothing gives {tag}, which the run is judged by; there are evals={list(config.evals)}"
