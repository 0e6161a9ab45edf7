"""Compare ``clipx.train`` with open_clip's training command on the same shards, alternating, with as many workers.

    python experiments/speed/end_to_end.py SHARDS PEER [STEPS] [ROUNDS]

SHARDS is a directory of tars (experiments/loader/photos.py makes one), PEER holds the webdataset that open_clip's
command needs: pip install --no-deps --target PEER 'webdataset<=0.2.86' pandas python-dateutil pytz six.
ViT-B/32, batch 32, one worker, float32.  Rates count from the end of the first step; the time before it is separate.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

BATCH = 32
LINE = re.compile(r"^(\S+) \| INFO \| Train Epoch", re.M)  # one per step


def clipx(shards: str, _peer: str, steps: int, place: str) -> tuple[float, float]:
    """Return samples/s, and seconds to the end of the first step."""
    start = time.time()
    args = [
        "model=vit_b32",
        "data=shards",
        f"data.root={shards}",
        "data.val=0",
        f"batch_size={BATCH}",
        "workers=1",
        f"max_steps={steps}",
        "log_every=1",
        "evals=[]",
        "save_every=null",
        "name=x",
    ]
    subprocess.run([sys.executable, "-m", "clipx.train", *args], cwd=place, check=True, capture_output=True)
    run = Path(place, "outputs/x")
    seconds = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    config_written = (run / "config.yaml").stat().st_mtime
    return (len(seconds) - 1) * BATCH / (seconds[-1] - seconds[0]), config_written - start + seconds[0]


def open_clip(shards: str, peer: str, steps: int, place: str) -> tuple[float, float]:
    start = time.time()
    tars = "::".join(map(str, sorted(Path(shards).glob("*.tar"))))
    args = [
        "--train-data",
        tars,
        "--dataset-type",
        "webdataset",
        "--train-num-samples",
        str(steps * BATCH),
        "--batch-size",
        str(BATCH),
        "--workers",
        "1",
        "--epochs",
        "1",
        "--model",
        "ViT-B-32-quickgelu",
        "--precision",
        "fp32",
        "--warmup",
        "10",
        "--log-every-n-steps",
        "1",
        "--save-frequency",
        "0",
        "--logs",
        place,
        "--name",
        "x",
    ]
    subprocess.run(
        [sys.executable, "-m", "open_clip_train.main", *args],
        cwd=place,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": peer},
    )
    stamps = LINE.findall(Path(place, "x/out.log").read_text())
    times = [datetime.strptime(stamp, "%Y-%m-%d,%H:%M:%S").timestamp() for stamp in stamps]  # whole seconds
    return (len(times) - 1) * BATCH / (times[-1] - times[0]), times[0] - start


def main(shards: str, peer: str, steps: int = 12, rounds: int = 3) -> None:
    found: dict[str, list[tuple[float, float]]] = {"clipx": [], "open_clip": []}
    shards, peer = str(Path(shards).resolve()), str(Path(peer).resolve())
    for _ in range(rounds):
        for side, run in (("clipx", clipx), ("open_clip", open_clip)):
            with tempfile.TemporaryDirectory() as place:
                found[side].append(run(shards, peer, steps, place))
            print(side, *(f"{value:.2f}" for value in found[side][-1]), flush=True)
    ratios = [a[0] / b[0] for a, b in zip(*found.values(), strict=True)]
    print(f"clipx / open_clip = {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
