import math
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipx import loss as loss_module
from clipx.loss import clip_loss


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_loss_equals_that_of_open_clip(dtype: torch.dtype, tolerance: float) -> None:
    image, text = (F.normalize(torch.randn(32, 16, dtype=dtype), dim=-1) for _ in range(2))
    scale = torch.tensor(1 / 0.07, dtype=dtype)
    assert clip_loss(image, text, scale).item() == pytest.approx(
        open_clip.ClipLoss()(image, text, scale).item(), rel=tolerance
    )


def test_features_that_say_nothing_cost_log_of_the_batch() -> None:
    same = F.normalize(torch.ones(8, 4), dim=-1)
    assert clip_loss(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(8))


def test_sides_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(3, 4\)"):
        clip_loss(torch.ones(2, 4), torch.ones(3, 4), torch.ones(()))


def test_rows_with_the_same_picture_or_caption_can_be_kept_from_being_negatives() -> None:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    scale = torch.tensor(10.0)
    distinct = torch.arange(12).view(6, 2)
    assert torch.equal(clip_loss(image, text, scale, distinct, "mask"), clip_loss(image, text, scale))
    ids = distinct.clone()
    ids[4, 0], ids[2, 1] = ids[1, 0], ids[3, 1]  # 1 and 4 share a picture, 2 and 3 share a caption
    logits, total = scale * image @ text.T, 0.0
    for row, same in enumerate([{0}, {1, 4}, {2, 3}, {2, 3}, {1, 4}, {5}]):
        others = [column for column in range(6) if column not in same - {row}]
        for view in (logits[row], logits[:, row]):
            total += torch.logsumexp(view[others], 0) - view[row]
    torch.testing.assert_close(clip_loss(image, text, scale, ids, "mask"), total / 12)
    assert torch.equal(clip_loss(image, text, scale, ids), clip_loss(image, text, scale))


@pytest.mark.parametrize("tile", [1, 7 * 20, 1 << 21])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_tiles_give_the_loss_and_gradient_of_open_clip(
    tile: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "TILE", tile)
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(20, 6, dtype=torch.float64), dim=-1) for _ in range(2))
    text[3] = -image[3]  # a pair pointing in opposite directions
    results = []
    for loss_fn in (clip_loss, open_clip.ClipLoss()):
        inputs = [x.clone().requires_grad_() for x in (image, text, torch.tensor(temperature, dtype=torch.float64))]
        loss = loss_fn(*inputs)
        (3 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_logits_far_apart_stay_finite() -> None:
    image = F.normalize(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), dim=-1).requires_grad_()
    loss = clip_loss(image, -image.detach(), torch.tensor(100.0))
    loss.backward()
    assert loss.item() == pytest.approx(200.0) and image.grad.isfinite().all()


def test_a_batch_of_one_caption_alone_has_a_finite_gradient_when_masked() -> None:
    image, text = (F.normalize(torch.eye(4), dim=-1).requires_grad_() for _ in range(2))
    loss = clip_loss(image, text, torch.tensor(10.0), torch.zeros(4, 2, dtype=torch.long), "mask")
    loss.backward()
    assert loss == 0 and image.grad.isfinite().all()


@pytest.mark.parametrize(("gigabytes", "largest"), [(80, 17_000), (24, 9_000), (8, 5_000)])
def test_on_a_gpu_the_logits_of_most_batches_are_one_tile(
    gigabytes: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: memory)
    logits = loss_module.logits_at_once(torch.device("cuda"), 4)
    assert largest**2 <= logits and logits * 4 <= gigabytes * 1e9 / 64
    assert loss_module.logits_at_once(torch.device("cuda"), 8) == logits // 2
    monkeypatch.setattr(loss_module, "logits_at_once", lambda *_: logits)
    assert [part for part, _ in loss_module.tiles(torch.ones(100, 2), torch.ones(()), largest)] == [slice(0, 100)]
    assert len([*loss_module.tiles(torch.ones(largest, 1), torch.ones(()), 4 * largest)]) > 1


def test_on_a_cpu_and_on_a_tiny_gpu_a_tile_holds_as_many_logits_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=10**6))
    assert (
        loss_module.logits_at_once(torch.device("cpu"), 4)
        == loss_module.logits_at_once(torch.device("cuda"), 4)
        == loss_module.TILE
    )
