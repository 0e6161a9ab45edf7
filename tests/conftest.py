"""Shared fixtures and helpers: small real shards, and commands that run in the test process."""

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

torch.set_num_threads(1)  # several threads slow each other down on a busy machine with few cores

FEW = (
    "experiment=smoke",
    "workers=0",
    "batch_size=16",
    "data.samples=40",
    "data.val_samples=20",
    "model.image.depth=1",
    "model.text.depth=1",
    "model.text.width=32",
    "model.text.heads=1",
    "log_every=1",
    "eval_every=7",
    "save_every=null",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``cuda`` where there is no CUDA device."""
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def merge_args(*args: str) -> list[str]:
    """Keep only the last argument for each key, so that tests can override shared arguments."""
    return list({arg.partition("=")[0] if "=" in arg else number: arg for number, arg in enumerate(args)}.values())


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
    """Writes shards of the given sizes; sample i, counted over all shards, has shade i and two captions."""

    def make(*sizes: int, folder: str = "shards") -> Path:
        number = 0
        for shard, size in enumerate(sizes):
            members = []
            for _ in range(size):
                captions = json.dumps({"caption": [f"thing number {number}", f"the {number}th thing of all"]}).encode()
                members += [(f"{number:05d}.png", picture(number)), (f"{number:05d}.json", captions)]
                number += 1
            write_tar(tmp_path / folder / f"part-{shard:03d}.tar", members)
        return tmp_path / folder

    return make


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """Serves a directory over HTTP and returns its URL."""
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
    """Skip the figures of the validation set, which take half the time of a tiny run, except in tests marked for it."""
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

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"clipx.{name}", *merge_args(*args)])
        main()

    return run


def train_in(cwd: Path, *args: str) -> Path:
    """Train a small run in a directory, for fixtures of wider scope than a test."""
    from clipx.train import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["clipx.train", *merge_args(*FEW, *args, "name=x")])
        main()
    return cwd / "outputs/x"


@pytest.fixture
def fails(train: Callable[..., None]) -> Callable[..., str]:
    """Runs a train command that must fail, and returns its one-line error message."""
    return partial(last_line, train)


def last_line(command: Callable[..., None], *args: str) -> str:
    """The one-line error message that a command exits with."""
    with pytest.raises(SystemExit) as raised:
        command(*args)
    message = str(raised.value.code)
    assert "\n" not in message
    return message


def run_python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a subprocess, in another directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *merge_args(*args)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def run_ranks(function: Callable[..., None], world: int, *args: str) -> None:
    """Run ``function(rank, world, *args)`` in ``world`` processes, forked from a server that has imported torch."""
    multiprocessing.set_forkserver_preload(["clipx.training.run", function.__module__])
    torch.multiprocessing.start_processes(function, (world, *args), nprocs=world, start_method="forkserver")


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def assert_same_state(a: Path, b: Path) -> None:
    """The last checkpoints are equal; the best one may differ if a stop has brought another evaluation."""
    from clipx.weights import checkpoint

    one, two = (checkpoint.read(run / "checkpoints" / "clip_last.pt") for run in (a, b))
    parts = ["model_state_dict", "optimizer", "scaler", "step", "samples", "rng", "skipped", "plan"]
    for part in [*parts, "best"] if evaluated_steps(a) == evaluated_steps(b) else parts:
        assert str(one[part]) == str(two[part]), part
    assert one.keys() == two.keys()
    for part in one.keys() & {"model_state_dict", "lora_state_dict", "ema_state_dict", "ema_lora_state_dict"}:
        for name, tensor in one[part].items():
            assert torch.equal(tensor, two[part][name]), (part, name)
    for number, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(tensor, two["optimizer"]["state"][number][name]) for name, tensor in moments.items())


def evaluated_steps(run: Path) -> list[int]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if any(name.startswith("val/") for name in row)]


class Block(NamedTuple):
    """A fenced block of a document."""

    mark: str  # text of the comment right before it, such as "not run: needs COCO"; empty if the block is run
    file: str  # name on the line before it, if the block is the content of a file
    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    pattern = r"(?:<!-- (.*?) -->\n|`(\S+)`\n\n)?```(\w*)\n(.*?)```"
    return [Block(*match) for match in re.findall(pattern, document.read_text(encoding="utf-8"), re.DOTALL)]


def follow(document: Path, directory: Path, languages: Collection[str] = ("bash", "python")) -> None:
    """Run the blocks of a document in order, in a directory with the files that it mentions."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(directory), "OMP_NUM_THREADS": "1"}
    for block in blocks(document):
        if block.mark or not (block.file or block.language in languages):
            continue
        if block.file:
            (directory / block.file).parent.mkdir(parents=True, exist_ok=True)
            (directory / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(document), "exec"), {})
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.text]
            result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, f"{block.text}\n{result.stdout}\n{result.stderr}"


@pytest.fixture
def reader(train: Callable[..., None], tmp_path: Path) -> Path:
    """A directory with small versions of the files that the documents mention: pictures, a table, a run of the demo."""
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
        selected = [row["image"] for row in table if shape in row["caption"]][:20]
        for number, image in enumerate(selected):
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
    """Runs a prepare command that must fail, and returns its one-line error message."""
    return partial(last_line, prepare)


def until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not happened():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, int]]:
    """``python -m clipx.check ARGUMENTS`` in this process, from an empty directory; its output and exit code."""
    call = command("check", tmp_path, monkeypatch)

    def run(*args: str) -> tuple[str, int]:
        capsys.readouterr()
        code = 0
        try:
            call(*args)
        except SystemExit as error:
            print(error.code, file=sys.stderr)
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
