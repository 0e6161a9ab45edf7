"""What tests share: one thread, small real shards, and a way to call a command in this process."""

import csv
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.multiprocessing
from PIL import Image

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # two threads on a busy two-core machine wait for each other

FEW = (
    "experiment=smoke",
    "workers=0",
    "batch_size=16",
    "data.samples=40",
    "data.val_samples=20",
    "model.image.depth=1",
    "model.text.depth=1",
    "log_every=1",
    "eval_every=7",
    "save_every=null",
)


def once(*words: str) -> list[str]:
    """The words, of those with the same key the last alone: tests change what they share."""
    return list({word.partition("=")[0] if "=" in word else number: word for number, word in enumerate(words)}.values())


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
def serve() -> Iterator[Callable[[Path], str]]:
    """Serves a directory by HTTP; gives its URL."""
    servers = []

    def start(root: Path) -> str:
        handler = partial(SimpleHTTPRequestHandler, directory=str(root))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no pictures of their validation set, which takes half of a tiny run, but in tests marked for it."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr("clipx.training.logs.RunLog.pictures", lambda *_: None)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``python -m clipx.train ARGUMENTS`` in this process, from an empty directory."""
    return command("train", tmp_path, monkeypatch)


def command(name: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``python -m clipx.NAME ARGUMENTS`` in this process, from a directory."""
    main = importlib.import_module(f"clipx.{name}").main
    monkeypatch.chdir(cwd)

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"clipx.{name}", *once(*words)])
        main()

    return run


def train_in(cwd: Path, *words: str) -> Path:
    """A small run in a directory, for fixtures that outlive a test."""
    from clipx.train import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["clipx.train", *once(*FEW, *words, "name=x")])
        main()
    return cwd / "outputs/x"


@pytest.fixture
def fails(train: Callable[..., None]) -> Callable[..., str]:
    """The one line that a command ends with."""
    return partial(last_line, train)


def last_line(command: Callable[..., None], *words: str) -> str:
    """The one line that a command ends with, which exits."""
    with pytest.raises(SystemExit) as ended:
        command(*words)
    message = str(ended.value.code)
    assert "\n" not in message
    return message


def in_process(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python of its own, in another directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *once(*words)], cwd=cwd, env=environment, capture_output=True, text=True)


def run_ranks(function: Callable[..., None], world: int, *args: str) -> None:
    """Run ``function(rank, world, *args)`` in processes of their own; one that has imported torch forks them all."""
    multiprocessing.set_forkserver_preload(["clipx.training.run", function.__module__])
    torch.multiprocessing.start_processes(function, (world, *args), nprocs=world, start_method="forkserver")


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def assert_same_state(a: Path, b: Path) -> None:
    from clipx.weights import checkpoint

    one, two = (checkpoint.read(run / "checkpoints" / "clip_last.pt") for run in (a, b))
    for part in ("model_state_dict", "optimizer", "scaler", "step", "samples", "rng", "best", "skipped", "plan"):
        assert str(one[part]) == str(two[part]), part
    for name, tensor in one["model_state_dict"].items():
        assert torch.equal(tensor, two["model_state_dict"][name]), name
    for number, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(tensor, two["optimizer"]["state"][number][name]) for name, tensor in moments.items())


class Block(NamedTuple):
    """What stands between fences in a document."""

    mark: str  # of the comment right before it, without which it is run: "not run: needs COCO"
    file: str  # of the line before it, where it is what a file holds
    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    pattern = r"(?:<!-- (.*?) -->\n|`(\S+)`\n\n)?```(\w*)\n(.*?)```"
    return [Block(*found) for found in re.findall(pattern, document.read_text(encoding="utf-8"), re.DOTALL)]


def follow(document: Path, place: Path, languages: Collection[str] = ("bash", "python")) -> None:
    """Do what a document says, block by block, in a directory that has what its reader has."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(place), "OMP_NUM_THREADS": "1"}
    for block in blocks(document):
        if block.mark or not (block.file or block.language in languages):
            continue
        if block.file:
            (place / block.file).parent.mkdir(parents=True, exist_ok=True)
            (place / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(document), "exec"), {})
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.text]
            ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
            assert ended.returncode == 0, f"{block.text}\n{ended.stdout}\n{ended.stderr}"


@pytest.fixture
def reader(train: Callable[..., None], tmp_path: Path) -> Path:
    """A directory with what the documents say that their reader has, in small: pictures, a table, a run of the demo."""
    from clipx.data.dummy import Dummy

    shapes, (images, rows) = Dummy(400, 64, seed=0), (tmp_path / name for name in ("pictures/images", "rows"))
    images.mkdir(parents=True)
    rows.mkdir()
    table = []
    for number in range(400):
        sample = shapes.read(number)
        (images / f"{number:04d}.png").write_bytes(sample.picture)
        table.append({"image": f"images/{number:04d}.png", "caption": sample.captions[0]})
    lines = [f"{Path(row['image']).name}\t{row['caption']}\n" for row in table]
    (tmp_path / "pictures/captions.txt").write_text("".join(lines))
    with (tmp_path / "pictures/table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption"])
        writer.writeheader()
        writer.writerows(table)
    for name, part in (("train", table[:320]), ("val", table[320:])):
        entries = [json.dumps({"image": f"../pictures/{row['image']}", "text": row["caption"]}) for row in part]
        (rows / f"{name}.jsonl").write_text("\n".join(entries))
    for shape in ("circle", "square"):
        drawn = [row["image"] for row in table if shape in row["caption"]][:20]
        for number, image in enumerate(drawn):
            folder = tmp_path / ("labelled" if number % 2 else "known") / shape
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "pictures" / image, folder)
    (tmp_path / "experiments/demo").mkdir(parents=True)
    shutil.copy(ROOT / "experiments/demo/raccoon.png", tmp_path / "experiments/demo")
    shutil.copy(ROOT / "experiments/demo/raccoon.png", tmp_path / "photo.png")
    train(*FEW, "max_steps=1", "evals=[]", "name=x")
    (tmp_path / "outputs/x").rename(tmp_path / "outputs/experiment=demo")
    return tmp_path


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``python -m clipx.prepare ARGUMENTS`` in this process."""
    return partial(command("prepare", tmp_path, monkeypatch), "workers=0")


@pytest.fixture
def refused(prepare: Callable[..., None]) -> Callable[..., str]:
    """The one line that the command ends with."""
    return partial(last_line, prepare)


def until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not happened():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, int]]:
    """``python -m clipx.check ARGUMENTS`` in this process, from an empty directory: its output and exit code."""
    call = command("check", tmp_path, monkeypatch)

    def run(*words: str) -> tuple[str, int]:
        capsys.readouterr()
        code = 0
        try:
            call(*words)
        except SystemExit as ended:
            print(ended.code, file=sys.stderr)
            code = 1
        return capsys.readouterr().err, code

    return run


EARLY = (
    *FEW,
    "model.image.width=2",
    "model.image.heads=1",
    "model.text.width=2",
    "model.text.heads=1",
    "model.image.embed=2",
    "evals=[]",
    "max_steps=4",
    "eval_every=null",
    "name=early",
)


@pytest.fixture
def early(tmp_path: Path) -> Path:
    """A run of version 0.1.0, stopped at step 2 of 4."""
    with tarfile.open(ROOT / "tests/runs/0.1.0-early.tar.gz") as tar:
        tar.extractall(tmp_path / "outputs", filter="data")
    return tmp_path / "outputs/early"
