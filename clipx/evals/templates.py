"""Prompt templates, and the zero-shot classifier built from them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipx.data.class_names import read_names
from clipx.evals.features import EncodeTexts
from clipx.tokenizer import open_clip_module

NAMED = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
MAX_PROMPTS = 8192      # encoded at once


def read_templates(given: str | list[str]) -> list[str]:
    """Return templates with ``{}`` where the class name goes.

    Args:
        given: ``openai``, the 80 of the paper's ensemble; ``simple``, the 7 that OpenAI found sufficient; a file with
            one a line; or the templates themselves, with ``{}`` or ``{c}``.

    Raises:
        ValueError: there are no templates, or one has no ``{}``.
    """
    if isinstance(given, str) and given in NAMED:
        return [template("{}") for template in getattr(open_clip_module("zero_shot_metadata"), NAMED[given])]
    if isinstance(given, str) and "{" not in given:
        found = read_names(given, "templates")
    else:
        found = [given] if isinstance(given, str) else given
    found = [template.replace("{c}", "{}") for template in found]
    wrong = [template for template in found if "{}" not in template]
    if wrong or not found:
        raise ValueError(f"templates={given}: {wrong[:1]} has no {{}} for the class name; named templates are "
                         f"{' and '.join(NAMED)}")
    return found


def classifier(encode_texts: EncodeTexts, classes: list[str], templates: list[str]) -> Tensor:
    """(C, E) unit vectors: the normalised mean of each class's prompt features.

    Source: Radford et al. 2021, section 3.1.4 (ensembling over the embedding space).
    """
    rows, tile = [], max(1, MAX_PROMPTS // len(templates))
    for start in range(0, len(classes), tile):
        names = classes[start : start + tile]
        prompts = [template.replace("{}", name) for name in names for template in templates]
        rows.append(encode_texts(prompts).view(len(names), len(templates), -1).mean(dim=1))
    return F.normalize(torch.cat(rows), dim=-1)
