"""Image towers of timm: any of its models, by name."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import timm
from pydantic import Field, PositiveInt
from timm.data import resolve_data_config
from timm.layers import Mlp
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipx.errors import UserError
from clipx.models.tower import ImageTower
from clipx.preprocessing import Channels, Interpolation, Preprocessing

Share = Annotated[float, Field(ge=0, lt=1)]


class TimmTower(ImageTower):
    """A trunk of timm, and a projection of its pooled features. (B, 3, S, S) -> (B, E).

    Names and shapes of the weights are those of open_clip's ``TimmModel``.  BatchNorm keeps its running statistics, as
    those of a batch would depend on micro-batches and ranks.

    Args:
        name: timm's name of the model, with or without the tag of its weights.
        embed: E, size of the feature.
        pretrained: initial weights of the trunk in a new run: a file of timm's, true for those that timm downloads, or
            false for random ones.
        size: side of the picture S, pixels; None for that of timm's weights.
        pool: how the trunk pools: ``avg``, ``token``, ``map``, ...; None as timm does.
        proj: layers after the trunk; ``none`` if its features are the tower's.
        drop: dropout before the projection.
        drop_path: rate of stochastic depth in the trunk.
        mean: of the pixels in [0, 1], by channel; None for that of timm's weights, as the next two.
        std: standard deviation of the pixels.
        interpolation: filter that resizes the pictures.

    Raises:
        ValueError: timm has no such model, or an argument does not fit it.
    """

    trunk: Any  # timm's models have methods that nn.Module lacks

    def __init__(
        self,
        name: str,
        embed: PositiveInt = 512,
        pretrained: bool | str = False,
        size: PositiveInt | None = None,
        pool: str | None = None,
        proj: Literal["linear", "mlp", "none"] = "linear",
        drop: Share = 0.0,
        drop_path: Share | None = None,
        mean: Channels | None = None,
        std: Channels | None = None,
        interpolation: Interpolation | None = None,
    ):
        super().__init__()
        self.name, self.pretrained, self.pool = name, pretrained, pool
        self.drop_path, self.proj, self.drop = drop_path, proj, drop
        self.preprocessing = Preprocessing(224)
        trunk = self.create()
        self.source = trunk.pretrained_cfg.get("hf_hub_id") or trunk.pretrained_cfg.get("url") or "timm"
        own = resolve_data_config(model=trunk)
        self.preprocessing = Preprocessing.of(
            size or own["input_size"][-1], mean or own["mean"], std or own["std"], interpolation or own["interpolation"]
        )
        self.trunk = self.fit(trunk)
        self.width, self.embed = self.trunk.num_features, embed
        self.head = nn.Sequential()
        if proj == "linear":
            self.head.add_module("drop", nn.Dropout(drop))
            self.head.add_module("proj", nn.Linear(self.width, embed, bias=False))
        elif proj == "mlp":
            self.head.add_module("mlp", Mlp(self.width, 2 * embed, embed, drop=(drop, 0), bias=(True, False)))
        elif self.width != embed:
            raise ValueError(f"embed={embed} is not {self.width}, the features of {name}; set it, or proj=linear")

    def create(self, pretrained: bool = False) -> Any:
        """The model of timm, with its classifier."""
        architecture = self.name.partition(".")[0]
        if not timm.is_model(architecture):
            near = difflib.get_close_matches(architecture, timm.list_models(), n=1)
            hint = f"did you mean {near[0]}?" if near else "timm.list_models() names them"
            raise ValueError(f"name={self.name}: timm has no such model; {hint}")
        given: dict[str, Any] = {} if self.drop_path is None else {"drop_path_rate": self.drop_path}
        try:
            return timm.create_model(self.name, pretrained=pretrained, **given)
        except (RuntimeError, TypeError) as error:  # an unknown tag, or a rate that it does not have
            raise ValueError(f"name={self.name}: {error}") from error

    def fit(self, trunk: Any) -> Any:
        """Remove the classifier, pool, and resize."""
        try:
            trunk.reset_classifier(0, **({"global_pool": self.pool} if self.pool else {}))
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"pool={self.pool}: {self.name} cannot pool so; leave it out for timm's own") from error
        if self.size != trunk.default_cfg["input_size"][-1] and hasattr(trunk, "set_input_size"):
            patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
            if isinstance(patch, tuple) and self.size % patch[0]:
                raise ValueError(f"size={self.size}: should be a multiple of {patch[0]}, the patches of {self.name}")
            trunk.set_input_size(img_size=self.size)  # resamples the position embeddings
        return trunk

    def arguments(self) -> dict[str, Any]:
        size, mean, std, interpolation = self.preprocessing
        return {
            "name": self.name, "embed": self.embed, "size": size, "pool": self.pool, "proj": self.proj,
            "drop": self.drop, "drop_path": self.drop_path, "mean": [*mean], "std": [*std],
            "interpolation": interpolation,
        }  # fmt: skip

    def load_trunk(self, weights: Mapping[str, Tensor] | None) -> None:
        """Load the trunk's weights: those given, or, without any, those that timm downloads.

        Raises:
            ValueError: they are not those of this model.
            OSError: they cannot be downloaded.
        """
        trunk = self.create(pretrained=weights is None)
        if weights is not None:
            found = trunk.load_state_dict(weights, strict=False)
            unused = {*trunk.state_dict()} - {*self.trunk.state_dict()}  # its classifier
            for what, names in (("no", {*found.missing_keys} - unused), ("another", {*found.unexpected_keys})):
                if names:
                    raise ValueError(f"they have {what} {min(names)}; expected weights of timm's {self.name}")
        self.trunk.load_state_dict(self.fit(trunk).state_dict())

    def features(self, image: Tensor) -> Tensor:
        return self.trunk(image)

    def project(self, features: Tensor) -> Tensor:
        return self.head(features)

    def train(self, mode: bool = True) -> "TimmTower":
        super().train(mode)
        for module in self.trunk.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        return self.trunk.parameters()

    def stages(self) -> list[list[nn.Parameter]]:
        groups = group_parameters(self.trunk, self.trunk.group_matcher())
        stages = [[self.trunk.get_parameter(name) for name in groups[number]] for number in sorted(groups)]
        norms = stages.pop() if all(parameter.ndim < 2 for parameter in stages[-1]) else []  # after the last block
        return [*stages, [*norms, *self.head.parameters()]]

    def set_grad_checkpoint(self, on: bool) -> None:
        if on or hasattr(self.trunk, "set_grad_checkpointing"):
            try:
                self.trunk.set_grad_checkpointing(on)
            except (AttributeError, AssertionError) as error:
                raise UserError(f"grad_checkpoint: timm's {self.name} has no blocks to recompute") from error
