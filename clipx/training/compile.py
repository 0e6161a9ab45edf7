"""Compile the model: faster steps, after a slow first one."""

import logging
import time

import torch
from torch import Tensor, nn

from clipx.models.packed import Packed
from clipx.training.step import Features, Forward

logger = logging.getLogger("clipx")


def compile_model(model: nn.Module) -> nn.Module:
    """Compile the model at its first call; return it unchanged, with a warning, if no compiler works."""
    start = time.perf_counter()
    try:
        torch.compile(torch.sin)(torch.ones(2, device=next(model.parameters()).device))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        cause = error.inner_exception
        reason = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        logger.warning(
            "compile=true: the model is not compiled (%s); a C++ compiler is needed, such as g++, and on a GPU triton",
            reason,
        )
        return model
    return CompiledModel(model, start)


class CompiledModel(nn.Module):
    """A model compiled once for any number of tokens; logs the compile time."""

    def __init__(self, model: nn.Module, start: float):
        super().__init__()
        self.model, self.start = torch.compile(model), start

    def forward(self, image: Tensor, captions: Packed | Tensor) -> Features:
        if isinstance(captions, Packed):
            for tokens in (captions.ids, captions.positions, *(grid.places for grid in captions.grids)):
                torch._dynamo.maybe_mark_dynamic(tokens, 0)
            for grid in captions.grids:
                torch._dynamo.maybe_mark_dynamic(grid.seen, 3)
        features = self.model(image, captions)
        if self.start:
            logger.info("compiled  in %.0f s", time.perf_counter() - self.start)
            self.start = 0.0
        return features


def is_compiled(forward: Forward) -> bool:
    """Whether the model is compiled, inside DistributedDataParallel or not."""
    return isinstance(getattr(forward, "module", forward), CompiledModel)
