"""Embed a collection: pictures and captions -> an index, part by part."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clipx import distributed
from clipx.config.instantiate import build
from clipx.config.schema import EmbedConfig
from clipx.data.files import write_atomic
from clipx.data.loader import split_range
from clipx.data.mix import Chain
from clipx.data.origin import Origin, origin_of
from clipx.data.sample import Data, Source, Subset, probe_samples
from clipx.data.tar.headers import DataError
from clipx.devices import autocast_dtype, limit_threads, select_amp, select_device, select_workers
from clipx.errors import UserError
from clipx.evals.encoder import EvalEncoder, evaluating
from clipx.evals.features import Skip
from clipx.models.clip import CLIP
from clipx.tools.index import ABOUT, FORMAT, Index, Part, read_about
from clipx.training.lock import directory_lock
from clipx.weights.checkpoint import checksum
from clipx.weights.convert import model_node
from clipx.weights.load import load

logger = logging.getLogger("clipx")


def write_embeddings(config: EmbedConfig) -> None:
    """Embed all samples of a collection, alone or as one of several ranks, which share the parts.

    Raises:
        UserError: the weights or the data are wrong, or ``out`` is in use, holds something else, or cannot be written.
    """
    limit_threads()
    device, out = select_device(config.device), Path(config.out).expanduser()
    with distributed.process_group() as watchdog:
        with distributed.rank0_first(watchdog):
            source = open_source(config)
        model, _, tokenizer = load(config.run, device, config.trust, config.act)
        amp = autocast_dtype(select_amp(config.amp, device))
        encoder = EvalEncoder(model, tokenizer, select_workers(config.workers, device), amp)
        index = Index(out, describe(config.run, model, source, amp, config.part_size, config.split))
        with ExitStack() as lock:
            if distributed.rank() == 0:
                with writing(index):
                    lock.enter_context(directory_lock(out, "choose another directory: out=DIR"))
                    claim(index)
            write_missing(index, encoder, source)
            distributed.barrier()
            if distributed.rank() == 0:
                report(index)


@contextmanager
def writing(index: Index) -> Iterator[None]:
    """Explain errors of the block, which writes to an index.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"out={index.directory} cannot be written: {error.strerror}; fix that and rerun the same command: the "
            "finished parts are kept"
        ) from error


def open_source(config: EmbedConfig) -> Source:
    """Open the samples of ``split``."""
    data: Data = build(config.data, "data", config.trust)
    for note in data.notes if config.split != "all" else ():
        logger.info(note)
    if config.split == "train":
        return data.train
    if config.split == "val" and not data.vals:
        raise UserError("split=val: data has no validation pictures; split=all embeds everything, or give data.val=DIR")
    if config.split == "val":
        return Chain([*data.vals.values()])
    if isinstance(data.train, Subset) and isinstance(data.val, Subset) and data.val.source is data.train.source:
        whole = data.train.source  # in the order of the files
        if sum(data.train.sizes) + sum(data.val.sizes) == sum(whole.sizes):
            return whole
    return Chain([data.train, *data.vals.values()])


def describe(
    run: str, model: CLIP, source: Source, amp: torch.dtype | None, part_size: int, split: str
) -> dict[str, Any]:
    """What embeddings depend on, for embed.json.

    Ids of data leave out directories, so the bytes of a few samples are hashed, too.
    """
    data = blake2b(str([source.id, probe_samples(source)]).encode(), digest_size=16).hexdigest()
    return {
        "format": FORMAT,
        "run": run,
        "weights": checksum(model.state_dict()),
        "model": model_node(model),
        "amp": "none" if amp is None else str(amp).removeprefix("torch."),
        "data": data,
        "split": split,
        "samples": int(sum(source.sizes)),
        "part_size": part_size,
    }


