import pytest
import torch

from clipx.evals.figures import nearest


def test_a_caption_that_several_pictures_have_is_shown_once() -> None:
    captions = ["a cat", "a dog", "a cat", "a cow", "a pig", "a hen", "a bee"]
    found = nearest(captions, torch.tensor([0.1, 0.6, 0.9, 0.2, 0.3, 0.4, 0.0]))
    assert [caption for caption, _ in found] == ["a cat", "a dog", "a hen", "a pig", "a cow"]
    assert [value for _, value in found] == pytest.approx([0.9, 0.6, 0.4, 0.3, 0.2])
    assert nearest(["a cat", "a cat"], torch.tensor([0.1, 0.2])) == [("a cat", pytest.approx(0.2))]
