"""Patch dropout: which patches a step leaves out, when, and what stays the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FEW, lines
from torch import Tensor

from clipx.models.vision import ImageEncoder, drop_patches

Train = Callable[..., None]


def tower(**arguments: int) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(32, 8, 16, 2, 2, 8, **arguments)


@pytest.mark.parametrize(("share", "kept"), [(0.5, 8), (0.75, 4), (0.1, 14), (0.99, 1)])
def test_the_class_token_stays_and_each_row_keeps_other_patches_once(share: float, kept: int) -> None:
    x = torch.arange(6 * 17.0)[:, None].expand(-1, 4).reshape(6, 17, 4).requires_grad_()
    found = drop_patches(x, share)
    assert found.shape == (6, kept + 1, 4) and torch.equal(found[:, 0], x[:, 0])
    rows = [row.tolist() for row in found[:, :, 0].long() - 17 * torch.arange(6)[:, None]]
    assert all(len({*row}) == kept + 1 and all(0 <= patch < 17 for patch in row) for row in rows)
    assert kept > 8 or len({tuple(row) for row in rows}) > 1
    found.sum().backward()
    assert x.grad is not None and x.grad.sum() == found.numel()  # what is left out has no gradient


def test_every_patch_is_kept_equally_often() -> None:
    kept = torch.bincount(
        drop_patches(torch.arange(17.0).expand(4000, 17)[..., None], 0.5).long().flatten(), minlength=17
    )
    assert kept[0] == 4000 and (kept[1:] / 4000 - 0.5).abs().max() < 0.05


def test_the_feature_is_that_of_a_tower_that_is_given_the_kept_patches_alone() -> None:
    visual, image = tower(registers=2), torch.randn(3, 3, 32, 32)
    visual.set_patch_dropout(0.5)
    visual.train()
    torch.manual_seed(1)
    found = visual(image)
    torch.manual_seed(1)
    kept = torch.rand(3, 16).topk(8).indices
    patches = image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(3, 16, -1)
    for row in range(3):
        x = patches[row, kept[row]] @ visual.conv1.weight.flatten(1).T + visual.positional_embedding[1 + kept[row]]
        first = visual.class_embedding + visual.positional_embedding[0]
        x = torch.cat([first[None], x, visual.register_tokens])[None]
        feature = visual.ln_post(visual.transformer(visual.ln_pre(x)))
        torch.testing.assert_close(found[row], (feature @ visual.proj)[0], atol=1e-4, rtol=1e-4)


def test_evaluation_and_a_share_of_0_see_all_patches_and_draw_nothing() -> None:
    visual, image = tower(), torch.randn(2, 3, 32, 32)
    expected = visual.eval()(image)
    visual.set_patch_dropout(0.5)
    state = torch.get_rng_state()
    assert torch.equal(visual(image), expected) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(visual.train()(image), expected)
    visual.set_patch_dropout(0)
    state = torch.get_rng_state()
    assert torch.equal(visual(image), expected) and torch.equal(torch.get_rng_state(), state)


def test_a_compiler_makes_one_graph_for_all_steps_and_one_for_the_end() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    visual = tower().train()
    compiled, image = torch.compile(visual, backend=backend, fullgraph=True), torch.randn(2, 3, 32, 32)
    for share, count in ((0.5, 1), (0.0, 2)):
        for _ in range(3):
            visual.set_patch_dropout(share)
            compiled(image)
        assert len(graphs) == count


@pytest.mark.parametrize(("until", "steps"), [("6", 6), ("2ep", 5), ("50%", 4), ("100%", 8), ("1", 1)])
def test_the_end_of_a_run_trains_on_all_patches(
    until: str, steps: int, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, float]] = []
    features = ImageEncoder.features

    def watch(self: ImageEncoder, image: Tensor) -> Tensor:
        seen.append((self.training, self.patch_dropout))
        return features(self, image)

    monkeypatch.setattr(ImageEncoder, "features", watch)
    train(*FEW, "evals=[]", "max_steps=8", "patch_dropout=0.5", f"patch_dropout_until={until}", "name=x")
    assert [share for training, share in seen if training] == [0.5] * steps + [0.0] * (8 - steps)
    said = Path("outputs/x/train.log").read_text()
    assert f"patches   a random 50% of each picture's, all from patch_dropout_until={until} on\n" in said


def test_micro_batches_leave_out_the_same_patches_as_the_whole_batch(train: Train) -> None:
    for name, size in (("whole", "null"), ("parts", "4")):
        keys = ("max_steps=4", "patch_dropout=0.5", f"micro_batch_size={size}", f"name={name}")
        train(*FEW, "evals=[]", *keys)
    whole, parts = ([line["train/loss"] for line in lines(Path(f"outputs/{name}"))] for name in ("whole", "parts"))
    assert whole == pytest.approx(parts, rel=1e-4) and len(whole) >= 4


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["patch_dropout=1"], "patch_dropout=1: should be less than 1"),
        (["patch_dropout_until=5min"], "patch_dropout_until='5min': should be steps (500), epochs (2ep) or a share"),
        (["model=tiny_resnet"], "patch_dropout=0.5: ResNetEncoder does not leave out patches; set 0"),
        (["freeze=[image]"], "patch_dropout=0.5 has no effect on a frozen tower; set 0"),
    ],
)
def test_a_mistake_ends_in_one_line(args: list[str], line: str, fails: Callable[..., str]) -> None:
    few = [arg for arg in FEW if not arg.startswith("model.") or "model=tiny_resnet" not in args]
    assert fails(*few, "patch_dropout=0.5", *args).startswith(line)
