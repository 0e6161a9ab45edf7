"""The table of all data sets, and its plot."""

import csv
import json
import sys
from pathlib import Path

import pytest

from clipx.config.runs import expand_runs
from clipx.errors import UserError
from clipx.tools.runs_table import to_markdown
from clipx.tools.score_table import check_outs, plot, read_scores, to_csv, to_rows, write_outs

SCORES = {
    "A": {
        "val/retrieval@b/i2t_r1": 0.1,
        "val/retrieval@b/mean_recall": 0.3,
        "val/zero_shot@a/top1": 0.5,
        "val/zero_shot@a/per_class/x/y": 1.0,
        "val/zero_shot@c/mean_average_precision": 0.7,
    },
    "B": {"val/retrieval@b/mean_recall": 0.4, "val/zero_shot@a/top1": 0.6, "val/mine@a/first": 2.0},
}


def test_the_table_has_the_main_score_of_each_set_and_the_mean() -> None:
    assert to_markdown(to_rows({"A": SCORES["A"]})) == (
        "| data | metric | A |\n| --- | --- | --- |\n"
        "| a | zero_shot top1 | 0.5 |\n| b | retrieval mean_recall | 0.3 |\n"
        "| c | zero_shot mean_average_precision | 0.7 |\n| mean of 3 |  | 0.5 |\n"
    )
    assert to_markdown(to_rows(SCORES)).splitlines()[-4:] == [
        "| a | zero_shot top1 | 0.5 | 0.6 |",
        "| b | retrieval mean_recall | 0.3 | 0.4 |",
        "| c | zero_shot mean_average_precision | 0.7 |  |",
        "| mean of 4 |  |  |  |",  # one score of each is missing
    ]


def test_every_score_is_a_line_of_the_csv() -> None:
    rows = list(csv.DictReader(to_csv(SCORES).splitlines()))
    found = {(row["weights"], f"val/{row['evaluation']}@{row['data']}/{row['metric']}"): row["value"] for row in rows}
    assert found == {(label, tag): str(value) for label, one in SCORES.items() for tag, value in one.items()}


def test_the_plot_has_bars_or_curves_over_steps_with_their_mean(tmp_path: Path) -> None:
    bars = plot(SCORES, None).axes[0]
    assert [patch.get_width() for patch in bars.patches] == [0, 0.5, 0.3, 0.7, 2.0, 0.6, 0.4, 0]
    late, early = {"val/z@a/top1": 0.5, "val/z@b/top1": 0.7}, {"val/z@a/top1": 0.1, "val/z@b/top1": 0.3}
    curves = plot({"late": late, "early": early}, [20, 10]).axes[0]
    assert [line.get_label() for line in curves.lines] == ["a z top1", "b z top1", "mean"]
    assert [[*line.get_xdata()] for line in curves.lines] == [[10, 20]] * 3
    assert [*curves.lines[2].get_ydata()] == pytest.approx([0.2, 0.6])
    outs = [str(tmp_path / f"x.{kind}") for kind in ("md", "csv", "png", "svg")]
    check_outs(outs)
    write_outs(outs, SCORES, None)
    assert Path(outs[2]).read_bytes().startswith(b"\x89PNG")
    assert Path(outs[0]).read_text() == to_markdown(to_rows(SCORES))


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^out=x.pdf: expected a name that ends in .md, .csv, .png, .svg$"):
        check_outs(["x.pdf"])
    with pytest.raises(UserError, match=r"^out=no/x.md: there is no directory no$"):
        check_outs(["no/x.md"])
    (tmp_path / "x.md").mkdir()
    with pytest.raises(UserError, match=r"x.md cannot be written: Is a directory$"):
        write_outs([str(tmp_path / "x.md")], SCORES, None)


def test_checkpoints_are_found_by_a_pattern_in_the_order_of_their_steps(tmp_path: Path) -> None:
    names = ["clip_last.pt", "clip_step_9.pt", "clip_step_10.pt"]
    for name in [*names, "notes.txt"]:
        (tmp_path / name).touch()
    assert [Path(path).name for path in expand_runs(f"{tmp_path}/*")] == names


def test_compare_puts_runs_side_by_side_over_their_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clipx.compare import main

    for name, value in (("one", 0.25), ("two", 0.5)):
        (tmp_path / name).mkdir()
        sets = {
            key: {"zero_shot": {"step": 4, "data": "x", "top1": value + add}} for key, add in (("a", 0), ("b", 0.1))
        }
        (tmp_path / name / "metrics.json").write_text(json.dumps({"checkpoints/clip_best.pt": sets}))
    assert read_scores([tmp_path])["two"] == {"val/zero_shot@a/top1": 0.5, "val/zero_shot@b/top1": 0.6}
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), "--sets", "--out", str(tmp_path / "x.md")])
    main()
    assert [line.split() for line in capsys.readouterr().out.splitlines()][1:] == [
        ["a", "zero_shot", "top1", "0.25", "0.5"],
        ["b", "zero_shot", "top1", "0.35", "0.6"],
        ["mean", "of", "2", "0.3", "0.55"],
    ]
    assert (tmp_path / "x.md").read_text().startswith("| data | metric | one | two |")
    (tmp_path / "one/metrics.json").write_text("[]")
    with pytest.raises(SystemExit, match="one/metrics.json was not written by clipx.evaluate"):
        main()
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), "--sets", "--metric", "x"])
    with pytest.raises(SystemExit, match="--sets goes with neither --against nor --metric"):
        main()
