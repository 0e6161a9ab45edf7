"""The README's Python runs as it is written."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FEW, ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_python_of_the_readme_runs_as_written(number: int, train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "max_steps=1", "evals=[]", "name=x")
    (tmp_path / "outputs/x").rename(tmp_path / "outputs/experiment=demo")
    for place in ("experiments/demo", "pictures/raccoon", "pictures/horse"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(ROOT / "experiments/demo/raccoon.png", tmp_path / place)
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), {})
