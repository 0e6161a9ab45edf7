"""Prompt templates by name, and the text classifier that they make."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipx.data.class_names import open_clip_metadata, read_names
from clipx.evals.features import EncodeTexts

NAMED = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
TEXTS = 8192        # prompts encoded at once


def read_templates(given: str | list[str]) -> list[str]:
    """Templates with ``{}`` (or ``{c}``) for the name of a class.

    Args:
        given: ``openai``, the 80 of the paper's ensemble; ``simple``, 7 of them that OpenAI picked one by one; a file,
            one a line; or templates.

    Raises:
        ValueError: there are none such, or one has no place for the name.
    """
    if isinstance(given, str) and given in NAMED:
        return [template("{}") for template in getattr(open_clip_metadata(), NAMED[given])]
    if isinstance(given, str) and "{" not in given:
        found = read_names(given, "templates")
    else:
        found = [given] if isinstance(given, str) else given
    found = [template.replace("{c}", "{}") for template in found]
    wrong = [template for template in found if "{}" not in template]
    if wrong or not found:
        raise ValueError(f"templates={given}: {wrong[:1]} has no {{}} where the name of the class goes; there are also "
                         f"{' and '.join(NAMED)}")
    return found


def classifier(encode_texts: EncodeTexts, classes: list[str], templates: list[str]) -> Tensor:
    """(C, E) unit vectors: of each class the mean of its prompts' unit features, normalised again.

    Source: Radford et al. 2021, section 3.1.4 (ensembling over the embedding space).
    """
    rows, tile = [], max(1, TEXTS // len(templates))
    for start in range(0, len(classes), tile):
        names = classes[start : start + tile]
        prompts = [template.replace("{}", name) for name in names for template in templates]
        rows.append(encode_texts(prompts).view(len(names), len(templates), -1).mean(dim=1))
    return F.normalize(torch.cat(rows), dim=-1)
