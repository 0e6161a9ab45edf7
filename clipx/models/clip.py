"""CLIP: an image and a text tower that share an embedding space, and a learnt temperature."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, PositiveFloat
from torch import Tensor, nn

from clipx.models.packed import Packed
from clipx.models.text import TextEncoder
from clipx.models.tower import ImageTower, TextTower, Tower
from clipx.models.vision import ImageEncoder

OUTSIDE_TOWERS = ("logit_scale", "logit_bias")  # parameters that belong to neither tower


def validate_range(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError("expected the lowest and the highest temperature, above 0")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(validate_range)]


class CLIP(nn.Module):
    """Contrastive image-text model.

    The state dict has OpenAI's keys: the image tower under ``visual.``, clipx's own text tower at the root.  Other text
    towers are under ``text.``, as in open_clip.

    Args:
        image: the image tower.
        text: the text tower, with the same ``embed``.
        temperature: of the logits, initial value.
        temperature_range: lowest and highest temperature; it is clamped after each step.
        learn_temperature: whether the temperature is trained.
        bias: initial value of a learnt bias of the logits, which the sigmoid loss needs; None for no bias.

    Sources: Radford et al. 2021, also for the range, section 2.5 (arXiv 2103.00020); the bias: Zhai et al. 2023 (arXiv
    2303.15343).
    """

    def __init__(
        self,
        image: ImageTower,
        text: TextTower,
        temperature: PositiveFloat = 0.07,
        temperature_range: Range = (0.01, 1.0),
        learn_temperature: bool = True,
        bias: float | None = None,
    ):
        super().__init__()
        lowest, highest = temperature_range
        if not lowest <= temperature <= highest:
            raise ValueError(f"temperature={temperature} is not in temperature_range=[{lowest}, {highest}]")
        if image.embed != text.embed:
            raise ValueError(
                f"text.embed={text.embed}: should be {image.embed} as image.embed; the towers share one space"
            )
        self.visual = image
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)), requires_grad=learn_temperature)
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.log_scale_range = math.log(1 / highest), math.log(1 / lowest)
        if isinstance(text, TextEncoder):
            self.register_state_dict_post_hook(text_to_root)
            self.register_load_state_dict_pre_hook(root_to_text)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(B, 3, S, S) normalised floats -> (B, E) in float32 or wider; unit vectors with ``normalize``."""
        return finish(self.visual(image), normalize)

    def encode_text(self, tokens: Tensor | Packed, normalize: bool = False) -> Tensor:
        """(B, L) token ids, L up to the context, or packed -> (B, E), as ``encode_image``."""
        return finish(self.text(tokens), normalize)

    def forward(self, image: Tensor, tokens: Tensor | Packed) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, S, S), (B, L) or packed -> unit image features (B, E), unit text features (B, E), scale ()."""
        return self.encode_image(image, True), self.encode_text(tokens, True), self.logit_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Clamp the temperature to its range; called after each optimiser step."""
        self.logit_scale.clamp_(*self.log_scale_range)

    def train(self, mode: bool = True) -> "CLIP":
        """Set the mode; a module none of whose parameters is trained stays in evaluation mode."""
        super().train(mode)
        if mode:
            for module in frozen_modules(self):
                module.eval()
        return self

    @property
    def towers(self) -> dict[Literal["image", "text"], Tower]:
        """Both towers, by their names in configs."""
        return {"image": self.visual, "text": self.text}

    def set_grad_checkpoint(self, on: bool | Literal["image", "text"]) -> None:
        """Recompute activations in the backward pass to save memory, in both towers or in one."""
        for name, tower in self.towers.items():
            tower.set_grad_checkpoint(on in (True, name))


def frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parameters none of which is trained."""
    for child in module.children():
        trained = [parameter.requires_grad for parameter in child.parameters()]
        if trained and not any(trained):
            yield child
        else:
            yield from frozen_modules(child)


def finish(features: Tensor, normalize: bool) -> Tensor:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(features, dim=-1) if normalize else features


def text_to_root(model: CLIP, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    """Drop ``text.`` from the keys of a state dict, in place, keeping the order."""
    for key in list(state):
        state[key.replace(f"{prefix}text.", prefix, 1) if key.startswith(f"{prefix}text.") else key] = state.pop(key)


def root_to_text(model: CLIP, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Put ``text.`` back before a state dict is loaded."""
    own = {f"{prefix}{name}" for name in model.text.state_dict()}
    for key in own & state.keys():
        state[f"{prefix}text.{key[len(prefix) :]}"] = state.pop(key)


def clip_vit_b32() -> CLIP:
    """CLIP ViT-B/32 with fresh weights: 151,277,313 parameters, 224 px, context 77, embedding 512."""
    return CLIP(ImageEncoder(), TextEncoder())


def clip_small() -> CLIP:
    """ViT-B/32 at half the width and depth, with fresh weights: 29,418,625 parameters, 224 px, embedding 256."""
    return CLIP(
        ImageEncoder(width=384, depth=6, heads=6, embed=256), TextEncoder(width=256, depth=6, heads=4, embed=256)
    )
