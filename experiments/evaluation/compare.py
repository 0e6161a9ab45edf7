"""Compare clipx.evaluate with CLIP_benchmark's command on the same shards and weights, alternating.

    python experiments/evaluation/compare.py DIR PEER [PICTURES] [ROUNDS]

Creates DIR: synthetic photographs with five captions and a class each, in a layout that both read, and weights
of ViT-B/32.  PEER is the Python of CLIP_benchmark's environment; README.md says how to make it.  Each side and task
is a new process, timed from start to end; memory is that of all its processes, shared pages counted once.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from omegaconf import OmegaConf
from webdataset import TarWriter

from clipx import clip_vit_b32
from clipx.weights import checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "loader"))
from photos import WORDS, photo  # noqa: E402

CLASSES = ["dog", "cat", "street", "table", "water", "green house", "bird", "old woman", "red car", "small boat"]
TEMPLATES = [
    f"a photo of {article} {{c}} {place}."
    for article in ("a", "the", "one", "my")
    for place in ("", "in the street", "on a table", "at night")
]
SHARDS = 4


def make(root: Path, pictures: int) -> None:
    """Write shards, names and weights."""
    (root / "test").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for shard in range(SHARDS):
        with open(root / f"test/{shard}.tar", "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for number in range(shard * pictures // SHARDS, (shard + 1) * pictures // SHARDS):
                captions = [" ".join(draw.choice(WORDS, draw.integers(6, 12))) + "." for _ in range(5)]
                tar.write({
                    "__key__": f"{number:06d}", "jpg": photo(number % 400), "cls": str(draw.integers(10)).encode(),
                    "txt": "\n".join(captions).encode(), "json": json.dumps({"caption": captions}).encode(),
                })  # fmt: skip
    (root / "test/nshards.txt").write_text(f"{SHARDS}\n")
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (root / "retrieval").mkdir()  # CLIP_benchmark distinguishes the two kinds of data by a file next to them
    (root / "retrieval/test").symlink_to(root / "test")
    (root / "retrieval/dataset_type.txt").write_text("retrieval")
    torch.manual_seed(0)
    state = clip_vit_b32().state_dict()
    node = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/model/vit_b32.yaml"), resolve=True)
    checkpoint.save(root / "clipx.pt", {"model_state_dict": state, "config": {"model": node}})
    torch.save(state, root / "open_clip.pt")


def commands(root: Path, peer: str) -> dict[str, dict[str, list[str]]]:
    """Commands by task and side."""
    ours = [sys.executable, "-m", "clipx.evaluate", f"run={root}/clipx.pt", "device=cpu", "workers=1"]
    theirs = [
        peer,
        "-m",
        "clip_benchmark.cli",
        "eval",
        "--dataset",
        "wds/photos",
        "--model",
        "ViT-B-32-quickgelu",
        "--pretrained",
        f"{root}/open_clip.pt",
        "--num_workers",
        "1",
        "--no_amp",
        "--output",
        f"{root}/theirs.json",
    ]
    return {
        "zero_shot": {
            "clipx": [*ours, "evals=[zero_shot]", f"labelled={{photos:{{shards:{root}/test,classes:"
                      f"{root}/classnames.txt}}}}",
                      f"evals.zero_shot.templates={root}/zeroshot_classification_templates.txt"],
            "CLIP_benchmark": [*theirs, "--dataset_root", str(root), "--task", "zeroshot_classification"],
        },
        "retrieval": {
            "clipx": [*ours, "evals=[retrieval]", "data=shards", f"data.root={root}/test", "data.val=0",
                      "data.caption_key=caption", "split=train"],
            "CLIP_benchmark": [*theirs, "--dataset_root", f"{root}/retrieval", "--task", "zeroshot_retrieval",
                               "--recall_k", "1", "5", "10"],
        },
    }  # fmt: skip


def measure(command: list[str], root: Path) -> tuple[float, float, str]:
    """Run a command and return its seconds, its peak memory in GB, and its output."""
    start, peak = time.perf_counter(), 0
    with (root / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.2)
    text = (root / "output.txt").read_text()
    if process.returncode:
        sys.exit(f"{command}\n{text}")
    return time.perf_counter() - start, peak / 1e9, text


def memory(pid: int) -> int:
    total = 0
    try:
        for process in (found := psutil.Process(pid), *found.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def metrics(root: Path, side: str, task: str) -> dict[str, float]:
    """Read a side's metrics, to check that both agree."""
    if side == "CLIP_benchmark":
        found = json.loads((root / "theirs.json").read_text())["metrics"]
        return {key: round(value, 5) for key, value in found.items()}
    found = next(
        data[task] for data in json.loads((root / "metrics.json").read_text())["clipx.pt"].values() if task in data
    )
    return {key: round(value, 5) for key, value in found.items() if re.fullmatch(r"top\d|mean_per_class|..._r\d+", key)}


def main(root: str, peer: str, pictures: int = 400, rounds: int = 3) -> None:
    place = Path(root).absolute()
    if not place.exists():
        make(place, pictures)
    for task, sides in commands(place, peer).items():
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, command in sides.items():
                seconds, peak, _ = measure(command, place)
                found[side].append((seconds, peak))
                print(task, side, f"{seconds:.1f} s, {pictures / seconds:.2f} pictures/s, {peak:.2f} GB", flush=True)
        for side in sides:
            print(task, side, metrics(place, side, task))
        speed = {side: pictures / statistics.median(seconds for seconds, _ in rows) for side, rows in found.items()}
        peak = {side: statistics.median(peak for _, peak in rows) for side, rows in found.items()}
        print(
            task,
            "clipx / CLIP_benchmark:",
            f"speed {speed['clipx'] / speed['CLIP_benchmark']:.2f},",
            f"memory {peak['clipx'] / peak['CLIP_benchmark']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
