"""The validation set, encoded once for all evaluations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipx.data.images import Normalise
from clipx.data.loader import Chunk
from clipx.models.clip import CLIP
from clipx.tokenizer import SimpleTokenizer

KEPT = 64           # pictures kept for showing

EncodeTexts = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Features:
    """N pictures and their M captions in the joint space."""

    images: Tensor          # (N, E) unit vectors
    texts: Tensor           # (M, E) unit vectors
    owners: Tensor          # (M,) the picture of each caption
    captions: list[str]     # M
    shown: Tensor           # (min(N, 64), 3, S, S) uint8, the first pictures
    skipped: int            # pictures that could not be read

    @property
    def first(self) -> Tensor:
        """(N,) the first caption of each picture."""
        return torch.searchsorted(self.owners, torch.arange(len(self.images)))


@torch.no_grad()
def encode(model: CLIP, chunks: Iterator[Chunk], device: torch.device, amp: torch.dtype | None) -> Features:
    """Encode every picture and every caption of a validation set.

    Args:
        model: is left in the mode it was in.
        chunks: of an EvalReader.
        device: the model's.
        amp: autocast's type, or None for float32.
    """
    training, normalise = model.training, Normalise(device)
    model.eval()
    images, texts, owners, captions, shown, skipped, count = [], [], [], [], [], 0, 0
    for chunk in chunks:
        with torch.autocast(device.type, amp, enabled=amp is not None):
            images.append(model.encode_image(normalise(chunk.images.to(device)), True).cpu())
            texts.append(model.encode_text(chunk.tokens.to(device), True).cpu())
        owners.append(chunk.owners + count)
        captions += chunk.captions
        shown.append(chunk.images[: max(0, KEPT - count)])
        skipped += len(chunk.skipped)
        count += len(chunk)
    model.train(training)
    return Features(torch.cat(images), torch.cat(texts), torch.cat(owners), captions, torch.cat(shown), skipped)


@torch.no_grad()
def encode_texts(
    model: CLIP, tokenizer: SimpleTokenizer, device: torch.device, texts: list[str], batch: int = 256
) -> Tensor:
    """Texts -> (M, E) unit vectors on the CPU, a batch at a time."""
    training = model.training
    model.eval()
    parts = [tokenizer.trimmed(texts[start : start + batch]) for start in range(0, len(texts), batch)]
    features = [model.encode_text(tokens.to(device), True).cpu() for tokens in parts]
    model.train(training)
    return torch.cat(features)
