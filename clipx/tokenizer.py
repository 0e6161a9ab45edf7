"""open_clip's byte-pair tokenizer."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

START, END = 49_406, 49_407
CACHE_SIZE = 16_384     # captions


class SimpleTokenizer:
    """Captions to token ids: ``tokenizer(["a cat"])`` -> (1, context) int64, padded with 0.

    49406 starts a caption, 49407 ends it; a caption longer than the context is cut and still ends with 49407.

    Args:
        context: maximum number of tokens, including start and end.
    """

    def __init__(self, context: int = 77):
        self.context = context

    @cached_property
    def ids(self) -> Callable[[str], tuple[int, ...]]:
        """Caption -> its ids, without start and end."""
        return lru_cache(CACHE_SIZE)(lambda caption: tuple(byte_pairs().encode(caption)))

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        captions = [captions] if isinstance(captions, str) else captions
        tokens = np.zeros((len(captions), self.context), np.int64)
        for row, caption in zip(tokens, captions, strict=True):
            ids = [START, *self.ids(caption)[: self.context - 2], END]
            row[: len(ids)] = ids
        return torch.from_numpy(tokens)

    def trimmed(self, captions: Sequence[str]) -> Tensor:
        """Like ``__call__``, but trimmed to the longest caption: (B, L)."""
        tokens = self(captions)
        return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]

    def __getstate__(self) -> dict[str, Any]:       # workers read the vocabulary again
        return {"context": self.context}


@cache
def byte_pairs() -> Any:
    """open_clip's encoder of text; reading its vocabulary takes 0.3 s, so all tokenizers share it."""
    encoder = open_clip_module("tokenizer").SimpleTokenizer()
    encoder.clean_fn = partial(clean, thorough=encoder.clean_fn)
    return encoder


def clean(caption: str, thorough: Callable[[str], str]) -> str:
    """Fix encoding errors, lower-case, collapse spaces; fast path for plain ASCII."""
    plain = caption.isascii() and caption.isprintable() and "&" not in caption
    return " ".join(caption.split()).lower() if plain else thorough(caption)


def open_clip_module(name: str) -> ModuleType:
    """Import one module of open_clip without its package, which takes six seconds."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ImportError("the tokenizer comes with open_clip; install it with: pip install open_clip_torch")
    file = Path(package.origin).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"clipx.open_clip_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
