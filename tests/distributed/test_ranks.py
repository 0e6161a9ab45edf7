"""Distributed runs: same results as one process, and clean ends when a rank is lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import hydra
import psutil
import pytest
import torch
from conftest import FEW, assert_same_state, lines, merge_args, run_python, run_ranks, summary, until

from clipx import devices, distributed
from clipx.config.resolve import resolve
from clipx.config.schema import TrainConfig
from clipx.data.dummy import Dummy
from clipx.errors import UserError
from clipx.evals.naming import naming
from clipx.evals.retrieval import retrieval
from clipx.evals.validation import Validation
from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.tokenizer import SimpleTokenizer
from clipx.training.logs import SilentLog
from clipx.training.resume import restore
from clipx.weights.checkpoint import CheckpointError, read

SHORT = [arg for arg in FEW if not arg.startswith(("eval_every", "data.samples"))]
RUN = (*SHORT, "data.samples=400", "eval_every=20", "save_every=5", "max_steps=60", "name=x")


def scores(names: str) -> dict[str, float]:
    """Validation metrics on 150 pictures: three chunks, so a fourth rank has none."""
    torch.manual_seed(0)
    model = CLIP(
        ImageEncoder(size=32, patch=16, width=64, depth=1, heads=1, embed=32),
        TextEncoder(width=64, depth=1, heads=1, embed=32),
    )
    evals = {"retrieval": retrieval, "naming": partial(naming, names=names)}
    return Validation({"": Dummy(150, 32, 0)}, evals, SimpleTokenizer(), 0, None)(model, 1, SilentLog())


def on_rank(rank: int, world: int, store: str, names: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(scores(names), f"{store}-{rank}.pt")
    rows = distributed.gather_rows(torch.arange(rank * 10, rank * 10 + rank))
    assert rows.tolist() == [10 * r + n for r in range(world) for n in range(r)]
    assert distributed.gather_lists([f"{rank}"] * rank) == [f"{r}" for r in range(world) for _ in range(r)]
    flags = distributed.SharedFlags()
    results = [flags(rank == world - 1 and call == 1, False) for call in range(4)]
    assert results == [[False, False], [False, False], [True, False], [False, False]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "has_amx", lambda: rank == 0)
        assert devices.select_amp("auto", torch.device("cpu")) == "none"  # on all, as one machine has no units
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_evaluation_and_get_what_one_gets(world: int, tmp_path: Path) -> None:
    args = tmp_path / "names.txt"
    args.write_text("\n".join(sorted({Dummy(150, 32, 0).read(number).captions[0] for number in range(150)})))
    run_ranks(on_rank, world, str(tmp_path / "store"), str(args))
    single = scores(str(args))
    for rank in range(world):
        assert torch.load(f"{tmp_path}/store-{rank}.pt") == single  # bit for bit


def test_a_batch_that_does_not_divide_names_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(UserError, match="^batch_size=250 does not divide among 4 ranks; 248 and 252 do$"):
        distributed.local_batch_size(250)
    with pytest.raises(UserError, match="^batch_size=3 does not divide among 4 ranks; 4 does$"):
        distributed.local_batch_size(3)
    assert distributed.local_batch_size(256) == 64


def test_half_an_environment_of_ranks_is_refused_in_one_line(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert fails(*FEW, "max_steps=2") == (
        "WORLD_SIZE=2 is set without MASTER_ADDR, MASTER_PORT; start several processes with torchrun --nproc-per-node "
        "2 -m clipx.train ..., or unset WORLD_SIZE to train in one"
    )


def start(cwd: Path, ranks: int, *args: str, agent: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen[str]:
    cwd.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *agent,
        "--nproc-per-node",
        str(ranks),
        "-m",
        "clipx.train",
        *merge_args(*(args or RUN)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs the ranks to completion and returns their output."""
    started = []

    def run(ranks: int, *args: str, name: str = "x", code: int = 0) -> str:
        started.append(process := start(tmp_path, ranks, *RUN[:-1], f"name={name}", *args))
        _, output = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ranks_of(agent: subprocess.Popen[str]) -> list[psutil.Process]:
    children = [child for child in psutil.Process(agent.pid).children() if "clipx.train" in " ".join(child.cmdline())]
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def logged(cwd: Path) -> int:
    file = cwd / "outputs/x/metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def port_is_free(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("localhost", port)) != 0


