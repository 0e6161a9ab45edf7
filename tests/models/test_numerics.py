"""Torch's settings of precision and determinism: those of a run within it, the former ones after it."""

import os
import warnings
from typing import Any

import pytest
import torch

from clipx.models.numerics import numerics


def settings() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 deprecates the first two
        return {
            "matmul": torch.get_float32_matmul_precision(),
            "tf32": torch.backends.cudnn.allow_tf32,
            "algorithms": torch.are_deterministic_algorithms_enabled(),
            "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
            "filled": torch.utils.deterministic.fill_uninitialized_memory,
            "deterministic": torch.backends.cudnn.deterministic,
            "benchmark": torch.backends.cudnn.benchmark,
            "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        }


@pytest.fixture(params=[False, True], ids=["torch's settings", "others"])
def former(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of a process, as torch has them or as its user has changed them."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if request.param:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        request.getfixturevalue("high")
    return settings()


@pytest.fixture
def high() -> Any:
    settings()  # the warning of torch 2.9
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_products_have_the_precision_within_the_block_alone(former: dict[str, Any], precision: str) -> None:
    with numerics(precision, deterministic=False):
        assert settings() == {**former, "matmul": precision, "tf32": precision == "high"}
    assert settings() == former


def test_operations_are_deterministic_within_the_block_alone(former: dict[str, Any]) -> None:
    with pytest.raises(KeyError), numerics("highest", deterministic=True):
        assert settings() == {
            "matmul": "highest",
            "tf32": False,
            "algorithms": True,
            "warn_only": True,
            "filled": False,
            "deterministic": True,
            "benchmark": False,
            "workspace": former["workspace"] or ":4096:8",
        }
        raise KeyError
    assert settings() == former


def test_an_operation_that_is_not_deterministic_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):  # jobs of a sweep
        with pytest.warns(UserWarning, match="^something else$"), numerics("highest", deterministic=True):
            for _ in range(3):
                torch.zeros(4).put_(torch.tensor([1]), torch.tensor([1.0]))  # the one on a CPU
            warnings.warn("something else", stacklevel=1)
    assert [line.split(" does")[0] for line in caplog.messages] == ["deterministic=true: put_"] * 2
