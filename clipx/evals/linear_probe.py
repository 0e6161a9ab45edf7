"""Linear probe: how well does a linear classifier do on the frozen features of the image tower?"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt

from clipx.data.labelled import LabelledConfig, LabelledSet, open_sets
from clipx.data.tar.headers import DataError
from clipx.distributed import gather_lists, local_slice
from clipx.evals.features import EncodeImages, EncodeTexts, Scores

STRENGTHS = np.logspace(-6, 6, 97)      # of the penalty: 96 steps, eight a decade
FIRST_STEP = 16                         # between the first ones that are tried: two decades
HELD_OUT = 0.2                          # share of what is learnt from that decides on the strength
SEED = 0


class LinearProbe:
    """scikit-learn's logistic regression (L-BFGS) on labelled sets that have a training part.

    The features are those before the projection into the joint space, the class token behind ``ln_post``, as they are:
    the paper takes them for its ViTs (I_f of its figure 3), since the projection is made for the contrast with texts.
    The strength of the penalty is searched as in the paper, on a fifth of the training part, drawn with a seed; then
    all of the training part is learnt.  The ranks share the search.

    Args:
        sets: labelled data by name, each with ``train``, or a dataset that has a split of that name.
        iterations: of L-BFGS at most; where it has not converged by then, that is what counts.

    Source: Radford et al. 2021, appendix A.3.
    """

    def __init__(self, sets: dict[str, LabelledConfig] | None = None, iterations: PositiveInt = 1000):
        self.sets, self.iterations = open_sets(sets, train=True), iterations

    def __call__(self, data: LabelledSet, encode_images: EncodeImages, encode_texts: EncodeTexts) -> Scores:
        """top1, mean_per_class; ``strength`` of the penalty, and ``held_out_top1`` that it was chosen by."""
        learnt, tested = encode_images(data.train), encode_images(data.test)
        x, y = learnt.hidden.numpy(), learnt.labels.numpy()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SEED)).numpy()
        held, rest = np.split(order, [max(1, round(HELD_OUT * len(y)))])
        if len(np.unique(y[rest])) < 2:
            raise DataError(f"{data.train.locate(0)} and its like are all of one class; a probe learns to tell several")
        strength, held_out = search(partial(self.worth, x[rest], y[rest], x[held], y[held]))
        right = self.fit(x, y, strength).predict(tested.hidden.numpy()) == tested.labels.numpy()
        each = [right[tested.labels.numpy() == label].mean() for label in tested.labels.unique().tolist()]
        return {
            "top1": float(right.mean()), "mean_per_class": float(np.mean(each)), "strength": strength,
            "held_out_top1": held_out, "pictures": len(right), "skipped": len(tested.skipped) + len(learnt.skipped),
        }  # fmt: skip

    def worth(self, x: np.ndarray, y: np.ndarray, x_held: np.ndarray, y_held: np.ndarray, strength: float) -> float:
        """Accuracy on what is held out."""
        return float((self.fit(x, y, strength).predict(x_held) == y_held).mean())

    def fit(self, x: np.ndarray, y: np.ndarray, strength: float) -> Any:
        """(N, D), (N,) -> scikit-learn's classifier."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LogisticRegression(C=1 / strength, max_iter=self.iterations).fit(x, y)


def search(worth: Callable[[float], float]) -> tuple[float, float]:
    """The strength of the greatest worth, and that; of equals the strongest.

    Seven strengths, two decades apart, are tried first; then, with half the step each time, those beside the best.
    """
    known: dict[int, float] = {}
    step, places = FIRST_STEP, [*range(0, len(STRENGTHS), FIRST_STEP)]
    while step:
        fresh = [place for place in places if place not in known]
        known.update(gather_lists([(place, worth(STRENGTHS[place])) for place in local_slice(fresh)]))
        best = max(known, key=lambda place: (known[place], place))
        step //= 2
        places = [place for place in (best - step, best + step) if 0 <= place < len(STRENGTHS)]
    return float(STRENGTHS[best]), known[best]
