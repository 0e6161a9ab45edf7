from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipx.errors import UserError
from clipx.evals import retrieval as retrieval_module
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
    """The rank of the best correct item; incorrect items with an equal score rank before it."""
    ranks_found = []
    for row, items in zip(similarity, right, strict=True):
        best = max(row[item] for item in items)
        ranks_found.append(1 + sum(value >= best for item, value in enumerate(row) if item not in items))
    return ranks_found


@pytest.mark.parametrize(("tile", "cells"), [(3, 1 << 25), (1024, 1 << 25), (1024, 20)])
def test_recall_with_several_captions_a_picture_equals_a_count_by_hand(
    tile: int, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval_module, "TILE", tile)
    monkeypatch.setattr(retrieval_module, "CELLS", cells)
    torch.manual_seed(0)
    owners = [0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 6, 6, 6, 7]
    images = F.normalize(torch.randn(8, 4), dim=-1)
    texts = F.normalize(images[owners] + 0.8 * torch.randn(15, 4), dim=-1)
    metrics = retrieval(features(images, texts, owners), no_texts, ks=(1, 2, 5))
    similarity = (images @ texts.T).numpy()
    i2t = brute_force(similarity, [{t for t, owner in enumerate(owners) if owner == i} for i in range(8)])
    t2i = brute_force(similarity.T, [{owner} for owner in owners])
    for k in (1, 2, 5):
        assert metrics[f"i2t_r{k}"] == pytest.approx(np.mean([rank <= k for rank in i2t]))
        assert metrics[f"t2i_r{k}"] == pytest.approx(np.mean([rank <= k for rank in t2i]))
    for direction, ranking in (("i2t", i2t), ("t2i", t2i)):
        assert metrics[f"{direction}_median_rank"] == np.median(ranking)
        assert metrics[f"{direction}_mean_rank"] == pytest.approx(np.mean(ranking))
        assert metrics[f"{direction}_mrr"] == pytest.approx(np.mean(1 / np.array(ranking)))
    recalls = [metrics[f"{direction}_r{k}"] for direction in ("i2t", "t2i") for k in (1, 2, 5)]
    assert metrics["mean_recall"] == pytest.approx(np.mean(recalls)) and 0.3 < metrics["mean_recall"] < 1


def test_five_captions_a_picture_worked_out_by_hand() -> None:
    """Two pictures with five captions each, on a circle, so that angles in degrees give the similarities."""
    pictures, captions = torch.tensor([0.0, 90.0]), torch.tensor([50.0, 60, 70, 80, 85, 10, 40, 89, 91, 100])
    images, texts = (torch.stack([a.deg2rad().cos(), a.deg2rad().sin()], dim=1) for a in (pictures, captions))
    metrics = retrieval(features(images, texts, [0] * 5 + [1] * 5), no_texts, ks=(1, 2, 5))
    # picture at 0: 10 and 40 of the other picture are nearer than 50, so rank 3; at 90: 89 is its own, so rank 1
    assert [metrics[f"i2t_r{k}"] for k in (1, 2, 5)] == [0.5, 0.5, 1]
    assert (metrics["i2t_median_rank"], metrics["i2t_mean_rank"]) == (2, 2)
    assert metrics["i2t_mrr"] == pytest.approx((1 / 3 + 1) / 2)
    # nearer to the wrong picture: all captions of the one at 0, and 10 and 40 of the other
    assert [metrics[f"t2i_r{k}"] for k in (1, 2, 5)] == [0.3, 1, 1]
    assert metrics["t2i_mean_rank"] == pytest.approx(1.7) and metrics["t2i_mrr"] == pytest.approx(0.3 + 0.7 / 2)


def noisy_features(pictures: int, noise: float = 0.8) -> Features:
    """Pictures with five captions each, some of which are nearer to other pictures."""
    torch.manual_seed(1)
    owners = torch.arange(pictures).repeat_interleave(5)
    images = F.normalize(torch.randn(pictures, 8), dim=-1)
    return features(images, F.normalize(images[owners] + noise * torch.randn(len(owners), 8), dim=-1), owners.tolist())