def claim(index: Index) -> None:
    """Record what an index is made from; one that is there must be made from the same.

    Raises:
        UserError: it is made from something else, or the directory holds other files.
    """
    key = f"out={index.directory}"
    index.remove_unfinished()
    found, now = read_about(index.directory, key), json.loads(json.dumps(index.about))
    if found is None:
        if strange := sorted({path.name for path in index.directory.iterdir()} - {"lock"}):
            raise UserError(f"{key} holds {strange[0]}, but no {ABOUT}; choose an empty or a new directory")
        write_atomic(index.directory / ABOUT, (json.dumps(now, indent=2, ensure_ascii=False) + "\n").encode())
        return
    for name, what in (("weights", "weights"), ("model", "settings of the model"), ("data", "data")):
        if found.get(name) != now[name]:
            raise UserError(
                f"{key} holds embeddings of other {what} (run={found['run']}); choose another directory, or delete it"
            )
    for name in now.keys() - {"run"}:
        if found.get(name) != now[name]:
            raise UserError(
                f"{key} was made with {name}={found.get(name)}, not {now[name]}; set it so, or choose another directory"
            )


def write_missing(index: Index, encoder: EvalEncoder, source: Source) -> None:
    """Write the parts that are not finished; each rank writes some of them.  Raises as ``write_embeddings``."""
    rank, world = distributed.rank(), distributed.world_size()
    distributed.barrier()  # until rank 0 has claimed the directory
    parts = index.parts
    unfinished = [number for number in range(rank, len(parts), world) if index.record(number, thorough=True) is None]
    missing = sorted(distributed.gather_lists(unfinished))
    own = {number: parts[number] for number in missing[rank::world]}
    if rank == 0 and missing:
        logger.info("%s: %d of %d parts to write", index.directory, len(missing), len(parts))
    total, name = sum(map(len, own.values())), f"embed, process 1 of {world}" if world > 1 else "embed"
    with tqdm(total=total, unit="picture", desc=name, disable=None if rank == 0 else True) as bar:
        for number, part in encode_parts(encoder, source, own, bar):
            with writing(index):
                index.write(number, part)


def encode_parts(
    encoder: EvalEncoder, source: Source, parts: Mapping[int, range], bar: "tqdm[Any]"
) -> Iterator[tuple[int, Part]]:
    """Yield the parts one after the other, while workers read ahead.

    Args:
        encoder: of the model.
        source: the samples.
        parts: samples of each part, by number.
        bar: shows progress.
    """
    size, width = encoder.chunk_size, encoder.model.visual.embed
    pieces = (piece for part in parts.values() for piece in split_range(part, size))
    chunks = encoder.read_chunks(source, pieces, captions=1)
    for number, samples in parts.items():
        captions: list[str] = []
        origins: list[Origin] = []
        skipped: list[Skip] = []
        images, texts = [torch.empty(0, width, dtype=torch.float16)], [torch.empty(0, width, dtype=torch.float16)]
        for chunk in islice(chunks, len([*split_range(samples, size)])):
            skipped += [(record.place, record.reason) for record in chunk.skipped]
            if len(chunk):
                with evaluating(encoder.model):
                    images.append(encoder.encode_pictures(encoder.pixels(chunk)).half())
                    texts.append(encoder.encode_captions(chunk).half())
                captions += chunk.captions
                origins += [origin_of(source, sample) for sample in chunk.samples.tolist()]
            bar.update(len(chunk) + len(chunk.skipped))
        yield number, Part(torch.cat(images), torch.cat(texts), captions, origins, skipped)


def report(index: Index) -> None:
    """Log what a finished index holds.

    Raises:
        DataError: nothing, as no picture could be read.
    """
    records = [index.record(number) or {} for number in range(len(index.parts))]
    rows, skipped = sum(record["rows"] for record in records), [one for record in records for one in record["skipped"]]
    if skipped:
        logger.warning("skipped %d pictures, listed in parts/; for example %s: %s", len(skipped), *skipped[0])
    if not rows:
        place, reason = skipped[0]
        raise DataError(f"none of the {len(skipped):,} pictures can be used, for example {place}: {reason}")
    logger.info("%s: %d pictures in %d parts", index.directory, rows, len(records))
