"""The terms of distillation against plain formulas over whole matrices, in float64."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_ranks
from torch import Tensor

from clipx import distributed
from clipx.loss import clip_loss, tiles
from clipx.loss.distill import Teacher, distill_loss, teacher_terms

OFF = {"feature": 0.0, "interactive": 0.0, "relational": 0.0}
N, E = 12, 6


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def inputs(captions: int = 1, width: int = E) -> tuple[list[Tensor], Teacher]:
    """Student's features and scale, and what the teacher gives: projections if its width is another."""
    torch.manual_seed(0)
    scale = torch.tensor(7.0, dtype=torch.float64)
    student = [x.requires_grad_() for x in (unit(N, E), unit(N * captions, E), scale)]
    projections = ()
    if width != E:
        image, text = (torch.randn(width, E, dtype=torch.float64, requires_grad=True) for _ in range(2))
        projections = image, text
    return student, Teacher(unit(N, width), unit(N * captions, width), torch.tensor(20.0).double(), projections)


def projected(student: list[Tensor], teacher: Teacher) -> list[Tensor]:
    if not teacher.projections:
        return student[:2]
    return [F.normalize(x @ weight.T, dim=1) for x, weight in zip(student, teacher.projections, strict=False)]


def plain_feature(student: list[Tensor], teacher: Teacher) -> Tensor:
    image, text = projected(student, teacher)
    return (image - teacher.image).square().mean() + (text - teacher.text).square().mean()


def plain_interactive(student: list[Tensor], teacher: Teacher, alike: Tensor | None = None) -> Tensor:
    image, text = projected(student, teacher)
    captions = len(text) // len(image)
    alike = torch.zeros(len(image), len(text), dtype=torch.bool) if alike is None else alike
    from_images = (student[2] * image @ teacher.text.T).masked_fill(alike, -torch.inf).softmax(dim=1)  # (N, M)
    from_texts = (student[2] * text @ teacher.image.T).masked_fill(alike.T, -torch.inf).softmax(dim=1)  # (M, N)
    pairs = [(row // captions, row) for row in range(len(text))]
    logs = [from_images[image, text].log() + from_texts[text, image].log() for image, text in pairs]
    return -torch.stack(logs).mean() / 2


def plain_relational(student: list[Tensor], teacher: Teacher) -> Tensor:
    image, text, scale = student
    logits, targets = scale * image @ text.T, teacher.scale * teacher.image @ teacher.text.T
    total = 0
    for found, expected in ((logits, targets), (logits.T, targets.T)):
        p, q = expected.softmax(dim=1), found.softmax(dim=1)
        total = total + (p * (p / q).log()).sum(dim=1).mean()
    return total / 2


PLAIN = {"feature": plain_feature, "interactive": plain_interactive, "relational": plain_relational}


@pytest.mark.parametrize("tile", [1, 5 * N, 1 << 21])
@pytest.mark.parametrize("width", [E, 10])
@pytest.mark.parametrize("term", PLAIN)
def test_each_term_is_that_of_a_whole_matrix(term: str, width: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    results = []
    for whole in (False, True):
        student, teacher = inputs(width=width)
        leaves = [*student, *teacher.projections]
        contrast = clip_loss(*student)
        loss = contrast + 3 * PLAIN[term](student, teacher)
        if not whole:
            loss = distill_loss(*student, teacher=teacher, **{**OFF, term: 3.0})
        (2 * loss).backward()
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        results.append([loss.detach(), *gradients])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_features_and_relations() -> None:
    student, _ = inputs()
    teacher = Teacher(*(x.detach() for x in student))
    loss = distill_loss(*student, teacher=teacher, feature=5.0, interactive=0.0, relational=5.0)
    assert loss.item() == pytest.approx(clip_loss(*student).item())


WEIGHTS = {"feature": 2.0, "interactive": 3.0, "relational": 4.0}


@pytest.mark.parametrize("tile", [1, 1 << 21])
@pytest.mark.parametrize("captions", [1, 3])
def test_equal_rows_can_be_kept_from_being_negatives(captions: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    student, teacher = inputs(captions)
    ids = torch.arange(N * (1 + captions)).view(N, 1 + captions)
    ids[4, 0], ids[2, 1] = ids[1, 0], ids[3, captions]  # 1 and 4 share a picture, 2 and 3 a caption
    alike = torch.zeros(N, N * captions, dtype=torch.bool)
    alike[1, 4 * captions : 5 * captions] = alike[4, captions : 2 * captions] = True
    alike[2, 3 * captions + captions - 1] = alike[3, 2 * captions] = True
    found = teacher_terms(*student, ids, teacher, **{**OFF, "interactive": 1.0})
    torch.testing.assert_close(found, plain_interactive(student, teacher, alike))
    if captions == 1:
        masked = clip_loss(*student, ids, "mask") + found
        only = {**OFF, "interactive": 1.0}
        torch.testing.assert_close(distill_loss(*student, ids, teacher=teacher, same="mask", **only), masked)


@pytest.mark.parametrize("captions", [1, 3])
def test_the_terms_add_up(captions: int) -> None:
    student, teacher = inputs(captions, width=10)
    expected = sum(weight * PLAIN[term](student, teacher) for term, weight in WEIGHTS.items())
    torch.testing.assert_close(teacher_terms(*student, None, teacher, **WEIGHTS), expected)
    if captions == 1:
        loss = distill_loss(*student, teacher=teacher, **WEIGHTS)
        torch.testing.assert_close(loss, clip_loss(*student) + expected)


def on_rank(rank: int, world: int, store: str, path: str) -> None:
    """Loss and gradients of one rank's share."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    (image, text, scale), teacher = inputs(captions=2, width=10)
    own = [x.detach()[distributed.local_slice(range(len(x)))].requires_grad_() for x in (image, text)]
    theirs = [x[distributed.local_slice(range(len(x)))] for x in (teacher.image, teacher.text)]
    taught = Teacher(*theirs, teacher.scale, teacher.projections)
    total = teacher_terms(*own, scale, None, taught, **WEIGHTS)
    total.backward()
    torch.save([total.detach(), *(x.grad for x in (*own, scale, *teacher.projections))], f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    run_ranks(on_rank, 2, str(tmp_path / "store"), str(tmp_path))
    (image, text, scale), teacher = inputs(captions=2, width=10)
    total = teacher_terms(image, text, scale, None, teacher, **WEIGHTS)
    total.backward()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in found:
        torch.testing.assert_close(rank[0], total.detach(), rtol=1e-10, atol=1e-12)
    sides = [torch.cat([rank[side] for rank in found]) / 2 for side in (1, 2)]  # of own rows, times the ranks
    shared = [sum(rank[number] for rank in found) / 2 for number in (3, 4, 5)]  # as DistributedDataParallel averages
    leaves = (image, text, scale, *teacher.projections)
    for actual, leaf in zip([*sides, *shared], leaves, strict=True):
        torch.testing.assert_close(actual, leaf.grad, rtol=1e-10, atol=1e-12)
