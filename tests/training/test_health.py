"""Health metrics, compared with plain computation, and the warnings based on them."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FEW, lines

from clipx.data.dummy import Dummy
from clipx.loss import clip_loss
from clipx.training import health
from clipx.training.health import HealthMonitor, effective_rank, health_metrics
from clipx.training.loop import StepOutput

RANGE = 0.0, math.log(100)


def numbers(image: torch.Tensor, text: torch.Tensor, scale: float = 14.0) -> StepOutput:
    loss = clip_loss(image, text, torch.tensor(scale))
    return StepOutput(
        loss,
        image,
        text,
        torch.tensor(scale),
        torch.tensor([3.0, 4.0]),
        torch.tensor(5.0),
        1e-4,
        0.0,
        0,
        len(image),
        [],
    )


def test_the_numbers_are_what_plain_computation_gives() -> None:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(48, 16, dtype=torch.float64), dim=-1) for _ in range(2))
    metrics = health_metrics(numbers(image, text), RANGE)
    cosine = (image @ text.T).numpy()
    others = cosine[~np.eye(48, dtype=bool)]
    assert metrics["health/positive_cosine"] == pytest.approx(np.diag(cosine).mean())
    assert metrics["health/negative_cosine"] == pytest.approx(others.mean())
    loss = numbers(image, text).loss.item()
    assert metrics["health/loss_over_chance"] == pytest.approx(loss / math.log(48))
    shares = np.linalg.svd(image.numpy(), compute_uv=False)
    shares /= shares.sum()
    assert metrics["health/image_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert (metrics["health/grad_norm_image"], metrics["health/grad_norm_text"]) == (3.0, 4.0)


def test_several_captions_count_as_pairs_of_their_image() -> None:
    torch.manual_seed(0)
    image = F.normalize(torch.randn(300, 16, dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.randn(300, 3, 16, dtype=torch.float64), dim=-1)
    metrics = health_metrics(numbers(image, texts.flatten(0, 1)), RANGE)
    for tag in ("positive_cosine", "negative_cosine", "loss_over_chance"):
        each = [health_metrics(numbers(image, texts[:, k]), RANGE)[f"health/{tag}"] for k in range(3)]
        assert metrics[f"health/{tag}"] == pytest.approx(np.mean(each)), tag
    assert metrics["health/text_rank"] == pytest.approx(effective_rank(texts[:256].flatten(0, 1)))


def test_the_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(5, 9)) == pytest.approx(5)
    assert effective_rank(torch.ones(40, 9)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.eye(3).repeat(20, 1)) == pytest.approx(3)


@pytest.mark.parametrize(("scale", "clamped"), [(100.0, 1.0), (1.0, 1.0), (14.0, 0.0)])
def test_a_temperature_at_its_bound_is_reported(scale: float, clamped: float) -> None:
    image = F.normalize(torch.randn(8, 4), dim=-1)
    assert health_metrics(numbers(image, image, scale), RANGE)["health/scale_at_clamp"] == clamped


def test_warnings_come_once_and_only_for_lasting_problems() -> None:
    monitor, warnings = HealthMonitor(256), []
    unhealthy = {"health/loss_over_chance": 0.999, "health/image_rank": 1.2, "health/text_rank": 90.0}
    healthy = {"health/loss_over_chance": 0.7, "health/image_rank": 80.0, "health/text_rank": 90.0}
    for step in (10, 200, 400, 600, 800):
        warnings += [(step, message[:20]) for message in monitor.check(step, healthy if step == 200 else unhealthy)]
    assert warnings == [(800, "the contrastive loss"), (800, "the embeddings have ")]
    assert list(monitor.check(2000, unhealthy)) == []


def test_a_run_that_learns_nothing_is_reported(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PATIENCE", 5)
    train(*FEW, "name=x", "max_steps=12", "optim.lr=1e-12", "evals=[]")
    log = (tmp_path / "outputs/x/train.log").read_text()
    assert log.count("the contrastive loss has stayed at ln(16) = 2.77, which is chance, for 5 steps or more") == 1
    assert {"health/image_rank", "health/scale_at_clamp"} <= lines(tmp_path / "outputs/x")[0].keys()


def test_collapsed_embeddings_are_reported(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PATIENCE", 5)
    read = Dummy.read
    monkeypatch.setattr(Dummy, "read", lambda data, number: read(data, 0))  # one picture, one caption
    train(*FEW, "name=x", "max_steps=8", "evals=[]")
    assert "the embeddings have collapsed for 5 steps or more" in (tmp_path / "outputs/x/train.log").read_text()
