import math
from collections.abc import Callable
from types import SimpleNamespace

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from clipx.loss import clip_loss, sigmoid_loss, tiles


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
    with pytest.raises(ValueError, match=r"\(2, 4\) and text features \(3, 4\) do not fit"):
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
    monkeypatch.setattr(tiles, "TILE", tile)
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
    logits = tiles.logits_at_once(torch.device("cuda"), 4)
    assert largest**2 <= logits and logits * 4 <= gigabytes * 1e9 / 64
    assert tiles.logits_at_once(torch.device("cuda"), 8) == logits // 2
    monkeypatch.setattr(tiles, "logits_at_once", lambda *_: logits)
    assert [part for part, _ in tiles.tiles(torch.ones(100, 2), torch.ones(()), largest)] == [slice(0, 100)]
    assert len([*tiles.tiles(torch.ones(largest, 1), torch.ones(()), 4 * largest)]) > 1


def test_on_a_cpu_and_on_a_tiny_gpu_a_tile_holds_as_many_logits_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=10**6))
    assert tiles.logits_at_once(torch.device("cpu"), 4) == tiles.logits_at_once(torch.device("cuda"), 4) == tiles.TILE


Matrix = torch.Tensor
ROWS, CAPTIONS = 10, 3


def related(ids: Matrix, captions: int) -> tuple[Matrix, Matrix]:
    """Which texts are those of an image, and which have its picture or one of its captions: (B, B K) each."""
    own = torch.eye(len(ids), dtype=torch.bool).repeat_interleave(captions, dim=1)
    alike = own.clone()
    for row, (picture, *texts) in enumerate(ids.tolist()):
        for column in range(len(ids) * captions):
            other, text = ids[column // captions, 0], ids[column // captions, 1 + column % captions]
            alike[row, column] |= bool(picture == other) or int(text) in texts
    return own, alike


def in_full(image: Matrix, text: Matrix, scale: Matrix, ids: Matrix, same: str, smoothing: float) -> Matrix:
    """``clip_loss`` with the whole matrix in memory."""
    own, alike = related(ids, len(text) // len(image))
    positives = alike if same == "positive" else own
    shown = ~alike | own if same == "mask" else torch.ones_like(own)
    logits = (scale * image @ text.T).masked_fill(~shown, -torch.inf)
    total = torch.zeros((), dtype=image.dtype)
    for view, hits, seen in ((logits, positives, shown), (logits.T, positives.T, shown.T)):
        hits, seen = hits.double(), seen.double()
        target = (1 - smoothing) * hits / hits.sum(1, keepdim=True) + smoothing * seen / seen.sum(1, keepdim=True)
        log_softmax = view.log_softmax(1).masked_fill(seen == 0, 0)
        total = total - (target * log_softmax).sum(1).mean() / 2
    return total


def sigmoid_in_full(image: Matrix, text: Matrix, scale: Matrix, bias: Matrix, ids: Matrix, same: str) -> Matrix:
    """``sigmoid_loss`` with the whole matrix in memory."""
    own, alike = related(ids, len(text) // len(image))
    positives = alike if same == "positive" else own
    shown = ~alike | own if same == "mask" else torch.ones_like(own)
    logits = scale * image @ text.T + bias
    return -(F.logsigmoid(torch.where(positives, logits, -logits)) * shown).sum() / len(text)


def batch_of(captions: int) -> tuple[Matrix, Matrix, Matrix]:
    """Images, texts and ids, some of which are equal."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(ROWS, 6, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(ROWS * captions, 6, dtype=torch.float64), dim=-1)
    return image, text, torch.stack([torch.randint(6, (ROWS,)), *torch.randint(100, 120, (captions, ROWS))], dim=1)


def with_gradients(loss_fn: Callable[..., Matrix], *inputs: Matrix) -> list[Matrix]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = loss_fn(*leaves)
    (3 * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("tile", [1, 7 * ROWS, 1 << 21])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("same", ["keep", "mask", "positive"])
@pytest.mark.parametrize("captions", [1, CAPTIONS])
def test_the_contrastive_loss_in_tiles_is_that_of_the_whole_matrix(
    captions: int, same: str, smoothing: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    image, text, ids = batch_of(captions)
    inputs = image, text, torch.tensor(7.0, dtype=torch.float64)
    ours = with_gradients(lambda *x: clip_loss(*x, ids, same, smoothing), *inputs)
    theirs = with_gradients(lambda *x: in_full(*x, ids, same, smoothing), *inputs)
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tile", [1, 7 * ROWS, 1 << 21])
@pytest.mark.parametrize("same", ["keep", "mask", "positive"])
@pytest.mark.parametrize("captions", [1, CAPTIONS])
def test_the_sigmoid_loss_in_tiles_is_that_of_the_whole_matrix(
    captions: int, same: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    image, text, ids = batch_of(captions)
    inputs = image, text, *torch.tensor([7.0, -3.0], dtype=torch.float64)
    ours = with_gradients(lambda *x: sigmoid_loss(*x[:3], ids, bias=x[3], same=same), *inputs)
    theirs = with_gradients(lambda *x: sigmoid_in_full(*x, ids, same), *inputs)
    assert len(ours) == len(theirs) == 5
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_the_sigmoid_loss_is_that_of_open_clip() -> None:
    image, text, _ = batch_of(1)
    inputs = image, text, *torch.tensor([10.0, -10.0], dtype=torch.float64)
    ours = with_gradients(lambda *x: sigmoid_loss(*x[:3], bias=x[3]), *inputs)
    theirs = with_gradients(open_clip.loss.SigLipLoss(), *inputs)
    assert len(ours) == len(theirs) == 5
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("same", ["mask", "positive"])
def test_where_all_rows_have_one_caption_the_gradients_are_finite(same: str) -> None:
    image, text, _ = batch_of(1)
    inputs = image, text, *torch.tensor([100.0, -10.0], dtype=torch.float64)
    ids = torch.zeros(ROWS, 2, dtype=torch.int64)
    found = with_gradients(lambda *x: clip_loss(*x[:3], ids, same, 0.1) + sigmoid_loss(*x[:3], ids, bias=x[3]), *inputs)
    assert all(x.isfinite().all() for x in found)
