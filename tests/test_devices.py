"""Cores that a process may use, with simulated control groups; precision and workers of a device."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from clipx import devices
from clipx.devices import select_amp, select_workers

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
V1 = "12:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a"


def save(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture(autouse=True)
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(devices, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(16), raising=False)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/", {"cpu.max": "9900000 100000"}, 16),
        ("0::/a.slice/b", {"a.slice/cpu.max": "400000 100000", "a.slice/b/cpu.max": "max 100000"}, 4),
        ("0::/kubepods/pod", {"cpu.max": "200000 100000"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        (V1, {"cpu/docker/a/cpu.cfs_quota_us": "600000", "cpu/docker/a/cpu.cfs_period_us": "100000"}, 6),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        (V1, {"memory/docker/a/memory.limit_in_bytes": "1"}, 16),
    ],
)
def test_a_cpu_quota_bounds_the_cores(tmp_path: Path, own: str, files: dict[str, str], expected: int) -> None:
    save(tmp_path / "own", own)
    for name, text in files.items():
        save(tmp_path / "groups" / name, text)
    assert devices.available_cores() == expected
    assert select_workers("auto", CPU) == min(8, max(1, expected // 2))
    assert select_workers("auto", CUDA) == max(1, expected - 2)
    assert select_workers("3", CUDA) == 3


def test_the_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (select_workers("auto", CPU), select_workers("auto", CUDA)) == (2, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (select_workers("auto", CPU), select_workers("auto", CUDA)) == (1, 1)


@pytest.mark.parametrize("has_units", [True, False])
def test_automatic_precision_is_bf16_where_the_device_has_units_for_it(
    has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units or including_emulation)
    monkeypatch.setattr(devices, "has_amx", lambda: has_units)
    assert {select_amp("auto", device) for device in (CPU, CUDA)} == {"bf16" if has_units else "none"}
    assert select_amp("auto", torch.device("mps")) == "none"
    assert [select_amp(amp, CUDA) for amp in ("none", "bf16", "fp16")] == ["none", "bf16", "fp16"]


def test_without_control_groups_the_cores_are_those_of_the_affinity() -> None:
    assert devices.available_cores() == 16


def test_torchs_threads_follow_the_quota_unless_the_environment_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "own", "0::/")
    save(tmp_path / "groups/cpu.max", "300000 100000")
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    devices.limit_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    devices.limit_threads()
    assert threads == [3]
