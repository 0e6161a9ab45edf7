"""The validation of a run while it trains: encode once, score with every evaluation, show some pictures."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from clipx.data.loader import EvalReader, cut, read
from clipx.data.sample import Source
from clipx.evals.features import EncodeTexts, Features, encode, encode_texts
from clipx.log import RunLog
from clipx.models.clip import CLIP
from clipx.tokenizer import SimpleTokenizer

Evaluation = Callable[[Features, EncodeTexts], dict[str, float]]


class Validation:
    """Scores a model on a source.

    Args:
        source: the validation set, or None where there is none.
        evals: evaluations by name.
        tokenizer: the model's.
        workers: processes that read.
        amp: autocast's type, or None for float32.
    """

    def __init__(
        self,
        source: Source | None,
        evals: Mapping[str, Evaluation],
        tokenizer: SimpleTokenizer,
        workers: int,
        amp: torch.dtype | None,
    ):
        self.source, self.evals, self.tokenizer, self.workers, self.amp = source, evals, tokenizer, workers, amp

    def __call__(self, model: CLIP, step: int, log: RunLog) -> dict[str, float]:
        """The numbers by tag, ``val/<eval>/<metric>``; pictures go to the log."""
        if self.source is None or not self.evals:
            return {}
        device = model.logit_scale.device
        reader = EvalReader(self.source, model.visual.size, self.tokenizer)
        everything = cut(range(sum(self.source.sizes)))
        val = encode(model, read(reader, everything, self.workers, pin=device.type == "cuda"), device, self.amp)
        log.pictures(val, step)
        texts = partial(encode_texts, model, self.tokenizer, device)
        scores = {name: evaluation(val, texts) for name, evaluation in self.evals.items()}
        numbers = {f"val/{name}/{key}": value for name, score in scores.items() for key, value in score.items()}
        if val.skipped:
            numbers["val/skipped"] = val.skipped
        return numbers
