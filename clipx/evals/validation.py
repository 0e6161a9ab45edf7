"""The validation of a run while it trains: encode once, score with every evaluation, show some pictures."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from clipx.data.loader import EvalReader, cut, read
from clipx.data.sample import Source
from clipx.distributed import part
from clipx.evals.features import EncodeTexts, Features, encode, encode_texts
from clipx.log import RunLog, SilentLog
from clipx.models.clip import CLIP
from clipx.tokenizer import SimpleTokenizer

Evaluation = Callable[[Features, EncodeTexts], dict[str, float]]


class Validation:
    """Scores a model on validation sets.

    Args:
        sources: validation sets by name; the first, which goes without a name in tags and pictures, as ``""``.
        evals: evaluations by name.
        tokenizer: the model's.
        workers: processes that read.
        amp: autocast's type, or None for float32.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        evals: Mapping[str, Evaluation],
        tokenizer: SimpleTokenizer,
        workers: int,
        amp: torch.dtype | None,
    ):
        self.sources, self.evals, self.tokenizer, self.workers, self.amp = sources, evals, tokenizer, workers, amp

    def __call__(self, model: CLIP, step: int, log: RunLog | SilentLog) -> dict[str, float]:
        """The numbers by tag, ``val/<eval>/<metric>`` or ``val/<eval>@<data>/<metric>``; pictures go to the log."""
        numbers: dict[str, float] = {}
        for name, source in self.sources.items() if self.evals else ():
            at = f"@{name}" if name else ""
            val = self.encode(model, source)
            if not name:
                log.pictures(val, step)
            texts = partial(encode_texts, model, self.tokenizer, model.logit_scale.device)
            for key, evaluation in self.evals.items():
                scores = evaluation(val, texts)
                numbers.update({f"val/{key}{at}/{metric}": value for metric, value in scores.items()})
            if val.skipped:
                numbers[f"val/skipped{at}"] = val.skipped
        return numbers

    def encode(self, model: CLIP, source: Source) -> Features:
        """All pictures and captions of a validation set in the joint space."""
        device = model.logit_scale.device
        reader = EvalReader(source, model.visual.size, self.tokenizer)
        own = part([*cut(range(sum(source.sizes)))])
        return encode(model, read(reader, own, self.workers, pin=device.type == "cuda"), device, self.amp)