def test_the_same_features_give_the_recall_of_clip_benchmark() -> None:
    from clip_benchmark.metrics import zeroshot_retrieval as peer

    val, ks = noisy_features(60, noise=0.4), (1, 5, 10)

    class IdentityModel:
        """A model whose inputs are features already."""

        encode_image = encode_text = staticmethod(lambda x: x)

    batches = [
        (val.images[start : start + 20], [val.texts[5 * i : 5 * i + 5] for i in range(start, start + 20)])
        for start in (0, 20, 40)
    ]
    theirs = peer.evaluate(IdentityModel, batches, torch.stack, "cpu", amp=False, recall_k_list=list(ks))
    ours = retrieval(val, no_texts, ks)
    for k in ks:
        assert ours[f"i2t_r{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
        assert ours[f"t2i_r{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
    assert 0.2 < ours["i2t_r1"] < 1


def test_intervals_are_those_of_drawing_pictures_again_and_the_same_each_time() -> None:
    val = noisy_features(400)
    metrics = retrieval(val, no_texts, bootstrap=500)
    assert metrics == retrieval(val, no_texts, bootstrap=500)
    means = [name for name in retrieval(val, no_texts) if not name.endswith("median_rank")]
    assert all(metrics[f"{name}_low"] < metrics[name] < metrics[f"{name}_high"] for name in means)
    p = metrics["i2t_r1"]  # one query per picture, so a binomial interval
    half_width = 1.96 * (p * (1 - p) / 400) ** 0.5
    assert metrics["i2t_r1_high"] - metrics["i2t_r1_low"] == pytest.approx(2 * half_width, rel=0.15)
    hits = (
        (retrieval_module.ranks(val.texts, val.images, torch.arange(2000), val.owners) <= 1)
        .double()
        .view(400, 5)
        .mean(dim=1)
    )
    half_width = 1.96 * hits.std().item() / 400**0.5  # five dependent queries per picture, so pictures are resampled
    assert metrics["t2i_r1_high"] - metrics["t2i_r1_low"] == pytest.approx(2 * half_width, rel=0.15)


def test_a_model_that_gives_one_answer_to_all_is_last_not_first() -> None:
    same = F.normalize(torch.ones(10, 4), dim=-1)
    for answer in (same, same * float("nan")):
        assert ranks(answer, answer, torch.arange(10), torch.arange(10)).tolist() == [10] * 10


def test_perfect_features_are_first() -> None:
    eye = torch.eye(6)
    metrics = retrieval(features(eye, eye, list(range(6))), no_texts)
    assert metrics["mean_recall"] == 1 and metrics["i2t_median_rank"] == 1


def test_naming_has_all_names_as_candidates_and_counts_any_picture_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\ndog\n")
    eye = torch.eye(4)
    # two pictures of a bee, one of a dog; one bee looks like a cow
    images = torch.stack([eye[1], eye[2], eye[3]])
    val = features(images, eye[[1, 1, 3]], [0, 1, 2], ["bee", "bee", "dog"])
    metrics = naming(val, lambda names: eye[: len(names)], str(tmp_path / "names.txt"), ks=(1, 2))
    assert metrics["i2t_r1"] == pytest.approx(2 / 3)
    assert metrics["t2i_r1"] == 1  # the bee by its better picture, and the dog
    assert set(metrics) >= {"shuffled_i2t_r1", "shuffled_t2i_r2", "shuffled_mean_recall"}


def test_naming_asks_for_a_list_that_has_all_names(tmp_path: Path) -> None:
    val = features(torch.eye(2), torch.eye(2), [0, 1], ["ant", "yak"])
    with pytest.raises(UserError, match="names=nowhere: there is no such file"):
        naming(val, no_texts, "nowhere")
    (tmp_path / "names.txt").write_text("ant\n")
    with pytest.raises(UserError, match="lacks 'yak'"):
        naming(val, no_texts, str(tmp_path / "names.txt"))
