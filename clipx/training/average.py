"""An exponential moving average of the weights, which is evaluated and exported in their place."""

from typing import Any

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clipx.models.clip import CLIP
from clipx.models.lora import adapter_state, load_adapter_state


class WeightAverage:
    """The moving average of a model's weights: average <- decay * average + (1 - decay) * weights.

    It starts as the weights after the first step.  A step without effect averages its unchanged weights once more, so
    that nothing waits for the device.  Without a decay the average is the model itself.

    Args:
        model: the bare model that is trained, the same on all ranks.
        decay: between 0 and 1, or None.

    Source: Kingma and Ba 2015, section 7.2 (arXiv 1412.6980), without the correction of the bias, as the average does
    not start at zero.
    """

    def __init__(self, model: CLIP, decay: float | None):
        self.trained = model
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay is not None else None

    @property
    def model(self) -> CLIP:
        """The averaged model; before the first step, the trained one."""
        if self.averaged is None or not self.averaged.n_averaged:  # a number on the CPU
            return self.trained
        assert isinstance(self.averaged.module, CLIP)
        return self.averaged.module

    def update(self) -> None:
        """Average once more, after a step of the optimiser."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.trained)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint adds for the average; nothing without one."""
        if self.averaged is None or self.model is self.trained:
            return {}
        adapters = adapter_state(self.model)
        thin = {name: tensor for name, tensor in adapters.items() if not name.endswith(".original")}  # others are equal
        return {
            "ema_state_dict": dict(self.model.state_dict()),
            "ema_lora_state_dict": thin,
            "ema_updates": int(self.averaged.n_averaged),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the average; a checkpoint without one starts it at the next step."""
        if self.averaged is not None and "ema_state_dict" in saved:
            self.averaged.module.load_state_dict(saved["ema_state_dict"])
            adapters = {**saved.get("lora_state_dict", {}), **saved["ema_lora_state_dict"]}
            load_adapter_state(self.averaged.module, adapters)
            self.averaged.n_averaged.fill_(saved["ema_updates"])
