"""open_clip's byte-pair tokenizer."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

START, END = 49_406, 49_407
CACHE_SIZE = 16_384  # captions


class Tokens(NamedTuple):
    """B captions without padding."""

    ids: Tensor  # (T,) int64, caption after caption
    lengths: Tensor  # (B,) int64, tokens of each caption, including start and end


class Tokenizer(Protocol):
    """Captions to token ids; picklable, for the workers of the loader."""

    @property
    def context(self) -> int:
        """Maximum number of tokens, including start and end."""

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        """B captions -> (B, L) int64, padded after the last token; longer captions are cut."""

    def flat(self, captions: Sequence[str]) -> Tokens:
        """Like ``__call__``, without padding."""

    def count(self, caption: str) -> int:
        """Tokens of a caption before it is cut, including start and end."""


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
        return pad([self.encode(caption) for caption in captions], self.context, 0)

    def flat(self, captions: Sequence[str]) -> Tokens:
        """Like ``__call__``, without padding."""
        return flatten([self.encode(caption) for caption in captions])

    def count(self, caption: str) -> int:
        """Tokens of a caption before it is cut, including start and end."""
        return len(self.ids(caption)) + 2

    def encode(self, caption: str) -> list[int]:
        return [START, *self.ids(caption)[: self.context - 2], END]

    def __getstate__(self) -> dict[str, Any]:  # workers read the vocabulary again
        return {"context": self.context}


def pad(rows: Sequence[Sequence[int]], context: int, padding: int) -> Tensor:
    """Token ids of B captions -> (B, context) int64, with ``padding`` after the last token."""
    tokens = np.full((len(rows), context), padding, np.int64)
    for line, ids in zip(tokens, rows, strict=True):
        line[: len(ids)] = ids
    return torch.from_numpy(tokens)


def flatten(rows: Sequence[Sequence[int]]) -> Tokens:
    """Token ids of B captions, without padding."""
    ids, lengths = list(chain.from_iterable(rows)), [len(row) for row in rows]
    return Tokens(torch.tensor(ids, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64))


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
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