def numbers(directory: Path) -> dict[str, list[float]]:
    rows = lines(directory)
    return {
        tag: [row[tag] for row in rows if tag in row]
        for tag in ("train/loss", "train/grad_norm", "val/retrieval/mean_recall")
    }


@pytest.mark.long
def test_other_numbers_of_ranks_and_micro_batches_are_the_same_run(
    torchrun: Callable[..., str], tmp_path: Path
) -> None:
    torchrun(1, name="one")
    torchrun(2, "stop_at=20")
    torchrun(4, "stop_at=40", "micro_batch_size=2")
    torchrun(1, "workers=2")
    one, combined = (numbers(tmp_path / "outputs" / name) for name in ("one", "x"))
    assert len(combined["train/loss"]) == 60
    assert combined["train/loss"] == pytest.approx(one["train/loss"], rel=1e-3)
    assert combined["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=0.02)
    assert combined["val/retrieval/mean_recall"] == pytest.approx(one["val/retrieval/mean_recall"], abs=0.05)
    resumed, single = (read(tmp_path / f"outputs/{name}/checkpoints/clip_last.pt") for name in ("x", "one"))
    assert (resumed["samples"], resumed["step"], resumed["plan"]) == (single["samples"], single["step"], single["plan"])


@pytest.mark.long
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_ranks_with_several_captions_of_a_picture_are_the_same_run(
    torchrun: Callable[..., str], tmp_path: Path, loss: str
) -> None:
    args = (f"loss={loss}", "loss.same=positive", "data.captions_per_picture=2", "max_steps=20")
    torchrun(1, *args, name="one")
    torchrun(2, *args, "micro_batch_size=4")
    one, two = (numbers(tmp_path / "outputs" / name) for name in ("one", "x"))
    assert len(one["train/loss"]) == 20 and two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-3)
    assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=0.02)


@pytest.mark.long
def test_mixed_precision_in_micro_batches_on_ranks_is_that_of_one(torchrun: Callable[..., str], tmp_path: Path) -> None:
    args = ("amp=bf16", "micro_batch_size=4", "max_steps=20")
    torchrun(1, *args, name="one")
    torchrun(2, *args, "save_every=0.01min")  # measured by rank 0's clock
    one, two = (numbers(tmp_path / "outputs" / name) for name in ("one", "x"))
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=0.02)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_lost_rank_is_named_by_all_others_within_a_minute(victim: int, tmp_path: Path) -> None:
    agent = start(tmp_path, 4)
    until(lambda: logged(tmp_path) > 12, agent)
    ranks_of(agent)[victim].kill()
    start_time = time.monotonic()
    _, output = agent.communicate(timeout=60)
    assert agent.returncode == 1 and time.monotonic() - start_time < 30
    assert output.count(f"rank {victim} is lost: it ended without an error message; rerun the same command to") == 3


@pytest.mark.long
@pytest.mark.parametrize(("victim", "saving"), [(1, False), (0, True)], ids=["in a step", "while it saves"])
def test_torchrun_restarts_a_job_that_lost_a_rank_with_the_same_result(
    victim: int, saving: bool, torchrun: Callable[..., str], tmp_path: Path
) -> None:
    torchrun(2, name="straight")
    agent = start(tmp_path, 2, agent=("--standalone", "--max-restarts", "2"))
    until(lambda: logged(tmp_path) > 12, agent)
    if saving:
        until(lambda: any((tmp_path / "outputs/x/checkpoints").glob("*.writing")), agent)
    ranks_of(agent)[victim].kill()
    _, output = agent.communicate(timeout=120)
    assert agent.returncode == 0, output
    assert f"rank {victim} is lost" in output and "resuming after step" in output
    assert_same_state(tmp_path / "outputs/straight", tmp_path / "outputs/x")
    assert numbers(tmp_path / "outputs/straight") == numbers(tmp_path / "outputs/x")


