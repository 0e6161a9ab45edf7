"""Frozen towers, and their last blocks that are trained all the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clipx.weights import checkpoint

RUN = (
    "data=dummy",
    "data.samples=16",
    "data.val_samples=0",
    "evals=[]",
    "batch_size=8",
    "workers=0",
    "device=cpu",
    "model.image.depth=3",
    "model.text.depth=1",
    "sched.warmup=0",
)


def weights(name: str) -> dict[str, torch.Tensor]:
    return checkpoint.read(Path(f"outputs/{name}/checkpoints/clip_last.pt"))["model_state_dict"]


def test_the_last_blocks_of_a_frozen_tower_are_trained(train: Callable[..., None]) -> None:
    train(*RUN, "max_steps=1", "name=start")
    train(*RUN, "max_steps=2", "name=tuned", "init_from=outputs/start", "freeze=[image]", "unlock.image=2")
    before, after = weights("start"), weights("tuned")
    moved = {name for name in before if name.startswith("visual.") and not torch.equal(before[name], after[name])}
    trained = ("visual.transformer.resblocks.1.", "visual.transformer.resblocks.2.", "visual.ln_post.", "visual.proj")
    assert moved == {name for name in before if name.startswith(trained)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unlock.image=2"], "unlock.image=2 has no effect on a tower that is trained; add freeze=[image]"),
        (
            ["freeze=[text]", "unlock.text=2"],
            "unlock.text=2: the tower has 1 blocks; give at most 1",
        ),
        (["freeze=[image]", "unlock.vision=2"], "unlock.vision: there is no such key; did you mean unlock.image?"),
        (["freeze=[image]", "unlock.image=-1"], "unlock.image=-1: should be greater than or equal to 0"),
    ],
)
def test_an_unlock_that_cannot_be_is_refused(fails: Callable[..., str], arguments: list[str], message: str) -> None:
    assert fails(*RUN, "max_steps=1", *arguments) == message
    assert not Path("outputs").exists()
