"""Linear probe: train a linear classifier on frozen image features and report its accuracy."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt

from clipx.data.labelled import LabelledConfig, LabelledSet, open_sets
from clipx.data.tar.headers import DataError
from clipx.distributed import gather_lists, local_slice
from clipx.evals.features import EncodeImages, EncodeTexts, Scores

STRENGTHS = np.logspace(-6, 6, 97)  # of the L2 penalty, eight per decade
FIRST_STEP = 16  # indices between the first candidates: two decades
HELD_OUT = 0.2  # share of the training part used to choose the strength
SEED = 0


class LinearProbe:
    """scikit-learn's logistic regression (L-BFGS) on labelled sets that have a training part.

    As in the paper, the features are the class token after ``ln_post``, before the projection into the joint space
    (I_f in its figure 3), without normalisation.  The strength of the penalty is chosen as in the paper, on a random
    fifth of the training part; the final classifier is fitted to all of it.  Ranks share the search.

    Args:
        sets: labelled data by name, each with ``train`` or a dataset with a split of that name.
        iterations: maximum number of L-BFGS iterations; an unconverged fit is used as it is.

    Source: Radford et al. 2021, appendix A.3.
    """

    def __init__(self, sets: dict[str, LabelledConfig] | None = None, iterations: PositiveInt = 1000):
        self.sets, self.iterations = open_sets(sets, train=True), iterations

    def __call__(self, data: LabelledSet, encode_images: EncodeImages, encode_texts: EncodeTexts) -> Scores:
        """Return top1, mean_per_class, the chosen ``strength``, its ``held_out_top1``, and the number of pictures."""
        assert data.train is not None  # open_sets(train=True) requires it
        train, test = encode_images(data.train), encode_images(data.test)
        x, y = train.hidden.numpy(), train.labels.numpy()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SEED)).numpy()
        held_out, rest = np.split(order, [max(1, round(HELD_OUT * len(y)))])
        if len(np.unique(y[rest])) < 2:
            raise DataError(f"all training pictures have the class of {data.train.locate(0)}; expected several classes")

        def accuracy(strength: float) -> float:
            return float((self.fit(x[rest], y[rest], strength).predict(x[held_out]) == y[held_out]).mean())

        strength, best = search(accuracy)
        correct = self.fit(x, y, strength).predict(test.hidden.numpy()) == test.labels.numpy()
        per_class = [correct[test.labels.numpy() == label].mean() for label in test.labels.unique().tolist()]
        return {
            "top1": float(correct.mean()), "mean_per_class": float(np.mean(per_class)), "strength": strength,
            "held_out_top1": best, "pictures": len(correct), "skipped": len(test.skipped) + len(train.skipped),
        }  # fmt: skip

    def fit(self, x: np.ndarray, y: np.ndarray, strength: float) -> Any:
        """Fit scikit-learn's classifier to (N, D) features and (N,) labels."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LogisticRegression(C=1 / strength, max_iter=self.iterations).fit(x, y)


def search(accuracy: Callable[[float], float]) -> tuple[float, float]:
    """Return the strength with the best accuracy, and that accuracy; the strongest wins a tie.

    Tries seven strengths two decades apart, then the neighbours of the best with half the step, again and again.
    """
    known: dict[int, float] = {}
    step, indices = FIRST_STEP, [*range(0, len(STRENGTHS), FIRST_STEP)]
    while step:
        fresh = [index for index in indices if index not in known]
        known.update(gather_lists([(index, accuracy(STRENGTHS[index])) for index in local_slice(fresh)]))
        best = max(known, key=lambda index: (known[index], index))
        step //= 2
        indices = [index for index in (best - step, best + step) if 0 <= index < len(STRENGTHS)]
    return float(STRENGTHS[best]), known[best]
