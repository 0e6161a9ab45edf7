"""The train command, killed at random moments, ends with the same bits as an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from conftest import assert_same_state, lines, merge_args, summary, until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipx.weights.checkpoint import read

STEPS, SAVED = 200, 7  # steps in total, and between two saves
SMALL = (
    "data=dummy", "data.samples=500", "data.val_samples=20", "batch_size=16", "workers=1", f"max_steps={STEPS}",
    "model.image.width=64", "model.image.heads=1", "model.image.depth=1", "model.image.embed=32",
    "model.text.width=64", "model.text.heads=1", "model.text.depth=1",
    "log_every=1", "eval_every=50", f"save_every={SAVED}", "keep_every=80", "name=x",
)  # fmt: skip


def start(cwd: Path, *args: str) -> subprocess.Popen[str]:
    cwd.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "clipx.train", *merge_args(*SMALL, *args)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(cwd: Path, *args: str) -> str:
    """Run to the end and return the output."""
    process = start(cwd, *args)
    _, output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def logged(cwd: Path) -> int:
    file = cwd / "outputs/x/metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saving(cwd: Path) -> bool:
    return any((cwd / "outputs/x/checkpoints").glob("*.writing"))


def killed(cwd: Path, seed: int) -> str:
    """Kill a run at a random moment, for odd seeds while it saves; returns a description of the moment."""
    rng = random.Random(seed)
    step = rng.randrange(STEPS - 2 * SAVED)
    process = start(cwd)
    until(lambda: logged(cwd) > step, process)
    if seed % 2:
        until(lambda: saving(cwd), process)
    time.sleep(rng.random() * 0.03)
    moment = f"step {logged(cwd)}" + (", saving" if saving(cwd) else "")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return moment


def assert_same_run(uninterrupted: Path, broken: Path) -> None:
    """Checks that weights, metrics and curves are equal."""
    assert_same_state(uninterrupted, broken)
    numbers = [
        [
            {key: row[key] for key in row if key.startswith(("step", "samples", "epoch", "val/", "train/loss"))}
            for row in lines(directory)
        ]
        for directory in (uninterrupted, broken)
    ]
    assert numbers[0] == numbers[1]
    curve = EventAccumulator(str(broken), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")
    assert [event.step for event in curve] == list(range(1, STEPS + 1))
    names = [
        sorted(path.name for path in (directory / "checkpoints").iterdir()) for directory in (uninterrupted, broken)
    ]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("straight")
    finish(cwd)
    return cwd / "outputs/x"


@pytest.mark.long
def test_killed_at_twelve_random_moments_it_equals_an_uninterrupted_run(uninterrupted: Path, tmp_path: Path) -> None:
    def kill_and_finish(seed: int) -> str:
        cwd = tmp_path / str(seed)
        moment = killed(cwd, seed)
        finish(cwd)
        return moment

    with ThreadPool(2) as pool:
        moments = pool.map(kill_and_finish, range(12), chunksize=1)
    print("\n".join(moments))
    for seed in range(12):
        assert_same_run(uninterrupted, tmp_path / str(seed) / "outputs/x")
    assert sum("saving" in moment for moment in moments) >= 4


@pytest.mark.long
def test_killed_repeatedly_it_equals_an_uninterrupted_run(uninterrupted: Path, tmp_path: Path) -> None:
    for seed in range(5):
        process = start(tmp_path)
        previous = logged(tmp_path)
        until(
            lambda previous=previous, seed=seed: logged(tmp_path) != previous and logged(tmp_path) > 50 * seed, process
        )
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(tmp_path, "workers=0")
    assert_same_run(uninterrupted, tmp_path / "outputs/x")


@pytest.mark.long
def test_sigterm_to_all_its_processes_saves_and_ends_with_code_0(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    until(lambda: logged(tmp_path) > 100, process)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does
    _, output = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "SIGTERM: checkpoint saved, stopping" in output and "resume with  python -m clipx.train data=dummy" in output
    step = read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["step"]
    assert step == summary(tmp_path / "outputs/x")["step"] == lines(tmp_path / "outputs/x")[-1]["step"]
    finish(tmp_path)
    assert_same_state(uninterrupted, tmp_path / "outputs/x")


@pytest.mark.long
def test_a_disk_that_is_full_in_the_middle_of_a_run_costs_nothing_but_the_steps_since(
    uninterrupted: Path, tmp_path: Path
) -> None:
    finish(tmp_path, "stop_at=20")
    size = (tmp_path / "outputs/x/checkpoints/clip_last.pt").stat().st_size
    code = (
        "import resource, sys; from clipx.train import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2)\n"  # simulates a full disk
        "sys.argv = ['clipx.train', *sys.argv[1:]]; main()"
    )
    result = subprocess.run([sys.executable, "-c", code, *SMALL], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and "clip_last.pt cannot be written: File too large. It needs 0.0" in result.stderr
    assert "Traceback" not in result.stderr
    assert read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["step"] == 20
    finish(tmp_path)
    assert_same_state(uninterrupted, tmp_path / "outputs/x")
