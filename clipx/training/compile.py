"""The model compiled: faster steps behind a slow first one."""

import logging
import time

import torch
from torch import Tensor, nn

from clipx.models.clip import CLIP
from clipx.models.packed import Packed
from clipx.training.step import Features, Forward

logger = logging.getLogger("clipx")


def compiled(model: CLIP) -> Forward:
    """The model's forward, compiled at its first call; as it is, with a warning, where nothing can compile it."""
    began = time.perf_counter()
    try:
        torch.compile(torch.sin)(torch.ones(2, device=model.logit_scale.device))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        cause = error.inner_exception
        reason = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        logger.warning("compile=true: the model is not compiled (%s); a C++ compiler is needed, such as g++, and on a "
                       "GPU triton", reason)
        return model
    return Compiled(model, began)


class Compiled(nn.Module):
    """A model compiled once for any number of tokens; tells how long that took."""

    def __init__(self, model: CLIP, began: float):
        super().__init__()
        self.model, self.began = torch.compile(model), began

    def forward(self, image: Tensor, captions: Packed) -> Features:
        for tokens in (captions.ids, captions.positions, *(grid.places for grid in captions.grids)):
            torch._dynamo.maybe_mark_dynamic(tokens, 0)
        features = self.model(image, captions)
        if self.began:
            logger.info("compiled  in %.0f s", time.perf_counter() - self.began)
            self.began = 0.0
        return features


def is_compiled(forward: Forward) -> bool:
    """Whether it is a compiled model, or such a one for several ranks."""
    return isinstance(getattr(forward, "module", forward), Compiled)
