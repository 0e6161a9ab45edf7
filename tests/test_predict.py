"""``python -m clipx.predict``: scores of pictures, and text-to-image search."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import command, last_line, picture, train_in
from PIL import Image

from clipx import load
from clipx.data.dummy import Dummy
from clipx.data.files import find_pictures

Predict = Callable[..., None]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a trained run and twelve of its pictures."""
    cwd = tmp_path_factory.mktemp("predict")
    train_in(cwd, "max_steps=30", "optim.lr=1e-3")
    (cwd / "pictures/deeper").mkdir(parents=True)
    for number in range(12):
        folder = cwd / "pictures" / ("deeper" if number % 2 else "")
        (folder / f"{number:02d}.png").write_bytes(Dummy(40, 32, 0).read(number).picture)
    return cwd


@pytest.fixture
def predict(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Predict:
    return command("predict", directory, monkeypatch)


TEXTS = ["a red circle in the upper left", "a blue bar in the lower right", "a green square"]


def test_scores_are_those_of_the_model(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    predict("run=outputs/x", "images=pictures/00.png", f"texts={', '.join(TEXTS)}", "json=true")
    rows = json.loads(capsys.readouterr().out)
    model, transform, tokenizer = load("outputs/x")
    with torch.no_grad():
        image, text, scale = model(transform(Image.open("pictures/00.png"))[None], tokenizer(TEXTS))
    chance = dict(zip(TEXTS, (scale * image @ text.T).softmax(dim=-1)[0].tolist(), strict=True))
    assert {row["text"]: row["probability"] for row in rows} == pytest.approx(chance, abs=1e-4)
    assert [row["probability"] for row in rows] == sorted(chance.values(), reverse=True) or len(rows) == 3
    assert sum(row["probability"] for row in rows) == pytest.approx(1, abs=1e-5)


def test_a_table_has_a_line_for_each_picture_and_text(
    predict: Predict, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "texts.txt").write_text("a red circle, to the left\na blue bar\n\n")
    predict("run=outputs/x/checkpoints/clip_last.pt", "images=pictures/*.png", "texts=texts.txt", "top=1")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["picture", "probability", "cosine", "text"]
    assert [line.split()[0] for line in lines] == [f"pictures/{number:02d}.png" for number in range(0, 12, 2)]
    assert all(line.endswith(("  a red circle, to the left", "  a blue bar")) for line in lines)


def test_a_search_shows_the_nearest_pictures(
    predict: Predict, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(
        "run=outputs/x", "images=pictures", f"search={TEXTS[0]}", "top=5", "json=true", "out=found.png", "workers=1"
    )
    rows = json.loads(capsys.readouterr().out)
    cosines = [row["cosine"] for row in rows]
    assert len(rows) == 5 and cosines == sorted(cosines, reverse=True)
    with Image.open(directory / "found.png") as grid:
        assert grid.width == 1200
    predict("run=outputs/x", "images=pictures", f"search={TEXTS[0]}", "top=50", "json=true")
    every = json.loads(capsys.readouterr().out)
    assert len(every) == 12 and every[:5] == rows


def test_an_unreadable_image_is_reported_and_left_out(
    predict: Predict, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = directory / "some"
    folder.mkdir()
    (folder / "good.png").write_bytes(picture(1))
    (folder / "bad.png").write_bytes(b"no picture")
    predict("run=outputs/x", "images=some", "texts=a,b", "top=1")
    captured = capsys.readouterr()
    assert "some/bad.png is left out: it does not decode" in captured.err and len(captured.out.splitlines()) == 2


def test_what_is_wrong_ends_in_one_line(predict: Predict, directory: Path) -> None:
    args = ("run=outputs/x", "images=pictures")
    assert last_line(predict, *args).startswith('give either texts="a cat,a dog", to score each picture')
    assert last_line(predict, *args, "texts=a", "search=b").startswith("give either")
    assert last_line(predict, *args, "texts=' , '") == 'texts= ,  is empty; expected, for example, "a cat,a dog"'
    for name in ("nosuch.txt", "lists/nosuch", "pictures", "my texts.TXT"):
        assert last_line(predict, *args, f"texts={name}").startswith(f"texts={name}: there is no such file; expected a")
    for encoding in ("utf-16", "latin-1"):
        (directory / "coded.txt").write_text("a café\na bar", encoding=encoding)
        assert "texts=coded.txt is not UTF-8 text, perhaps" in last_line(predict, *args, "texts=coded.txt")
    assert last_line(predict, "run=outputs/x", "images=none", "texts=a").startswith("images=none: no pictures found")
    assert "run=outputs/y: there is no such run, checkpoint or weights; there is outputs/x" in last_line(
        predict, "run=outputs/y", "images=pictures", "texts=a"
    )
    assert last_line(predict, *args, "search=b", "out=no/page.png").startswith("out=no/page.png cannot be written")
    assert last_line(predict, *args, "search=b", "out=page.xyz").startswith("out=page.xyz cannot be written")
    assert "run has no value; add run=" in last_line(predict, "images=pictures", "texts=a")


def test_twenty_prompts_fit_on_the_command_line(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"a photo of a red circle, number {number}".replace(",", ".") for number in range(20)]
    predict("run=outputs/x", "images=pictures/00.png", f"texts={','.join(texts)}", "top=20", "json=true")
    assert {row["text"] for row in json.loads(capsys.readouterr().out)} == set(texts)


def test_lines_of_a_file_of_texts_end_at_line_feeds_alone(
    predict: Predict, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "odd.txt").write_bytes("\ufeffa red circle\u2028on a wall\r\na blue bar\n".encode())
    predict("run=outputs/x", "images=pictures/00.png", "texts=odd.txt", "json=true")
    texts = {row["text"] for row in json.loads(capsys.readouterr().out)}
    assert texts == {"a red circle\u2028on a wall", "a blue bar"}


def test_pictures_are_found_below_home_and_not_in_the_directories_of_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "deep/b.png", ".ipynb_checkpoints/a.png", "deep/@eaDir/b.png", "._a.png"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_bytes(b"")
    assert find_pictures("~/mine") == [tmp_path / "mine/a.png", tmp_path / "mine/deep/b.png"]
