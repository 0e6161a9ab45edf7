"""Every option of a group trains, and a run of it resumes to the bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FEW, ROOT, assert_same_state

Train = Callable[..., None]

GROUPS = ("augment", "optim", "sched")
WITH = {"optim=any": ("optim.optimizer=timm.optim.NAdamW", "optim.lr=1e-3", "+optim.betas=[0.9,0.95]")}


def options() -> list[str]:
    return sorted(f"{group}={path.stem}" for group in GROUPS for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("option", options())
def test_a_run_of_every_option_resumes_to_the_bit(option: str, train: Train, tmp_path: Path) -> None:
    args = (*FEW, "evals=[]", option, *WITH.get(option, ()), "max_steps=8", "sched.warmup_cap=0.25")
    train(*args, "name=straight")
    train(*args, "name=x", "stop_at=5")
    train(*args, "name=x")
    assert_same_state(tmp_path / "outputs/straight", tmp_path / "outputs/x")
