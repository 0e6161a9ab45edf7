"""Runs on several, joined or shortened captions of a picture."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_state, lines
from torch import Tensor

from clipx.data.dummy import open_dummy
from clipx.data.sample import Data
from clipx.errors import UserError
from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.training import frozen
from clipx.training.step import Features, call_loss

Train = Callable[..., None]
RUN = (
    "data=shards", "data.root=shards", "data.val=0", "evals=[]", "batch_size=8", "workers=0", "device=cpu",
    "model.image.size=32", "model.image.patch=16", "model.image.depth=1", "model.image.width=32",
    "model.image.heads=1", "model.image.embed=16", "model.text.depth=1", "model.text.width=16", "model.text.heads=1",
    "sched.warmup=0", "max_steps=6", "log_every=1", "save_every=null",
)  # fmt: skip
WAYS = {
    "two": ["data.captions_per_picture=2", "data.word_dropout=0.3", "loss.same=positive"],
    "join": ["data.caption=join", "data.word_dropout=0.1"],
    "weighted": ["data.caption=weighted", "data.caption_weights=[3,1]"],
}


def losses(name: str) -> list[float]:
    return [line["train/loss"] for line in lines(Path(f"outputs/{name}")) if "train/loss" in line]


@pytest.fixture(autouse=True)
def shards(make_shards: Callable[..., Path]) -> None:
    make_shards(9, 4, 14)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_stopped_resumes_bit_for_bit(train: Train, way: str) -> None:
    train(*RUN, *WAYS[way], "micro_batch_size=3", "name=whole")
    train(*RUN, *WAYS[way], "micro_batch_size=3", "name=parts", "stop_at=4")
    train(*RUN, *WAYS[way], "micro_batch_size=3", "name=parts")
    assert losses("parts") == losses("whole") and len(losses("whole")) == 6
    assert_same_state(Path("outputs/parts"), Path("outputs/whole"))


def test_micro_batches_of_several_captions_are_the_same_run(train: Train) -> None:
    for name, size in (("whole", "null"), ("micro", "3")):
        train(*RUN, *WAYS["two"], f"micro_batch_size={size}", f"name={name}")
    assert losses("micro") == pytest.approx(losses("whole"), rel=1e-4)


def test_a_frozen_image_tower_goes_with_several_captions(train: Train) -> None:
    run = (*RUN, *WAYS["two"], "views=2", "freeze=[image]")
    for name, cache in (("stored", "cache"), ("computed", "null")):
        train(*run, f"feature_cache={cache}", f"name={name}")
    assert losses("stored") == losses("computed") and len(losses("stored")) == 6


@pytest.mark.parametrize("way", ["join", "weighted"])
def test_a_frozen_text_tower_is_stored_for_each_way(train: Train, way: str) -> None:
    run = (*RUN, "views=2", "freeze=[text]", "max_steps=12")
    for name, ways in (("plain", []), (way, WAYS[way])):
        train(*run, *ways, "feature_cache=cache", f"name={name}")
        train(*run, *ways, "feature_cache=null", f"name={name}-computed")
        assert losses(name) == losses(f"{name}-computed")
    assert len([*Path("cache").glob("text-*")]) == 2


def test_a_frozen_text_tower_with_views_takes_one_caption(fails: Callable[..., str]) -> None:
    message = fails(*RUN, *WAYS["two"], "views=2", "freeze=[text]", "name=x")
    assert message.startswith("data.captions_per_picture=2 does not go with views=2 and freeze=[text]")


@pytest.mark.parametrize(
    "changes", [{"word_dropout": 0.1}, {"caption": "join"}, {"caption": "weighted", "caption_weights": [2, 1]}]
)
def test_what_changes_a_frozen_text_towers_features_is_part_of_their_key(
    changes: dict[str, object],
) -> None:
    keys = [key_of(data) for data in (open_dummy(8, 0), replace(open_dummy(8, 0), **changes))]
    assert keys[0] != keys[1]


def key_of(data: Data) -> str:
    torch.manual_seed(0)
    clip = CLIP(
        ImageEncoder(size=32, patch=16, width=16, depth=1, heads=1, embed=8),
        TextEncoder(width=16, depth=1, heads=1, embed=8),
    )
    config = SimpleNamespace(seed=0, views=2, amp="none", matmul_precision="highest")
    return frozen.features_key(config, data, clip, "text", torch.device("cpu"), {})


def pairwise(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None) -> Tensor:
    """A loss of one text for each image."""
    return (image - text).square().sum() * scale


def test_a_loss_that_takes_one_caption_is_told_from_a_broken_one() -> None:
    one, two = (Features(torch.ones(4, 8), torch.ones(4 * k, 8), torch.ones(())) for k in (1, 2))
    assert call_loss(pairwise, None, None, one) == 0
    with pytest.raises(UserError, match=r"features of 4 pictures and 8 captions: .* set data.captions_per_picture=1"):
        call_loss(pairwise, None, None, two)
    with pytest.raises(RuntimeError, match="size of tensor"):
        call_loss(pairwise, None, None, one._replace(text=torch.ones(4, 7)))
