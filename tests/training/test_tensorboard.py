"""TensorBoard in a real browser, showing a sweep."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FEW, summary
from open_clip.loss import ClipLoss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipx.evals.features import Features, pair_loss
from clipx.track import hparams_row
from clipx.track.tensorboard import LAYOUT

NO_BROWSER = shutil.which("chromedriver") is None and "CI" not in os.environ

GROUPS = "model=tiny data=dummy optim=adamw_paper sched=warmup_cosine loss=info_nce experiment=smoke"

# the text of a page, including all shadow roots
WORDS = """
const words = (node) => [node.shadowRoot, ...node.childNodes].filter(Boolean).map((child) =>
    child.nodeType == Node.TEXT_NODE ? child.data.trim()
    : ['STYLE', 'SCRIPT', 'TEMPLATE'].includes(child.tagName) ? '' : words(child)).join(' ');
return words(document.body).split(/\\s+/).join(' ');
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweep")
    command = [sys.executable, "-m", "clipx.train", "-m", *FEW, "name=s", "optim.lr=1e-4,1e-3", "seed=0,1"]
    subprocess.run(command, cwd=directory, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    return directory / "outputs/sweeps/s"


@pytest.fixture
def page(sweep: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Returns the text of a TensorBoard tab once it contains the given texts."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,1200"):
        options.add_argument(argument)
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={sweep}", f"--port={port}", "--host=127.0.0.1"]
    with (
        (tmp_path / "tensorboard.log").open("w") as log_file,
        subprocess.Popen(command, stdout=log_file, stderr=log_file) as board,
    ):
        browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:

            def page_text(tab: str, *texts: str) -> str:
                def loaded(_: object) -> Any:
                    browser.get("about:blank")  # force a reload, as TensorBoard reads events continuously
                    browser.get(f"http://127.0.0.1:{port}/#{tab}")
                    time.sleep(4)
                    text = browser.execute_script(WORDS)
                    return text if all(text in text for text in texts) else None

                return WebDriverWait(browser, 90).until(loaded, f"{tab} shows all of {texts}")

            WebDriverWait(browser, 60).until(lambda _: "Press CTRL" in (tmp_path / "tensorboard.log").read_text())
            yield page_text
        finally:
            browser.quit()
            board.terminate()


@pytest.mark.long
@pytest.mark.skipif(NO_BROWSER, reason="needs Chromium and its driver: apt install chromium chromium-driver")
def test_a_browser_shows_the_sweep(page: Callable[..., str], sweep: Path) -> None:
    rows = []
    for run in sweep.iterdir():
        run_summary = summary(run)
        config, last, best = (
            run_summary["config"],
            run_summary["final"]["val/retrieval/mean_recall"],
            run_summary["best"]["value"],
        )
        numbers = [config["optim.lr"], float(config["seed"]), last, best, run_summary["final"]["train/loss"]]
        rows.append(f"{run.name} {GROUPS} {' '.join(f'{number:#.5g}' for number in numbers)}")
    assert len(rows) == 4
    page("hparams", *rows, "groups optim.lr seed val/retrieval/mean_recall best/retrieval/mean_recall train/loss")
    page("custom_scalars", *LAYOUT, "loss: train and validation", "recall at 1: pictures to captions and back")
    first = page("timeseries", "at_a_glance 4 cards", "1_learning_loss", "4_fast_samples_per_s")
    assert first.index("at_a_glance 4 cards") < min(first.index(group) for group in ("health", "train", "val"))
    page("images", "val/nearest_captions", "val/similarity")
    page("text", "batch_size: 16")


@pytest.mark.long
def test_a_run_is_one_run_and_its_row_has_what_was_swept(sweep: Path) -> None:
    assert {path.name for run in sweep.iterdir() for path in run.iterdir() if path.is_dir()} == {"checkpoints"}
    events = EventAccumulator(str(sweep / "optim.lr=0.0001,seed=1")).Reload()
    plugins = events.summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"} <= plugins.keys()
    row = hparams_row(
        {"optim.lr": 1e-4, "seed": 1, "x": 3},
        {"model": "tiny", "evals": ["retrieval", "naming"]},
        ["optim.lr", "model", "gone"],
    )
    assert row == {"groups": "evals=retrieval,naming", "optim.lr": 1e-4, "model": "tiny"}
    best = [event.value for event in events.Scalars("best/retrieval/mean_recall")]
    every = [event.value for event in events.Scalars("val/retrieval/mean_recall")]
    assert best == [max(every[: n + 1]) for n in range(len(every))] and len(best) == 3


def test_the_loss_of_the_validation_set_is_open_clips() -> None:
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(1500, 16), dim=1) for _ in range(2))
    owners = torch.arange(1500).repeat_interleave(2)
    captions = torch.stack([texts, texts.flip(0)], dim=1).flatten(0, 1)  # only the first caption of each picture counts
    val = Features(images, captions, owners, [""] * 3000, torch.empty(0, 3, 8, 8, dtype=torch.uint8), 0)
    theirs = ClipLoss()(images, texts, torch.tensor(20.0)).item()
    assert pair_loss(val, 20.0) == pytest.approx(theirs, rel=1e-5)
