import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

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
