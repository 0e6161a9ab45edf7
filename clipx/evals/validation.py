"""Run all evaluations of a model, during training and afterwards: encode each data set once, score it with each."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from clipx.data.labelled import LabelledSet
from clipx.data.sample import Source
from clipx.evals.encoder import EvalEncoder
from clipx.evals.features import EncodeImages, EncodeTexts, Features, Scores, Skip, pair_loss
from clipx.models.clip import CLIP
from clipx.tokenizer import Tokenizer

logger = logging.getLogger("clipx")

Evaluation = Callable[[Features, EncodeTexts], dict[str, float]]


@runtime_checkable
class LabelledEvaluation(Protocol):
    """An evaluation with labelled sets of its own; it is called for each of them."""

    sets: Mapping[str, LabelledSet]

    def __call__(self, data: LabelledSet, encode_images: EncodeImages, encode_texts: EncodeTexts) -> Scores:
        """Return metrics and figures by name."""


class FigureLog(Protocol):
    """Writer of an evaluation's figures."""

    def pictures(self, val: Features, step: int) -> None:
        """Show the pictures of the unnamed validation set; called during training only."""

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write a figure."""


class Validation:
    """Score a model on validation sets, and on the labelled sets of evaluations that have some.

    Args:
        sources: validation sets by name; a training run's main set is ``""``, and its tags have no ``@name``.
        evals: evaluations by name.
        tokenizer: of the model.
        workers: number of loader processes.
        amp: autocast dtype, or None for float32.
        cache: directory of cached features, or None.
        with_loss: whether to compute ``val/loss``, the loss over pictures and their first captions.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        evals: Mapping[str, Evaluation | LabelledEvaluation],
        tokenizer: Tokenizer,
        workers: int,
        amp: torch.dtype | None,
        cache: Path | None = None,
        with_loss: bool = False,
    ):
        self.labelled = {key: one for key, one in evals.items() if isinstance(one, LabelledEvaluation)}
        self.evals = {key: one for key, one in evals.items() if not isinstance(one, LabelledEvaluation)}
        self.sources, self.tokenizer, self.workers, self.amp, self.cache = sources, tokenizer, workers, amp, cache
        self.with_loss = with_loss
        self.warned: set[str] = set()  # ids of sources whose skipped pictures have been reported
        self.skipped: list[dict[str, str]] = []  # pictures skipped for the first time by the last call

    def __call__(self, model: CLIP, step: int, log: FigureLog) -> dict[str, float]:
        """Return metrics by tag, ``val/<eval>/<metric>`` or ``val/<eval>@<data>/<metric>``; figures go to the log."""
        encoder = EvalEncoder(model, self.tokenizer, self.workers, self.amp, self.cache)
        metrics: dict[str, float] = {}
        self.skipped = []
        for name, source in self.sources.items() if self.evals else ():
            at = f"@{name}" if name else ""
            val = encoder.encode_pairs(source)
            self.warn_skipped(name or "validation", source, val.skipped)
            if not name:
                log.pictures(val, step)
            if self.with_loss:
                metrics[f"val/loss{at}"] = pair_loss(val, model.logit_scale.exp().item())
            for key, evaluation in self.evals.items():
                scores = evaluation(val, encoder.encode_texts)
                if val.skipped:
                    scores = {**scores, "skipped": len(val.skipped)}
                metrics.update({f"val/{key}{at}/{metric}": value for metric, value in scores.items()})
        for key, labelled in self.labelled.items():
            for name, data in labelled.sets.items():
                for metric, value in labelled(data, encoder.encode_labelled, encoder.encode_texts).items():
                    if isinstance(value, (int, float)):
                        metrics[f"val/{key}@{name}/{metric}"] = value
                    else:
                        log.figure(f"val/{key}@{name}/{metric}", value, step)
                for source in filter(None, (data.test, data.train)):
                    if source.id in encoder.labelled:
                        self.warn_skipped(name, source, encoder.labelled[source.id].skipped)
        return metrics

    def warn_skipped(self, name: str, source: Source, skipped: list[Skip]) -> None:
        """Warn once of pictures that are missing from the scores."""
        if skipped and source.id not in self.warned:
            logger.warning("%s: skipped %d pictures, for example %s: %s", name, len(skipped), *skipped[0])
            self.skipped += [{"set": name, "place": place, "reason": reason} for place, reason in skipped]
            self.warned.add(source.id)
