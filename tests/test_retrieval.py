from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipx.errors import UserError
from clipx.evals import retrieval as room
from clipx.evals.features import Features
from clipx.evals.naming import naming
from clipx.evals.retrieval import ranks, retrieval


def features(
    images: torch.Tensor, texts: torch.Tensor, owners: list[int], captions: list[str] | None = None
) -> Features:
    names = captions or [f"caption {number}" for number in range(len(texts))]
    return Features(images, texts, torch.tensor(owners), names, torch.zeros(len(images), 3, 2, 2, dtype=torch.uint8), 0)


def no_texts(texts: list[str]) -> torch.Tensor:
    raise AssertionError("retrieval encodes no further texts")


def brute_force(similarity: np.ndarray, right: list[set[int]]) -> list[int]:
    """The rank of the best right item, counted by hand: wrong ones that are not worse stand before it."""
    found = []
    for row, items in zip(similarity, right, strict=True):
        best = max(row[item] for item in items)
        found.append(1 + sum(value >= best for item, value in enumerate(row) if item not in items))
    return found


@pytest.mark.parametrize("tile", [3, 1024])
def test_recall_with_several_captions_a_picture_equals_a_count_by_hand(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "TILE", tile)
    torch.manual_seed(0)
    owners = [0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 6, 6, 6, 7]
    images = F.normalize(torch.randn(8, 4), dim=-1)
    texts = F.normalize(images[owners] + 0.8 * torch.randn(15, 4), dim=-1)
    found = retrieval(features(images, texts, owners), no_texts, ks=(1, 2, 5))
    similarity = (images @ texts.T).numpy()
    i2t = brute_force(similarity, [{t for t, owner in enumerate(owners) if owner == i} for i in range(8)])
    t2i = brute_force(similarity.T, [{owner} for owner in owners])
    for k in (1, 2, 5):
        assert found[f"i2t_r{k}"] == pytest.approx(np.mean([rank <= k for rank in i2t]))
        assert found[f"t2i_r{k}"] == pytest.approx(np.mean([rank <= k for rank in t2i]))
    assert found["t2i_median_rank"] == np.median(t2i)
    six = [found[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 2, 5)]
    assert found["mean_recall"] == pytest.approx(np.mean(six)) and 0.3 < found["mean_recall"] < 1


def test_a_model_that_gives_one_answer_to_all_is_last_not_first() -> None:
    same = F.normalize(torch.ones(10, 4), dim=-1)
    assert ranks(same, same, torch.arange(10), torch.arange(10)).tolist() == [10] * 10


def test_perfect_features_are_first() -> None:
    eye = torch.eye(6)
    found = retrieval(features(eye, eye, list(range(6))), no_texts)
    assert found["mean_recall"] == 1 and found["i2t_median_rank"] == 1


def test_naming_has_all_names_as_candidates_and_counts_any_picture_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\ndog\n")
    eye = torch.eye(4)
    # two pictures of the bee, one of the dog; one bee looks like a cow
    images = torch.stack([eye[1], eye[2], eye[3]])
    val = features(images, eye[[1, 1, 3]], [0, 1, 2], ["bee", "bee", "dog"])
    found = naming(val, lambda names: eye[: len(names)], str(tmp_path / "names.txt"), ks=(1, 2))
    assert found["i2t_r1"] == pytest.approx(2 / 3)
    assert found["t2i_r1"] == 1                     # the bee by its good picture, and the dog
    assert set(found) >= {"shuffled_i2t_r1", "shuffled_t2i_r2", "shuffled_mean_recall"}


def test_naming_asks_for_a_list_that_has_all_names(tmp_path: Path) -> None:
    val = features(torch.eye(2), torch.eye(2), [0, 1], ["ant", "yak"])
    with pytest.raises(UserError, match="names=nowhere: there is no such file"):
        naming(val, no_texts, "nowhere")
    (tmp_path / "names.txt").write_text("ant\n")
    with pytest.raises(UserError, match="lacks 'yak'"):
        naming(val, no_texts, str(tmp_path / "names.txt"))
