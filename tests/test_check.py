"""``python -m clipx.check``: every finding is provoked, and its message compared."""

import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import hydra
import pytest
import torch
from conftest import picture, run_python, write_tar
from PIL import Image

from clipx.config.instantiate import build
from clipx.config.resolve import resolve
from clipx.config.schema import TrainConfig
from clipx.data.shards import open_shards
from clipx.devices import autocast_dtype
from clipx.optim import block_matrices, muon
from clipx.tools import machine
from clipx.training.memory import moment_bytes
from clipx.training.parts import initial_state

Check = Callable[..., tuple[str, int]]

FEW = ("batch_size=8", "model.image.depth=1", "model.text.depth=1", "device=cpu")
MADE_UP = ("data=dummy", "data.samples=40", "data.val_samples=20", "epochs=20", *FEW)


def mtimes(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def compose_config(*args: str) -> TrainConfig:
    with hydra.initialize_config_module("clipx.conf", version_base="1.3"):
        return resolve(hydra.compose("check", list(args)), TrainConfig)


def test_a_sound_run_has_no_complaints_and_leaves_one_image(
    check: Check, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_shards(120, 80)
    output, code = check("data=shards", f"data.root={root}", "data.val=0.5", "epochs=10", *FEW)
    assert code == 0 and {line.split()[0] for line in output.splitlines()} == {"ok"}, output
    for expected in (
        "100 pictures to train in 2 shards",
        "parameters",
        "125 steps of 8",
        "12.5 batches an epoch",
        "warm-up 12 (sched.warmup=2,000, capped by sched.warmup_cap)",
        "100 pictures to validate",
        "55 of 55 samples checked (100%) have a picture and a caption",
        "0% are truncated at model.text.context=77",
    ):
        assert expected in output, expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clipx-check.png", "shards"]
    with Image.open(tmp_path / "clipx-check.png") as image:
        image.load()
        assert image.width > 1000 and len(set(image.convert("L").tobytes())) > 50


def test_a_mistake_in_the_config_is_the_line_that_train_ends_with(check: Check) -> None:
    assert check("optim.lr=fast") == (
        "optim.lr='fast': should be a valid number, unable to parse string as a number\n",
        1,
    )
    assert check("model=smal") == ("model=smal: there is no such option; did you mean small?\n", 1)


def test_check_and_train_compose_the_same_run() -> None:
    with hydra.initialize_config_module("clipx.conf", version_base="1.3"):
        for args in ([], ["experiment=demo", "optim.lr=1"], ["model=small", "data=dummy"]):
            assert hydra.compose("check", args) == hydra.compose("train", args)


def test_without_data_the_rest_is_still_checked(check: Check) -> None:
    output, code = check("data=coco", "data.root=no where/é=x", *FEW)
    assert code == 1
    assert "WRONG data      data.root=no where/é=x is not a directory; make its shards with: python" in output
    assert "ok    model" in output and "ok    memory" in output and "ok    disk" in output


@pytest.mark.parametrize(
    ("args", "finding"),
    [
        (["device=cuda:99", "amp=auto"], "device    device=cuda:99 cannot be used ("),
        (["batch_size=64"], "length    batch_size=64 is more than the 40 training samples"),
        (["model.image.heads=5"], "model     model.image.heads=5 does not divide width=192"),
        (["batch_size=4000000", "data.samples=5000000"], "memory    about "),
        (["resume=none.pt"], "run       none.pt: there is no such checkpoint"),
    ],
)
def test_what_would_stop_the_run_is_reported(args: list[str], finding: str, check: Check) -> None:
    output, code = check(*MADE_UP, *args)
    assert f"WRONG {finding}" in output and code == 1
    assert output.endswith("this run would fail: fix the findings marked WRONG (1)\n")


def test_what_is_odd_is_reported_with_a_remedy_and_stops_nothing(check: Check) -> None:
    output, code = check(
        *MADE_UP,
        "amp=fp16",
        "sched.warmup_cap=1",
        "eval_every=30ep",
        "save_every=101",
        "evals=[]",
        "model.text.context=6",
        "workers=999",
    )
    assert code == 0
    for finding in (
        "odd   device    amp=fp16 is many times slower than amp=none on a CPU",
        "odd   length    warm-up lasts for all 100 steps; sched.warmup_cap=0.1",
        "odd   length    eval_every=30ep is 150 steps, more than the run has; try eval_every=25%",
        "odd   length    save_every=101 is 101 steps, more than the run has; try save_every=25%",
        "odd   samples   captions have a median of 9 tokens and at most 9; 100% are truncated at model.text.context=6",
        "odd   evals     no evaluation computes val/retrieval/mean_recall (objective or best); this run has evals",
        "odd   workers   workers=999 is more than the ",
    ):
        assert finding in output, finding


def test_the_batch_that_fits_in_memory_is_reported(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    output = {}
    for free in (60, 142.5, 150):  # MB; the step takes 114, and check asks for a margin of a quarter
        monkeypatch.setattr(machine, "free_bytes", lambda device, free=free: int(free * 1_000_000))
        output[free], code = check(*MADE_UP)
        assert code == (free == 60)
    assert "WRONG memory    about 114MB: 113MB for parameters, gradients and optimiser, 950kB for 8 pict" in output[60]
    assert "cpu has 60.0MB free; a smaller model may fit, amp=bf16 needs less, grad_checkpoint=true needs" in output[60]
    assert "odd   memory    " in output[142.5] and "micro_batch_size=4 fits and gives the same gra" in output[142.5]
    assert "ok    memory    " in output[150]


def test_broken_shards_are_reported(check: Check, make_shards: Callable[..., Path]) -> None:
    root = make_shards(20, 20)
    first, second = sorted(root.glob("*.tar"))
    second.write_bytes(b"not a tar" * 1000)
    output, code = check("data=shards", f"data.root={root}", *FEW)
    assert code == 1 and "WRONG data      " in output and "part-001.tar" in output
    second.unlink()
    assert check("data=shards", f"data.root={root}", "data.val=0", *FEW)[1] == 0  # the shard is now indexed
    first.write_bytes(first.read_bytes()[:-24_000])
    output, code = check("data=shards", f"data.root={root}", "data.val=0", *FEW)
    assert (
        code == 0
        and "odd   data      " in output
        and "samples are lost to truncated shards (part-000.tar); fetch" in output
    )
    assert "odd   evals     there are no validation pictures, so nothing is scored; data.val=0.5 holds out 7" in output


def test_too_small_a_cache_for_remote_shards_is_reported(
    check: Check, make_shards: Callable[..., Path], serve: Callable[[Path], str], tmp_path: Path
) -> None:
    root = make_shards(10, 12)
    open_shards(str(root), val=0)  # creates the indexes
    remote = (
        "data=shards",
        f"data.shards={serve(root)}/part-{{000..001}}.tar",
        "data.val=0",
        "data.cache=cache",
        f"data.index_dir={tmp_path}/indexes",
        *FEW,
    )
    output, code = check(*remote, "data.cache_gb=1e-5")
    assert code == 1 and "WRONG samples   data.cache_gb=1e-05 is too small for two windows of shards" in output
    output, code = check(*remote)
    assert code == 0 and "22 of 22 samples checked" in output


def test_bad_samples_are_counted_by_their_reasons(check: Check, tmp_path: Path) -> None:
    def shard(bad: int) -> str:
        members = []
        for number in range(40):
            members.append((f"{number:03d}.png", b"no picture" if number < bad else picture(number)))
            members.append((f"{number:03d}.txt", b" " if bad <= number < 2 * bad else f"thing {number}".encode()))
        write_tar(tmp_path / f"bad{bad}" / "a.tar", members)
        return f"data.root={tmp_path / f'bad{bad}'}"

    output, code = check("data=shards", shard(2), "data.val=0", *FEW)
    assert code == 0 and "36 of 40 samples checked (90%) have a picture and a caption" in output
    assert "odd   samples   5%: does not decode: it is not a picture (a.tar/00" in output
    assert "odd   samples   5%: its caption is empty (a.tar/00" in output and "verify=true" in output
    output, code = check("data=shards", shard(15), "data.val=0", *FEW)
    assert code == 1 and "WRONG samples   more samples are bad than data.max_skipped=0.01 allows; fix them" in output
    output, code = check("data=shards", shard(20), "data.val=0", *FEW)
    assert code == 1 and "WRONG samples   64 samples in a row are bad" in output and "ok    disk" in output


def test_where_nothing_is_held_out_a_share_is_named_that_holds_something_out(
    check: Check, make_shards: Callable[..., Path]
) -> None:
    output, code = check("data=shards", f"data.root={make_shards(20)}", *FEW)
    assert code == 0 and "val=0.02 of 20 pictures rounds to 0, so there is no validation set; data.val=0.5 " in output
    assert "there are no validation pictures, so nothing is scored; data.val=0.5 holds out 10" in output
    output, _ = check("data=dummy", "data.samples=20", "data.val_samples=0", *FEW)
    assert "nothing is scored; data.val_samples=256 makes some" in output


def test_identical_captions_are_reported(check: Check, tmp_path: Path) -> None:
    members = [member for n in range(20) for member in ((f"{n}.png", picture(n)), (f"{n}.txt", "导盲犬 $x".encode()))]
    write_tar(tmp_path / "same" / "train" / "a.tar", members)
    write_tar(tmp_path / "same" / "val" / "a.tar", [("0.png", b"x"), ("0.txt", b"x"), *members[2:]])
    args = ("data=shards", f"data.root={tmp_path / 'same'}", *FEW)
    output, code = check(*args)
    assert (
        code == 0
        and (
            "odd   samples   8 of the first 8 captions of a batch are equal to another one, for example "
            "'导盲犬 $x', 8 times; with loss.same=mask, pictures with equal captions"
        )
        in output
    )
    assert "odd   evals     1 of the first 32 are skipped, for example a.tar/0: does not decode: it is not" in output
    assert "ok    samples   8 of the first 8 captions of a batch are equal" in check(*args, "loss.same=mask")[0]
    write_tar(tmp_path / "same" / "val" / "a.tar", [])
    output, code = check(*args)
    assert code == 1 and "WRONG data " in output
    assert (
        "there are no samples in the validation shards, such as " in output
        and "; set others (data.val_shards=...)" in output
    )


def test_equal_captions_are_counted_in_a_batch_not_among_all(check: Check, tmp_path: Path) -> None:
    members = []
    for n in range(200):
        members += [(f"{n:03d}.png", picture(n)), (f"{n:03d}.txt", f"a thing, number {n % 50}".encode())]
    write_tar(tmp_path / "x" / "a.tar", members)
    args = ("data=shards", f"data.root={tmp_path / 'x'}", "data.val=0", *FEW)
    output, _ = check(*args, "batch_size=100")
    count = int(re.search(r"odd   samples   (\d+) of the first 100 captions of a batch are equal", output)[1])
    assert (
        70 < count < 100
    )  # each of 50 captions is drawn twice on average, so about 1 - exp(-2) of the batch have a duplicate
    output, _ = check(*args, "batch_size=2", "seed=1")
    assert "ok    samples   0 of the first 2 captions of a batch are equal to another one" in output


def test_a_small_validation_set_is_reported(check: Check, make_shards: Callable[..., Path]) -> None:
    output, code = check("data=shards", f"data.root={make_shards(200, 200)}", *FEW)
    assert (
        code == 0
        and ("odd   evals     8 pictures to validate: recall at 10 is 100% by chance; data.val=0.5 holds out 200")
        in output
    )
    output, _ = check("data=shards", f"data.root={make_shards(200, 200)}", "data.val=0.5", *FEW)
    assert "ok    evals     200 pictures to validate" in output


def test_an_existing_run_is_reported_and_left_unchanged(
    check: Check, train: Callable[..., None], tmp_path: Path
) -> None:
    args = (*MADE_UP, "name=x", "workers=0", "max_steps=6", "eval_every=null", "log_every=1")
    train(*args, "stop_at=3")
    before = mtimes(tmp_path / "outputs")
    assert "ok    run       outputs/x, resuming after step 3" in check(*args)[0]
    output, code = check(*args, "optim.lr=1")
    assert code == 1 and "WRONG run       outputs/x/checkpoints/clip_last.pt belongs to another run (optim" in output
    output, code = check(*args, "resume=null")
    assert code == 1 and "WRONG run       outputs/x holds a run; resume=auto resumes it" in output
    assert mtimes(tmp_path / "outputs") == before
    train(*args)
    output, code = check("config=outputs/x/config.yaml", "name=x")
    assert (
        code == 0 and "odd   run       outputs/x is finished, so this command would change nothing; name=..." in output
    )


def test_an_unwritable_or_full_directory_is_reported(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outputs").write_text("a file")
    (tmp_path / "clipx-check.png").mkdir()
    output, code = check(*MADE_UP)
    assert code == 1 and f"WRONG disk      {tmp_path / 'outputs'} is not writable, so outputs/" in output
    assert "odd   samples   clipx-check.png cannot be written (Is a directory)" in output
    (tmp_path / "outputs").unlink()
    usage = namedtuple("usage", "total used free")(10, 9, 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    output, code = check(*MADE_UP, "keep_every=10", "workers=2", "model=small", "batch_size=40")
    assert (
        code == 1
        and (
            "WRONG disk      5 checkpoints of 199MB and the best of 66.4MB; 1.00MB are free; free some "
            "space, or keep fewer"
        )
        in output
    )
    assert "WRONG workers   their pictures need 36.1MB of /dev/shm, which has 1.00MB free; give the container" in output


def test_a_read_only_directory_is_reported(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # simulated, as root may write anywhere
    output, code = check(*MADE_UP)
    assert code == 1 and "is not writable, so outputs/" in output


@pytest.mark.parametrize("args", [[], ["amp=bf16"], ["grad_checkpoint=true"], ["loss.same=mask"]])
def test_tiny_batches_predict_the_activations_of_a_batch(args: list[str]) -> None:
    config = compose_config(*MADE_UP, *args)
    model, loss_fn = initial_state(config, torch.device("cpu")).model, build(config.loss)
    amp = autocast_dtype(config.amp)
    for size in (8, 64):
        model.set_grad_checkpoint(config.grad_checkpoint)
        measured = machine.saved_bytes(model, loss_fn, amp, 20, size)
        if config.grad_checkpoint:
            model.set_grad_checkpoint(False)
            measured += machine.saved_bytes(model, loss_fn, amp, 20, size)  # its one block is recomputed
        predicted = machine.activations(model, loss_fn, amp, 20, config.grad_checkpoint)(size)
        assert predicted == pytest.approx(measured, rel=0.02)


def test_a_step_takes_the_predicted_memory() -> None:
    """Compared with the allocations that torch's profiler records in the forward and backward pass."""
    config, size = compose_config(*MADE_UP), 64
    state, loss_fn = initial_state(config, torch.device("cpu")), build(config.loss)
    image, tokens = torch.zeros(size, 3, 32, 32), torch.arange(20).expand(size, 20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss_fn(*state.model(image, tokens)).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    peak = image.nbytes + max(accumulate(changes))
    activations, gradients = (
        machine.activations(state.model, loss_fn, None, 20, False)(size),
        machine.parameter_bytes(state, None),
    )
    assert max(activations, gradients) < peak < activations + gradients


def test_the_optimisers_moments_are_counted_and_nothing_changes() -> None:
    state = initial_state(compose_config(*MADE_UP), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    parameters = list(state.model.parameters())
    total, matrices = (sum(p.nbytes for p in chosen) for chosen in (parameters, block_matrices(state.model)))
    assert moment_bytes(state.optimizer) == 2 * total and not state.optimizer.state
    assert moment_bytes(muon(state.model)) == 2 * total - matrices
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())
    assert moment_bytes(torch.optim.SGD(parameters, lr=1.0)) == 0
    assert moment_bytes(torch.optim.Adagrad([{"params": parameters}, {"params": []}])) == total


def test_help_needs_no_torch_and_every_job_of_a_sweep_is_checked(tmp_path: Path) -> None:
    (tmp_path / "no" / "torch").mkdir(parents=True)
    (tmp_path / "no" / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')")
    help_result = run_python("-m", "clipx.check", "--help", cwd=tmp_path / "no")
    assert help_result.returncode == 0 and "Takes the arguments of clipx.train" in help_result.stdout, (
        help_result.stderr
    )
    result = run_python("-m", "clipx.check", "-m", *MADE_UP, "batch_size=8,64", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "batch_size=64 is more than" in result.stderr
    assert "20 pictures to validate" in result.stderr and "ok    length    100 steps of 8" in result.stderr
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [".sweep"]  # Hydra's own


def test_a_tracker_that_cannot_work_is_found(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipx.track.wandb.find_spec", lambda _: None)
    page, code = check(*MADE_UP, "track=[wandb]")
    assert code == 1 and 'WRONG track     track=[wandb] needs wandb, which is not installed; pip install "clipx' in page
