"""Frozen towers that run once a view: the same bits as computing their features each time."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import assert_same_state, command, lines, merge_args, until

from clipx.data.images import TrainCrop
from clipx.data.readers import Chunk
from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.tokenizer import SimpleTokenizer
from clipx.training.frozen import FrozenTowers, fixed_places
from clipx.weights.checkpoint import read

SAMPLES, STEPS = 24, 15  # five epochs of three steps
RUN = (
    "data=dummy", f"data.samples={SAMPLES}", "data.val_samples=0", "evals=[]", "batch_size=8", "workers=0",
    "device=cpu", "model.image.depth=2", "model.image.width=32", "model.image.heads=1", "model.image.embed=16",
    "model.text.depth=1", "model.text.width=16", "model.text.heads=1", "sched.warmup=0", f"max_steps={STEPS}",
    "log_every=1", "save_every=null", "views=2", "freeze=[image]",
)  # fmt: skip
CACHED, UNCACHED = "feature_cache=cache", "feature_cache=null"
Train = Callable[..., None]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def losses(name: str) -> list[float]:
    return [line["train/loss"] for line in lines(Path(f"outputs/{name}")) if "train/loss" in line]


def captions_of(count: int) -> list[str]:
    return [f"a picture of {'thing ' * (row % 5)}{row}" for row in range(count)]


def chunk_of(images: torch.Tensor, captions: list[str], rows: list[int]) -> Chunk:
    return Chunk(
        images=images, tokens=SimpleTokenizer().flat(captions), captions=captions, owners=torch.arange(len(rows)),
        position=0, samples=torch.tensor(rows), ids=None, rows=dict.fromkeys(["image", "text"], torch.tensor(rows)),
    )  # fmt: skip


@pytest.mark.parametrize(("amp", "width", "heads"), [(None, 96, 3), (torch.bfloat16, 64, 1)])
def test_features_do_not_depend_on_what_else_is_in_a_batch(
    threads: None, amp: torch.dtype | None, width: int, heads: int
) -> None:
    torch.manual_seed(0)
    model = CLIP(
        ImageEncoder(48, 16, width, 1, heads, 32), TextEncoder(width=width, depth=1, heads=heads, embed=32)
    ).requires_grad_(False)
    towers = FrozenTowers(model, ["image", "text"], amp)
    images, captions = torch.randint(0, 256, (12, 3, 48, 48), dtype=torch.uint8), captions_of(12)

    def features(rows: list[int]) -> list[torch.Tensor]:
        chunk = chunk_of(images[rows], [captions[row] for row in rows], rows)
        return [*towers([chunk])[0].features.values()]

    whole = features(list(range(12)))
    for rows in ([3], [11, 7, 9], torch.randperm(12).tolist()):
        assert all(torch.equal(one[rows], part) for one, part in zip(whole, features(rows), strict=True))
    reference = model.visual.features(towers.normalise(images)).half()
    assert torch.allclose(whole[0], reference, atol=0.05 if amp else 2e-3)
    with torch.no_grad():
        texts = model.text.features(SimpleTokenizer()(captions)).half()
    assert torch.allclose(whole[1], texts, atol=0.05 if amp else 2e-3)


def test_the_place_of_a_row_in_a_batch_depends_on_the_row_alone() -> None:
    rows = torch.tensor([9, 5, 2, 13, 6, 4])
    assert fixed_places(rows, 4).tolist() == [1, 5, 2, 9, 6, 0]


@pytest.mark.parametrize("frozen", ["image", "text", "image,text"])
def test_stored_features_give_the_bits_of_computed_ones(train: Train, frozen: str) -> None:
    for name, cache in (("cached", CACHED), ("again", CACHED), ("plain", UNCACHED)):
        train(*RUN, f"freeze=[{frozen}]", cache, f"name={name}")
    assert losses("cached") == losses("plain") == losses("again") and len(losses("plain")) == STEPS
    assert_same_state(Path("outputs/cached"), Path("outputs/plain"))
    assert len([*Path("cache").iterdir()]) == len(frozen.split(",")) + 1  # and the lock


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_a_trunk_of_timm_gives_the_same_bits_stored_or_computed(train: Train, name: str) -> None:
    tower = [f"model.image.name={name}", "model.image.pretrained=false", "model.image.embed=16", "model.image.drop=0.1"]
    run = ["model=timm_b16", *(arg for arg in RUN if not arg.startswith("model.image.")), *tower]
    train(*run, CACHED, "name=stored")
    train(*run, UNCACHED, "name=computed")
    assert losses("stored") == losses("computed") and len(losses("stored")) == STEPS


def test_features_of_other_augmentations_are_stored_apart(train: Train) -> None:
    for name, option in (("plain", "none"), ("strong", "strong"), ("flip", "flip")):
        train(*RUN, f"augment={option}", CACHED, f"name={name}")
        train(*RUN, f"augment={option}", UNCACHED, f"name={name}-computed")
        assert losses(name) == losses(f"{name}-computed")
    assert len({tuple(losses(name)) for name in ("plain", "strong", "flip")}) == 3
    assert len([*Path("cache").glob("image-*")]) == 3


def test_later_passes_and_later_runs_neither_decode_nor_run_the_tower(train: Train, monkeypatch) -> None:
    decoded, ran = [], []
    crop, features = TrainCrop.__call__, ImageEncoder.features
    monkeypatch.setattr(TrainCrop, "__call__", lambda *args: decoded.append(1) or crop(*args))
    monkeypatch.setattr(ImageEncoder, "features", lambda self, x: ran.append(len(x)) or features(self, x))
    train(*RUN, CACHED, "name=one")
    assert len(decoded) == 2 * SAMPLES  # two views
    decoded.clear(), ran.clear()
    train(*RUN, CACHED, "optim.lr=1e-5", "name=two")  # another learning rate, the same features
    assert not decoded and ran == [1]  # to see whether it is frozen


@pytest.mark.parametrize("step", [2, 8, 6])  # in the first pass, in the third, between passes
def test_a_run_that_is_stopped_resumes_bit_for_bit(train: Train, step: int) -> None:
    train(*RUN, UNCACHED, "name=whole")
    train(*RUN, CACHED, "name=parts", f"stop_at={step}")
    train(*RUN, CACHED, "name=parts")
    assert losses("parts") == losses("whole")
    assert_same_state(Path("outputs/parts"), Path("outputs/whole"))


def start(cwd: Path, ranks: int, *args: str) -> subprocess.Popen[str]:
    """The train command in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "clipx.train", *merge_args(*RUN, *args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def logged(cwd: Path) -> int:
    file = cwd / "outputs/x/metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize("step", [1, pytest.param(7, marks=pytest.mark.long), pytest.param(6, marks=pytest.mark.long)])
def test_a_run_that_is_killed_resumes_bit_for_bit(train: Train, tmp_path: Path, step: int) -> None:
    train(*RUN, UNCACHED, "name=whole")
    process = start(tmp_path, 1, CACHED, "name=x", "save_every=2", "workers=1")
    until(lambda: logged(tmp_path) > step, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    train(*RUN, CACHED, "name=x", "save_every=2", "workers=1")
    assert losses("x") == losses("whole")
    assert_same_state(Path("outputs/x"), Path("outputs/whole"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.long)])
def test_workers_do_not_change_the_bits(train: Train, workers: int) -> None:
    train(*RUN, UNCACHED, "name=one")
    train(*RUN, CACHED, f"workers={workers}", "name=two")
    assert losses("one") == losses("two")
    assert_same_state(Path("outputs/one"), Path("outputs/two"))


@pytest.mark.long
def test_ranks_share_the_features(train: Train, tmp_path: Path) -> None:
    for cache, name in ((CACHED, "name=x"), (UNCACHED, "name=plain")):
        process = start(tmp_path, 2, cache, name)
        _, output = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert losses("x") == losses("plain")
    assert_same_state(Path("outputs/x"), Path("outputs/plain"))
    log = (tmp_path / "outputs/x/train.log").read_text()
    train(*RUN, CACHED, "name=alone")
    assert "0 of 48 are there already" in log
    assert "48 of 48 are there already" in Path("outputs/alone/train.log").read_text()


TOWER = """
import torch
from torch import nn
from clipx.models.tower import ImageTower
from clipx.preprocessing import Preprocessing

class Noisy(ImageTower):
    def __init__(self, embed: int = 16, size: int = 32):
        super().__init__()
        self.width, self.embed, self.preprocessing = 12, embed, Preprocessing(size)
        self.trunk = nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.BatchNorm2d(12), nn.Dropout(0.5))
        self.head = nn.Linear(12, embed)

    def features(self, image):
        return self.trunk(image).mean(dim=(2, 3))

    def project(self, features):
        return self.head(features)
"""


MODEL = """
_target_: clipx.models.clip.CLIP
image: {_target_: noisy_towers.Noisy, embed: 16}
text: {_target_: clipx.models.text.TextEncoder, width: 16, depth: 1, heads: 1, embed: 16}
"""


@pytest.mark.parametrize("views", ["2", "null"])
def test_batch_norm_and_dropout_of_a_frozen_tower_are_still(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: str
) -> None:
    (tmp_path / "noisy_towers.py").write_text(TOWER)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/noisy.yaml").write_text(MODEL)
    run = [arg for arg in RUN if not arg.startswith("model.")]
    run += ["--config-dir=conf", "model=noisy", "trust=[noisy_towers]", f"views={views}"]
    train(*run, CACHED, "name=one")
    train(*run, UNCACHED, "name=two")
    weights = read(Path("outputs/one/checkpoints/clip_last.pt"))["model_state_dict"]
    assert weights["visual.trunk.1.num_batches_tracked"] == 0 and not weights["visual.trunk.1.running_mean"].any()
    assert losses("one") == losses("two")


def test_the_log_says_where_features_are_and_why_they_are_not(train: Train) -> None:
    for name, args, message in (
        ("a", [], f"features  of the image tower in {Path('cache').name}/image-"),
        ("b", ["views=6"], "features  are not stored: views=6 is more than the 5 epochs, so no view returns"),
        ("c", ["unlock.image=1"], "features  are not stored: no tower is frozen up to its projection"),
        ("d", ["views=null"], "features  are not stored: views=null draws new crops each epoch"),
    ):
        train(*RUN, CACHED, *args, f"name={name}")
        assert message in Path(f"outputs/{name}/train.log").read_text()
    train(*RUN, "freeze=[]", "feature_cache=auto", "name=e")
    assert "features  " not in Path("outputs/e/train.log").read_text()


def test_check_tells_what_the_features_need(check: Callable[..., tuple[str, int]], train: Train) -> None:
    output, code = check(*RUN, CACHED)
    assert code == 0 and "7.36kB for the features of the image tower in cache" in output
    train(*RUN, CACHED, "name=x")
    output, code = check(*RUN, CACHED, "name=y")
    assert code == 0 and "holds 48 of 48 features of the image tower" in output
    file = next(Path("cache").glob("image-*"))
    os.truncate(file, 100)
    output, code = check(*RUN, CACHED, "name=y")
    assert code == 1 and f"{file} is damaged: it has 100 bytes instead of 7,360; delete it" in output


def test_damaged_features_end_the_run_with_one_line(fails: Callable[..., str], train: Train) -> None:
    train(*RUN, CACHED, "name=x")
    file = next(Path("cache").glob("image-*"))
    os.truncate(file, 100)
    message = fails(*RUN, CACHED, "name=y")
    assert message.startswith(f"{file} is damaged") and message.endswith(
        "delete it, and the features will be computed again"
    )


def test_bench_measures_a_run_with_frozen_towers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = command("bench", tmp_path, monkeypatch)
    bench(*RUN, "workers=1", "rounds=1", "steps=2", "parts=[step]", "json=found.json")
    shares = json.loads((tmp_path / "found.json").read_text())["step"]["shares"]
    assert shares["frozen towers"] > 0 and sum(shares.values()) == pytest.approx(1)
    assert "features  computed in each step, as in the first 2 epochs of the run" in capsys.readouterr().err
