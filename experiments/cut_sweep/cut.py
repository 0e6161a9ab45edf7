"""Kill a sweep of six jobs during its third, run it again, and save compare's table and TensorBoard's HPARAMS.

    python experiments/cut_sweep/cut.py

Writes table.md and hparams.png next to this file.  The screenshot needs Chromium, its driver and selenium.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

HERE = Path(__file__).parent
SWEEP = [
    sys.executable,
    "-m",
    "clipx.train",
    "-m",
    "experiment=study",
    "name=cut",
    "max_steps=60",
    "eval_every=20",
    "save_every=20",
    "optim.lr=3e-4,1e-3",
    "seed=0,1,2",
]
JOBS = Path("outputs/sweeps/cut")
COMPARE = [sys.executable, "-m", "clipx.compare", str(JOBS)]


def kill_sweep() -> None:
    """Kill the sweep and its processes in the middle of the third job."""
    sweep = subprocess.Popen(SWEEP, start_new_session=True)
    metrics = JOBS / "optim.lr=0.0003,seed=2/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:  # step 30 or so
        time.sleep(0.1)
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()


def screenshot(out: Path) -> None:
    """Save HPARAMS as a browser shows it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1500,700"):
        options.add_argument(argument)
    board = subprocess.Popen([sys.executable, "-m", "tensorboard.main", f"--logdir={JOBS}", f"--port={port}"])
    browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        time.sleep(15)  # TensorBoard reads the events
        browser.get(f"http://127.0.0.1:{port}/#hparams")
        time.sleep(10)
        browser.save_screenshot(str(out))
    finally:
        browser.quit()
        board.terminate()


if __name__ == "__main__":
    if JOBS.exists():
        sys.exit(f"{JOBS} exists already; remove it first")
    kill_sweep()
    subprocess.run(COMPARE, check=True)
    subprocess.run(SWEEP, check=True)
    subprocess.run([*COMPARE, f"--out={HERE / 'table.md'}"], check=True)
    screenshot(HERE / "hparams.png")