@pytest.mark.long
def test_a_node_that_is_lost_leaves_the_job_to_the_others(torchrun: Callable[..., str], tmp_path: Path) -> None:
    torchrun(1, name="straight")
    port = 20_000 + os.getpid() % 10_000
    agent_args = (
        "--nnodes",
        "1:2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{port}",
        "--max-restarts",
        "3",
        "--rdzv-conf",
        "last_call_timeout=15,keep_alive_interval=1,keep_alive_max_attempt=3",
    )
    first = start(tmp_path, 1, agent=agent_args)
    until(lambda: not port_is_free(port), first)  # so that the first one hosts the rendezvous
    second = start(tmp_path, 1, agent=agent_args)
    until(lambda: logged(tmp_path) > 12, first)
    for process in (second, *ranks_of(second)):  # as when a machine fails
        process.kill()
    second.communicate()
    _, output = first.communicate(timeout=180)
    assert first.returncode == 0, output
    assert "2 ranks of 8 samples" in output and re.search("rank . is lost", output)
    assert numbers(tmp_path / "outputs/x")["train/loss"] == pytest.approx(
        numbers(tmp_path / "outputs/straight")["train/loss"], rel=1e-3
    )


@pytest.mark.long
def test_one_ranks_error_is_reported_by_all_and_sigterm_saves(torchrun: Callable[..., str], tmp_path: Path) -> None:
    output = torchrun(2, "batch_size=15", code=1)
    assert "batch_size=15 does not divide among 2 ranks; 14 and 16 do\n" in output
    agent = start(tmp_path, 2)
    until(lambda: logged(tmp_path) > 12, agent)
    agent.send_signal(signal.SIGTERM)
    _, output = agent.communicate(timeout=60)
    assert "SIGTERM: checkpoint saved, stopping" in output and summary(tmp_path / "outputs/x")["state"] == "stopped"
    saved = read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["step"]
    assert lines(tmp_path / "outputs/x")[-1]["step"] == saved


@pytest.mark.long
def test_a_job_of_a_sweep_that_fails_leaves_the_ranks_to_the_next(torchrun: Callable[..., str], tmp_path: Path) -> None:
    output = torchrun(2, "-m", "batch_size=15,16", "max_steps=4", code=1)
    assert "batch_size=15 does not divide among 2 ranks" in output
    assert summary(tmp_path / "outputs/sweeps/x/batch_size=16")["state"] == "finished"


@pytest.mark.long
def test_an_error_of_one_rank_alone_is_reported_by_the_others(tmp_path: Path) -> None:
    agent = start(tmp_path, 2, *RUN, "workers=1", "eval_every=null")
    until(lambda: logged(tmp_path) > 12, agent)
    ranks_of(agent)[1].children()[0].kill()  # its data worker
    _, output = agent.communicate(timeout=60)
    assert agent.returncode == 1
    reason = "one of the workers=1 processes that read data was killed"
    assert f"rank 1 failed: {reason}" in output and output.count(reason) == 2  # rank 1's own, and rank 0's


def on_its_own_disk(rank: int, world: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    with hydra.initialize_config_module("clipx.conf", version_base="1.3"):
        config = resolve(hydra.compose("train", ["experiment=smoke"]), TrainConfig)
    directory = Path(folder) / ("x" if rank else "elsewhere")
    with pytest.raises(CheckpointError, match=r"the ranks find different checkpoints in .*, of steps \[0, 2\]; "):
        restore(None, config, directory, None)
    torch.distributed.destroy_process_group()


def test_ranks_that_do_not_see_the_same_directory_say_so(train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "name=x", "max_steps=2", "evals=[]")
    run_ranks(on_its_own_disk, 2, str(tmp_path / "store"), str(tmp_path / "outputs"))


@pytest.mark.long
def test_a_sweep_on_submitit_sets_each_task_up_as_a_rank(tmp_path: Path) -> None:
    args = [
        "-m",
        *RUN[:-3],
        "max_steps=4",
        "seed=0,1",
        "hydra/launcher=submitit_local",
        "hydra.launcher.tasks_per_node=2",
        "batch_size=16,15",
    ]
    result = run_python("-m", "clipx.train", *args, cwd=tmp_path)
    assert result.returncode == 1 and "batch_size=15 does not divide among 2 ranks; 14 and 16 do" in result.stderr
    jobs = sorted((tmp_path / "outputs/sweeps/sweep").iterdir())
    assert [summary(job)["state"] for job in jobs] == ["failed", "failed", "finished", "finished"]
    assert all("2 ranks of 8 samples" in (job / "train.log").read_text() for job in jobs[2:])
