"""State dicts as trainers save them -> tensors by the model's own names."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipx.weights.archive import CheckpointError

logger = logging.getLogger("clipx")

HOLDERS = ("state_dict", "model_state_dict", "model", "module")    # Lightning, tutorials, timm, DeepSpeed
AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema")
INSIDE = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")    # anywhere in a name
NO_WEIGHTS = re.compile(r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask|position_ids|n_averaged)$")


def unwrapped(content: Mapping[str, Any], source: object) -> dict[str, Tensor]:
    """The weights in a file, without what FSDP, DDP, torch.compile, Lightning and averages put around their names.

    Raises:
        CheckpointError: it holds no state dict.
    """
    inner = held(content, source)
    if not (inner and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in inner.items())):
        raise CheckpointError(f"{source} holds no state dict: names and tensors, or these under "
                              f"{', '.join((*HOLDERS, *AVERAGES))}")
    state = {INSIDE.sub("", name): value for name, value in inner.items() if not NO_WEIGHTS.search(name)}
    while all("." in name for name in state) and len({name.partition(".")[0] for name in state}) == 1:
        # module. of DDP, model. of Lightning
        state = {name.partition(".")[2]: value for name, value in state.items()}
    return state


def held(content: Mapping[str, Any], source: object) -> Mapping[str, Any]:
    """The state dict of a checkpoint: the model's, or where there is none, that of its average."""
    found = next((key for key in (*HOLDERS, *AVERAGES) if isinstance(content.get(key), Mapping)), None)
    if found in AVERAGES:
        logger.info("%s has no weights but their moving average, %s, which is used", source, found)
    return content[found] if found else content


def check_finite(state: Mapping[str, Tensor], source: object) -> None:
    """Refuse the weights of a run that diverged.

    Raises:
        CheckpointError: a tensor, which is named, has NaN or infinite values.
    """
    for name, value in state.items():
        if wrong := value.numel() - int(torch.isfinite(value).sum()):
            raise CheckpointError(f"{source}: {wrong:,} of the {value.numel():,} values of {name} are NaN or infinite; "
                                  "use a checkpoint from before the training diverged")
