"""Every option of a group, and every key that changes what a step computes, resumes to the bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FEW, ROOT, assert_same_state

Train = Callable[..., None]

GROUPS = ("augment", "loss", "optim", "sched")
WITH = {
    "optim=any": ("optim.optimizer=timm.optim.NAdamW", "optim.lr=1e-3", "+optim.betas=[0.9,0.95]"),
    "loss=distill": ("teacher=outputs/teacher", "model.image.embed=64"),  # not the teacher's, so it has projections
}
KEYS = (
    "clip_norm=1.0",
    "ema=0.9",
    "loss.same=positive loss.label_smoothing=0.1",
    "loss=sigmoid loss.same=mask",
    "model.learn_temperature=false",
    "model.temperature_range=[0.06,0.08] optim.lr=1e-2",
    "model.image.registers=2 model.image.layer_scale=0.1 model.text.layer_scale=0.1",
    "model=tiny_resnet model.image.widths=[8,16] model.image.depths=[1,1]",
    "freeze=[image] unlock.image=1 optim.layer_decay=0.5",
    "lora.rank=2",
    "views=2",
    "data.captions_per_picture=2",
    "data.captions_per_picture=2 loss=sigmoid loss.same=positive micro_batch_size=8",
    "data.caption=weighted data.caption_weights=[2,1] data.word_dropout=0.3",
    "data.caption=join",
    "patch_dropout=0.5 patch_dropout_until=6",
    "patch_dropout=0.5 patch_dropout_until=2ep model.image.registers=2 micro_batch_size=8 grad_checkpoint=true",
)


def options() -> list[str]:
    found = sorted(f"{group}={path.stem}" for group in GROUPS for path in (ROOT / "conf" / group).glob("*.yaml"))
    return [option for option in found if option != "augment=by_source"]  # needs data=mix


@pytest.mark.parametrize("option", [*options(), *KEYS])
def test_a_run_of_every_option_resumes_to_the_bit(option: str, train: Train, tmp_path: Path) -> None:
    few = [argument for argument in (*FEW, "evals=[]") if not (argument.startswith("model.") and "model=" in option)]
    if option == "loss=distill":
        train(*few, "max_steps=1", "name=teacher")
    args = (*few, *option.split(), *WITH.get(option, ()), "max_steps=8", "sched.warmup_cap=0.25")
    train(*args, "name=straight")
    train(*args, "name=x", "stop_at=5")
    train(*args, "name=x")
    assert_same_state(tmp_path / "outputs/straight", tmp_path / "outputs/x")
