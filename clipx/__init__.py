"""Train CLIP on your own image-text pairs.

The names below are imported on first use, so that ``import clipx`` is fast.
"""

import importlib
from typing import Any

HOMES = {
    "CLIP": "clipx.models.clip",
    "clip_vit_b32": "clipx.models.clip",
    "clip_small": "clipx.models.clip",
    "load": "clipx.weights.load",
    "SimpleTokenizer": "clipx.tokenizer",
    "get_image_transform": "clipx.data.images",
    "zero_shot_eval": "clipx.evals.zero_shot",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return globals().setdefault(name, importlib.import_module("importlib.metadata").version("clipx"))
    if name not in HOMES:
        raise AttributeError(f"module 'clipx' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES, "__version__"]
