"""Unwrap the state dicts that other trainers save."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipx.weights.archive import CheckpointError

logger = logging.getLogger("clipx")

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")    # Lightning, tutorials, timm, DeepSpeed
AVERAGE_KEYS = ("ema_state_dict", "state_dict_ema", "model_ema", "ema")
WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")    # anywhere in a key
NOT_WEIGHTS = re.compile(r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask|position_ids|n_averaged)$")


def unwrap(content: Mapping[str, Any], source: object) -> dict[str, Tensor]:
    """Return the state dict in a file, without the prefixes of FSDP, DDP, torch.compile, Lightning and averages.

    Raises:
        CheckpointError: there is no state dict.
    """
    inner = find_state_dict(content, source)
    if not (inner and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in inner.items())):
        raise CheckpointError(f"{source} holds no state dict: expected names and tensors, or these under "
                              f"{', '.join((*STATE_KEYS, *AVERAGE_KEYS))}")
    state = {WRAPPERS.sub("", name): value for name, value in inner.items() if not NOT_WEIGHTS.search(name)}
    while all("." in name for name in state) and len({name.partition(".")[0] for name in state}) == 1:
        # module. of DDP, model. of Lightning
        state = {name.partition(".")[2]: value for name, value in state.items()}
    return state


def find_state_dict(content: Mapping[str, Any], source: object) -> Mapping[str, Any]:
    """Find the model's state dict in a checkpoint, or else that of its moving average."""
    found = next((key for key in (*STATE_KEYS, *AVERAGE_KEYS) if isinstance(content.get(key), Mapping)), None)
    if found in AVERAGE_KEYS:
        logger.info("%s has only a moving average of the weights, %s, which is used", source, found)
    return content[found] if found else content


def check_finite(state: Mapping[str, Tensor], source: object) -> None:
    """Refuse the weights of a run that diverged.

    Raises:
        CheckpointError: a tensor has NaN or infinite values.
    """
    for name, value in state.items():
        if wrong := value.numel() - int(torch.isfinite(value).sum()):
            raise CheckpointError(f"{source}: {wrong:,} of the {value.numel():,} values of {name} are NaN or infinite; "
                                  "use a checkpoint from before the training diverged")
