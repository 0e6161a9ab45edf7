"""What tests share: one thread, small real shards, and a way to call a command in this process."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)        # two threads on a busy two-core machine wait for each other

FEW = ("experiment=smoke", "workers=0", "batch_size=16", "data.samples=40", "data.val_samples=20",
       "model.image.depth=1", "model.text.depth=1", "log_every=1", "eval_every=7", "save_every=null")


def picture(shade: int, kind: str = "png", size: tuple[int, int] = (40, 32)) -> bytes:
    """An encoded picture with a gradient, different for every shade."""
    file = io.BytesIO()
    image = Image.linear_gradient("L").resize(size)
    Image.merge("RGB", (image, image.rotate(180), Image.new("L", size, shade % 256))).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Writes shards of the given sizes below a directory; sample i of all has shade i and two captions."""

    def make(*sizes: int, folder: str = "shards") -> Path:
        number = 0
        for shard, size in enumerate(sizes):
            members = []
            for _ in range(size):
                words = json.dumps({"caption": [f"thing number {number}", f"the {number}th thing of all"]}).encode()
                members += [(f"{number:05d}.png", picture(number)), (f"{number:05d}.json", words)]
                number += 1
            write_tar(tmp_path / folder / f"part-{shard:03d}.tar", members)
        return tmp_path / folder

    return make


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``python -m clipx.train WORDS`` in this process, from an empty directory."""
    from clipx.train import main

    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["clipx.train", *words])
        main()

    return run


@pytest.fixture
def fails(train: Callable[..., None]) -> Callable[..., str]:
    """The one line that a command ends with."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            train(*words)
        message = str(ended.value.code)
        assert "\n" not in message
        return message

    return run


def in_process(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python of its own, in another directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def assert_same_state(a: Path, b: Path) -> None:
    from clipx import checkpoint

    one, two = (checkpoint.read(run / "checkpoints" / "clip_last.pt") for run in (a, b))
    for part in ("model_state_dict", "optimizer", "scaler", "step", "samples", "rng", "best", "skipped", "plan"):
        assert str(one[part]) == str(two[part]), part
    for name, tensor in one["model_state_dict"].items():
        assert torch.equal(tensor, two["model_state_dict"][name]), name
    for number, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(tensor, two["optimizer"]["state"][number][name]) for name, tensor in moments.items())
