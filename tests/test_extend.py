"""The examples of docs/extend.md work: models, data, losses and evaluations from outside clipx can be trained."""

import re
from pathlib import Path

import pytest
from conftest import FEW, ROOT, blocks, follow, lines, run_python, summary

from clipx import load

PAGE = ROOT / "docs/extend.md"
MINE = ("--config-dir", "mine/conf", "trust=[mine]")


def test_each_part_takes_less_than_twenty_lines() -> None:
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        code = "".join(re.findall(r"```(?:python|yaml)\n(.*?)```", section, re.DOTALL))
        assert 0 < len([line for line in code.splitlines() if line.strip()]) < 20, section.splitlines()[0]


@pytest.mark.long
def test_parts_from_outside_are_used_as_the_page_says(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(PAGE, reader)
    runs = {name: reader / "outputs" / name for name in ("conv", "rows", "smooth", "posterized", "gap", "booked")}
    assert all(summary(run)["state"] == "finished" for run in runs.values())

    monkeypatch.syspath_prepend(str(reader))
    model, _, _ = load(runs["conv"], trust=["mine"])
    assert type(model.visual).__name__ == "ConvTower" and (runs["conv"] / "metrics.json").exists()
    assert summary(runs["rows"])["config"]["data.train"] == "rows/train.jsonl"
    assert "320 pictures to train, 80 to validate" in (runs["rows"] / "train.log").read_text()
    assert summary(runs["gap"])["best"]["metric"] == "val/gap/closeness"
    scored = [row["val/gap/distance"] for row in lines(runs["gap"]) if "val/gap/distance" in row]
    assert scored and 0 < scored[-1] < 2 and '"gap"' in (runs["gap"] / "metrics.json").read_text()

    booked = f"booked finished at step 20: loss {summary(runs['booked'])['final']['train/loss']:.3f}\n"
    assert (reader / "book.txt").read_text() == booked

    result = run_python("-m", "clipx.train", "--config-dir", "mine/conf", "--help", cwd=reader)
    assert "conv              Convolutional image tower" in result.stdout
    result = run_python("-m", "clipx.train", *MINE[:2], "model=conv", cwd=reader)
    assert result.stderr.startswith("model.image._target_=mine.conv.ConvTower is not clipx's own code; trust=[mine]")
    for args, line in (
        (("model=conv", "model.image.widht=1"), "did you mean model.image.width?"),
        (("model=conv", "grad_checkpoint=true"), "ConvTower has no blocks to recompute"),
    ):
        result = run_python("-m", "clipx.train", *MINE, *args, cwd=reader)
        assert result.returncode == 1 and result.stderr.strip().endswith(line), result.stderr
    check_result = run_python("-m", "clipx.check", *MINE, "experiment=smoke", "model=conv", cwd=reader)
    assert check_result.returncode == 0, check_result.stderr


@pytest.mark.long
def test_a_loss_from_outside_is_exact_across_processes_and_micro_batches(tmp_path: Path) -> None:
    for block in blocks(PAGE):
        if block.file:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.text)
    args = ("-m", "clipx.train", *MINE, *FEW, "loss=smooth", "evals=[]", "max_steps=4")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for command in ((*args, "name=one"), (*args, "name=parts", "micro_batch_size=4"), (*two, *args, "name=two")):
        result = run_python(*command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    one, parts, ranks = (
        [row["train/loss"] for row in lines(tmp_path / "outputs" / name)] for name in ("one", "parts", "two")
    )
    assert len(set(one)) == 4
    assert parts == pytest.approx(one, rel=1e-4) and ranks == pytest.approx(one, rel=1e-4)
