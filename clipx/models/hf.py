"""Text towers of transformers: any of its encoders, with its own tokenizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from clipx.errors import UserError, first_line
from clipx.models.packed import EDGES, Packed, pack
from clipx.models.tower import TextTower as Tower
from clipx.tokenizer import CACHE_SIZE, Tokens, flatten, open_clip_module, pad

GRADIENT = "gradient_checkpointing"  # what transformers called it before version 5


class TextTower(Tower):
    """An encoder of transformers, and a projection of its pooled features. Captions, packed or (B, L) ids -> (B, E).

    Names and shapes of the weights are those of open_clip's ``HFTextEncoder``.

    Args:
        name: of the model on the Hugging Face hub, or a directory with its config and tokenizer.
        embed: E, size of the feature.
        pretrained: initial weights of the encoder in a new run: a file, true for those of ``name``, or false for random
            ones.
        pool: the feature of a caption: its first token, the mean of its tokens, or its end token.
        proj: layers after the encoder; ``none`` if its features are the tower's.
        context: maximum tokens of a caption, including those that the tokenizer adds.

    Raises:
        ValueError: transformers has no such model, or an argument does not fit it.
    """

    transformer: Any
    tokenizer: "PretrainedTokenizer"

    def __init__(
        self,
        name: str,
        embed: PositiveInt = 512,
        pretrained: bool | str = False,
        pool: Literal["cls", "mean", "eos"] = "mean",
        proj: Literal["linear", "mlp", "none"] = "linear",
        context: PositiveInt = 77,
    ):
        super().__init__()
        self.name, self.pretrained, self.pool, self.proj_type, self.embed = name, pretrained, pool, proj, embed
        self.source = name
        self.tokenizer = PretrainedTokenizer(name, context)
        self.tokenizer.check_token_of(pool)
        self.transformer = self.create()
        self.width = self.transformer.config.hidden_size
        positions = getattr(self.transformer.config, "max_position_embeddings", context)
        if context > positions:
            raise ValueError(f"context={context}: {name} has {positions} positions; set at most that many")
        hidden = (self.width + embed) // 2
        if proj == "linear":
            self.proj: nn.Module = nn.Linear(self.width, embed, bias=False)
        elif proj == "mlp":
            layers = [nn.Linear(self.width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed, bias=False)]
            self.proj = nn.Sequential(*layers)
        elif self.width == embed:
            self.proj = nn.Identity()
        else:
            raise ValueError(f"embed={embed} is not {self.width}, the features of {name}; set it, or proj=linear")

    def create(self, pretrained: bool = False) -> Any:
        """The encoder of transformers, in float32."""
        from transformers import AutoConfig, AutoModel

        config = find(AutoConfig.from_pretrained, self.name)
        make = AutoModel.from_pretrained if pretrained else AutoModel.from_config
        given = self.name if pretrained else config
        try:
            model = make(given, add_pooling_layer=False)
        except TypeError:  # the model has no pooling layer
            model = make(given)
        return (model.encoder if config.is_encoder_decoder else model).float()

    def arguments(self) -> dict[str, Any]:
        return {
            "name": self.name, "embed": self.embed, "pool": self.pool, "proj": self.proj_type, "context": self.context,
        }  # fmt: skip

    def load_trunk(self, weights: Mapping[str, Tensor] | None) -> None:
        source = self.create(pretrained=True).state_dict() if weights is None else weights
        self.transformer.load_state_dict(source)

    def features(self, tokens: Tensor | Packed) -> Tensor:
        packed = tokens if isinstance(tokens, Packed) else pack(self.unpad(tokens))
        parts = zip(packed.split(packed.ids), packed.grids, strict=True)
        rows = torch.cat([self.encode(ids, grid.places, grid.seen[:, 0, 0]) for ids, grid in parts])  # (B, D)
        return rows.index_select(0, packed.order)

    def encode(self, ids: Tensor, places: Tensor, seen: Tensor) -> Tensor:
        """Ids of tokens (T,), their places in a grid, and where it has a token (G, L) -> pooled features (G, D)."""
        grid = ids.new_full((seen.numel(),), self.tokenizer.pad).index_copy(0, places, ids).view(seen.shape)
        x = self.transformer(input_ids=grid, attention_mask=seen.long()).last_hidden_state  # (G, L, D)
        if self.pool == "cls":
            return x[:, 0]
        lengths = seen.sum(dim=1)
        if self.pool == "eos":
            return x[torch.arange(len(x), device=x.device), lengths - 1]
        return (x * seen[..., None]).sum(dim=1) / lengths[:, None]

    def project(self, features: Tensor) -> Tensor:
        return self.proj(features)

    def unpad(self, tokens: Tensor) -> Tokens:
        seen = tokens != self.tokenizer.pad
        return Tokens(tokens[seen], seen.sum(dim=1))

    def grid_edges(self, device: torch.device, amp: torch.dtype | None, compiled: bool = False) -> Sequence[int]:
        return () if compiled else EDGES  # transformers' attention takes grids

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        return self.transformer.parameters()

    def stages(self) -> list[list[nn.Parameter]]:
        layers = next(module for module in self.transformer.modules() if type(module) is nn.ModuleList)  # not LoRA's
        blocks = [[*layer.parameters()] for layer in layers]
        inside = {*chain(*blocks)}
        everything = [*self.transformer.parameters()]
        first = next(number for number, parameter in enumerate(everything) if parameter in inside)
        after = [parameter for parameter in everything[first:] if parameter not in inside]
        return [everything[:first], *blocks, [*after, *self.proj.parameters()]]

    def set_grad_checkpoint(self, on: bool) -> None:
        modules = self.transformer.modules()
        if not on and not any(getattr(module, "gradient_checkpointing", False) for module in modules):
            return
        name = "activation_checkpointing" if hasattr(self.transformer, "activation_checkpointing_enable") else GRADIENT
        change = getattr(self.transformer, f"{name}_{'enable' if on else 'disable'}")
        try:
            change(*([{"use_reentrant": False}] if on else []))
        except ValueError as error:
            raise UserError(f"grad_checkpoint: {self.name} has no blocks to recompute") from error


class PretrainedTokenizer:
    """A tokenizer of transformers; text is cleaned as open_clip does.

    Args:
        name: of the model on the hub, or a directory.
        context: maximum number of tokens.

    Raises:
        ValueError: there is no such tokenizer, or it has no token for padding.
    """

    def __init__(self, name: str, context: int):
        from transformers import AutoTokenizer

        self.name, self.context = name, context
        self.tokenizer = find(AutoTokenizer.from_pretrained, name)
        self.pad = self.tokenizer.pad_token_id
        if self.pad is None:
            raise ValueError(f"name={name}: its tokenizer has no padding token, so captions cannot be batched")

    @cached_property
    def ids(self) -> Callable[[str], tuple[int, ...]]:
        """Caption -> its ids, with the tokens that the tokenizer adds, at most ``context``."""
        clean = open_clip_module("tokenizer").get_clean_fn("whitespace")
        return lru_cache(CACHE_SIZE)(
            lambda caption: tuple(self.tokenizer(clean(caption), truncation=True, max_length=self.context)["input_ids"])
        )

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        captions = [captions] if isinstance(captions, str) else captions
        return pad([self.ids(caption) for caption in captions], self.context, self.pad)

    def flat(self, captions: Sequence[str]) -> Tokens:
        """Like ``__call__``, without padding."""
        return flatten([self.ids(caption) for caption in captions])

    def count(self, caption: str) -> int:
        """Tokens of a caption before it is cut."""
        return len(self.tokenizer(caption, verbose=False)["input_ids"])

    def check_token_of(self, pool: str) -> None:
        """
        Raises:
            ValueError: captions have no token at which ``pool`` reads.
        """
        ids, special = self.tokenizer("a")["input_ids"], self.tokenizer
        if pool == "eos" and ids[-1] not in (special.eos_token_id, special.sep_token_id):
            raise ValueError(f"pool=eos: the tokenizer of {self.name} has no end token; use mean")
        if pool == "cls" and ids[0] not in (special.cls_token_id, special.bos_token_id):
            raise ValueError(f"pool=cls: the tokenizer of {self.name} has no token before a caption; use mean")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "ids"}  # a cache


def find(from_pretrained: Callable[[str], Any], name: str) -> Any:
    """Call a ``from_pretrained`` of transformers.

    Raises:
        ValueError: there is no such model, neither locally nor, as far as it can be reached, on the hub.
    """
    try:
        return from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"name={name}: transformers finds no config or tokenizer ({first_line(error)}); on another machine, "
            f"hf download {name} --local-dir DIR fetches them: copy DIR here and set model.text.name=DIR"
        ) from error
