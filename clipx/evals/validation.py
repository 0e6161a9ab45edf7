"""The evaluations of a model, while it trains and afterwards: encode once, score with each, show some pictures."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from clipx.data.labelled import LabelledSet
from clipx.data.sample import Source
from clipx.evals.encoder import Encoder
from clipx.evals.features import EncodeImages, EncodeTexts, Features, Scores, Skip, pair_loss
from clipx.models.clip import CLIP
from clipx.tokenizer import SimpleTokenizer

logger = logging.getLogger("clipx")

Evaluation = Callable[[Features, EncodeTexts], dict[str, float]]


@runtime_checkable
class LabelledEvaluation(Protocol):
    """An evaluation that brings labelled data of its own, and is called for each of these sets."""

    sets: Mapping[str, LabelledSet]

    def __call__(self, data: LabelledSet, encode_images: EncodeImages, encode_texts: EncodeTexts) -> Scores:
        """Numbers and figures by name."""


class FigureLog(Protocol):
    """Where an evaluation shows pictures."""

    def pictures(self, val: Features, step: int) -> None: ...

    def figure(self, tag: str, figure: Any, step: int) -> None: ...


class Validation:
    """Scores a model on validation sets, and on the labelled sets of evaluations that have some.

    Args:
        sources: validation sets by name; the first of a run goes without a name in tags and pictures, as ``""``.
        evals: evaluations by name.
        tokenizer: the model's.
        workers: processes that read.
        amp: autocast's type, or None for float32.
        cache: directory where features are kept, or None.
        with_loss: whether to give the loss of the pictures and their first captions, ``val/loss``, too.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        evals: Mapping[str, Evaluation | LabelledEvaluation],
        tokenizer: SimpleTokenizer,
        workers: int,
        amp: torch.dtype | None,
        cache: Path | None = None,
        with_loss: bool = False,
    ):
        self.labelled = {key: one for key, one in evals.items() if isinstance(one, LabelledEvaluation)}
        self.evals = {key: evaluation for key, evaluation in evals.items() if key not in self.labelled}
        self.sources, self.tokenizer, self.workers, self.amp, self.cache = sources, tokenizer, workers, amp, cache
        self.with_loss = with_loss
        self.told: set[str] = set()         # ids of data whose missing pictures have been told
        self.skipped: list[dict[str, str]] = []     # pictures that the last call left out and no call before

    def __call__(self, model: CLIP, step: int, log: FigureLog) -> dict[str, float]:
        """The numbers by tag, ``val/<eval>/<metric>`` or ``val/<eval>@<data>/<metric>``; pictures go to the log."""
        encoder = Encoder(model, self.tokenizer, self.workers, self.amp, self.cache)
        numbers: dict[str, float] = {}
        self.skipped = []
        for name, source in self.sources.items() if self.evals else ():
            at = f"@{name}" if name else ""
            val = encoder.pairs(source)
            self.tell_skipped(name or "validation", source, val.skipped)
            if not name:
                log.pictures(val, step)
            if self.with_loss:
                numbers[f"val/loss{at}"] = pair_loss(val, model.logit_scale.exp().item())
            for key, evaluation in self.evals.items():
                scores = {**evaluation(val, encoder.texts), **({"skipped": len(val.skipped)} if val.skipped else {})}
                numbers.update({f"val/{key}{at}/{metric}": value for metric, value in scores.items()})
        for key, evaluation in self.labelled.items():
            for name, data in evaluation.sets.items():
                for metric, value in evaluation(data, encoder.labelled, encoder.texts).items():
                    if isinstance(value, (int, float)):
                        numbers[f"val/{key}@{name}/{metric}"] = value
                    else:
                        log.figure(f"val/{key}@{name}/{metric}", value, step)
                for source in filter(None, (data.test, data.train)):
                    if source.id in encoder.seen:
                        self.tell_skipped(name, source, encoder.seen[source.id].skipped)
        return numbers

    def tell_skipped(self, name: str, source: Source, skipped: list[Skip]) -> None:
        """Warn, once, of pictures that are missing from the scores."""
        if skipped and source.id not in self.told:
            logger.warning("%s: %d pictures are left out, such as %s: %s", name, len(skipped), *skipped[0])
            self.skipped += [{"set": name, "place": place, "reason": reason} for place, reason in skipped]
            self.told.add(source.id)
