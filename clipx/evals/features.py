"""Features of pictures, captions and labelled sets: encoded once, shared by all evaluations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipx.data.images import Normalise
from clipx.data.readers import Chunk
from clipx.data.sample import Source
from clipx.data.tar.headers import DataError
from clipx.distributed import gather, gather_lists, gather_rows, local_slice, rank
from clipx.models.clip import CLIP
from clipx.models.packed import pack
from clipx.tokenizer import SimpleTokenizer

NUM_SHOWN = 64      # pictures kept for figures
TILE = 1024         # queries of the loss at once

EncodeTexts = Callable[[list[str]], Tensor]
Skip = tuple[str, str]      # place (file and key) and reason; a plain tuple, which torch.load(weights_only=True) allows
Scores = dict[str, Any]     # metrics by name, and matplotlib figures


@dataclass(frozen=True)
class Features:
    """N pictures and their M captions in the joint space."""

    images: Tensor          # (N, E) unit vectors
    texts: Tensor           # (M, E) unit vectors
    owners: Tensor          # (M,) index of each caption's picture
    captions: list[str]     # M
    shown: Tensor           # (min(N, 64), 3, S, S) uint8, the first pictures
    skipped: list[Skip]     # pictures that could not be read

    @property
    def first(self) -> Tensor:
        """(N,) index of each picture's first caption."""
        return torch.searchsorted(self.owners, torch.arange(len(self.images)))


@dataclass(frozen=True)
class LabelledFeatures:
    """N pictures, each with the number of its class."""

    images: Tensor          # (N, E) unit vectors
    hidden: Tensor          # (N, D) input of the projection into the joint space
    labels: Tensor          # (N,) int64
    samples: Tensor         # (N,) int64, ids in the source
    skipped: list[Skip]     # pictures that could not be read


EncodeImages = Callable[[Source], LabelledFeatures]


def pair_loss(val: Features, scale: float) -> float:
    """Symmetric cross-entropy, in nats, of N pictures and their first captions as one batch; ln(N) is chance."""
    texts, total = val.texts[val.first], 0.0
    for queries, items in ((val.images, texts), (texts, val.images)):
        for start in range(0, len(queries), TILE):
            logits = scale * queries[start : start + TILE] @ items.T                # (T, N)
            own = torch.arange(start, start + len(logits))
            total += F.cross_entropy(logits, own, reduction="sum").item()
    return total / (2 * len(texts))


@torch.no_grad()
def encode(model: CLIP, chunks: Iterator[Chunk], device: torch.device, amp: torch.dtype | None) -> Features:
    """Encode all pictures and captions of a validation set.  Ranks share the chunks; each gets all features.

    Args:
        model: its training mode is restored.
        chunks: this rank's share, from an EvalReader.
        device: of the model.
        amp: autocast dtype, or None for float32.

    Raises:
        DataError: no picture can be read.
    """
    training, normalise, size = model.training, Normalise(device), model.visual.size
    model.eval()
    images, texts = ([torch.empty(0, model.visual.embed)] for _ in range(2))        # a rank may have no chunk
    owners, shown = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 3, size, size, dtype=torch.uint8)]
    captions, skipped, count = [], [], 0
    for chunk in chunks:
        skipped += skips_of(chunk)
        if not len(chunk):
            continue
        with torch.autocast(device.type, amp, enabled=amp is not None):
            images.append(model.encode_image(normalise(chunk.images.to(device)), True).cpu())
            texts.append(model.encode_text(pack(chunk.tokens).to(device), True).cpu())
        owners.append(chunk.owners + count)
        captions += chunk.captions
        shown.append(chunk.images[: max(0, NUM_SHOWN - count)])
        count += len(chunk)
    model.train(training)
    counts, skipped = gather(torch.tensor([count])), gather_lists(skipped)
    check_not_empty(int(counts.sum()), skipped)
    return Features(
        images=gather_rows(torch.cat(images)),
        texts=gather_rows(torch.cat(texts)),
        owners=gather_rows(torch.cat(owners) + counts[: rank()].sum()),
        captions=gather_lists(captions),
        shown=gather_rows(torch.cat(shown))[:NUM_SHOWN],
        skipped=skipped,
    )


def skips_of(chunk: Chunk) -> list[Skip]:
    return [(record.place, record.reason) for record in chunk.skipped]


def check_not_empty(count: int, skipped: list[Skip]) -> None:
    """
    Raises:
        DataError: every picture was skipped; the message names the first.
    """
    if skipped and not count:
        place, reason = skipped[0]
        raise DataError(f"none of the {len(skipped):,} pictures to score can be used, for example {place}: {reason}")


@torch.no_grad()
def encode_labelled(
    model: CLIP, chunks: Iterator[Chunk], device: torch.device, amp: torch.dtype | None
) -> LabelledFeatures:
    """Encode the pictures of a labelled set, whose captions are class numbers.  Arguments as in ``encode``.

    One pass yields both the feature and the input of its projection, the class token after ``ln_post``.
    """
    training, normalise = model.training, Normalise(device)
    model.eval()
    images, hidden = [torch.empty(0, model.visual.embed)], [torch.empty(0, model.visual.ln_post.normalized_shape[0])]
    labels, samples, skipped = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)], []
    hook = model.visual.ln_post.register_forward_hook(lambda _layer, _inputs, x: hidden.append(x.float().cpu()))
    for chunk in chunks:
        skipped += skips_of(chunk)
        if not len(chunk):
            continue
        with torch.autocast(device.type, amp, enabled=amp is not None):
            images.append(model.encode_image(normalise(chunk.images.to(device)), True).cpu())
        labels.append(torch.tensor([int(label) for label in chunk.captions]))
        samples.append(chunk.samples)
    hook.remove()
    model.train(training)
    found = LabelledFeatures(*(gather_rows(torch.cat(rows)) for rows in (images, hidden, labels, samples)),
                             gather_lists(skipped))
    check_not_empty(len(found.images), found.skipped)
    return found


@torch.no_grad()
def encode_texts(
    model: CLIP, tokenizer: SimpleTokenizer, device: torch.device, texts: list[str], batch: int = 256
) -> Tensor:
    """Texts -> (M, E) unit vectors on the CPU.  Ranks share the batches; each gets all features."""
    training = model.training
    model.eval()
    features = [torch.empty(0, model.visual.embed)]
    for start in local_slice(range(0, len(texts), batch)):
        tokens = tokenizer.flat(texts[start : start + batch])
        features.append(model.encode_text(pack(tokens).to(device), True).cpu())
    model.train(training)
    return gather_rows(torch.cat(features))
