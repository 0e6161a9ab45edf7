"""``prepare source=shards out=NEW``: choose from shards by features and by rules, and pack them again."""

import io
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import command, last_line, train_in, write_tar
from packed_data import dropped, metadata_of, read_tree, samples, sizes
from PIL import Image

from clipx import load
from clipx.data.dummy import Dummy
from clipx.tools import curation
from clipx.tools.embeddings import EvalEncoder
from clipx.tools.left_out import SHOWN

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file", "ignore:.*Exception ignored in")  # webdataset's own

RUN = ("source=shards", "src=pool", "out=new", "workers=0", "by=outputs/x", "device=cpu")
COUNT = 40  # pictures of the pool that are no copies
Command = Callable[..., None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run; and a pool of shards in which the captions of 10 pictures are shuffled and 8 others come twice."""
    cwd = tmp_path_factory.mktemp("curate")
    train_in(cwd, "max_steps=20", "optim.lr=1e-3", "evals=[]")
    shapes, members = [Dummy(COUNT, 32, 5).read(number) for number in range(COUNT)], []
    captions = [shape.captions[0] for shape in shapes]
    captions[:10] = [*captions[1:10], captions[0]]
    for number, (shape, caption) in enumerate(zip(shapes, captions, strict=True)):
        members += [(f"{number:02d}.png", shape.picture), (f"{number:02d}.txt", f"{caption} {number}".encode())]
    for number in range(20, 28):
        file = io.BytesIO()
        Image.open(io.BytesIO(shapes[number].picture)).convert("RGB").save(file, "JPEG", quality=90)
        members += [(f"c{number}.jpg", file.getvalue()), (f"c{number}.txt", f"a copy of {number}".encode())]
    write_tar(cwd / "pool/train/a.tar", members[:60])
    write_tar(cwd / "pool/train/b.tar", members[60:])
    write_tar(cwd / "pool/val/v.tar", [("v.png", shapes[0].picture), ("v.txt", b"kept as it is")])
    return cwd


@pytest.fixture
def cwd(made: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may change."""
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def prepare(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m clipx.prepare ARGUMENTS`` in this process."""
    return command("prepare", cwd, monkeypatch)


def features(cwd: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys of the pool's training samples, (N, E) unit vectors of the pictures and of the captions, one by one."""
    model, transform, tokenizer = load(cwd / "outputs/x")
    model.eval()
    found = samples(cwd / "pool")
    with torch.no_grad():
        images = [model.encode_image(transform(Image.open(io.BytesIO(one.picture)))[None], True)[0] for one in found]
        texts = [model.encode_text(tokenizer([one.captions[0]]), True)[0] for one in found]
    keys = [one.key for one in found]
    return keys, torch.stack(images).numpy(), torch.stack(texts).numpy()


def kept(out: Path) -> set[str]:
    """Keys, in the pool, of the training samples that were packed."""
    return {row["name"].rpartition("/")[2] for row in metadata_of(out)}


def greedy(images: np.ndarray, limit: float) -> dict[int, int]:
    """Rows that are similar to an earlier one that stays, and the most similar one, the plain way."""
    stay: list[int] = []
    found = {}
    for row, image in enumerate(images):
        cosine = images[stay] @ image
        if len(stay) and cosine.max() >= limit:
            found[row] = stay[int(cosine.argmax())]
        else:
            stay.append(row)
    return found


@pytest.mark.parametrize("tile", [7, 64, 1000])
def test_near_duplicates_are_those_of_the_plain_way_in_tiles_of_any_size(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curation, "TILE", tile)
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 16, generator=draw)
    rows = centres[torch.randint(40, (200,), generator=draw)] + 0.15 * torch.randn(200, 16, generator=draw)
    images = torch.nn.functional.normalize(rows, dim=1)
    found = curation.near_duplicates(images, 0.97, torch.device("cpu"))
    expected = greedy(images.numpy(), 0.97)
    assert {row: near.other for row, near in found.items()} == expected and 50 < len(expected) < 190
    for row, (other, cosine) in found.items():
        assert cosine == pytest.approx(float(images[row] @ images[other]), abs=1e-5)
    others = images[150:]
    overlapping = curation.overlaps(images[:150], others, 0.97, torch.device("cpu"))
    cosines = images[:150].numpy() @ others.numpy().T
    assert overlapping.keys() == {*np.flatnonzero(cosines.max(axis=1) >= 0.97)}
    assert {row: near.other for row, near in overlapping.items()} == {
        row: int(cosines[row].argmax()) for row in overlapping
    }


def test_what_is_left_out_follows_from_the_features_rule_by_rule(prepare: Command, cwd: Path) -> None:
    keys, images, texts = features(cwd)
    scores = dict(zip(keys, (images * texts).sum(axis=1), strict=True))
    twice = {keys[row]: keys[other] for row, other in greedy(images, 0.999).items()}
    prepare(*RUN, "max_similarity=0.999", "keep=0.5")
    rows = [json.loads(line) for line in (cwd / "new/dropped.jsonl").read_text().splitlines()]
    found = {row["picture"].rpartition("/")[2]: row for row in rows if "near-duplicate" in row["reason"]}
    assert {key: row["like"].rpartition("/")[2] for key, row in found.items()} == twice and len(twice) >= 8
    assert {f"c{number}" for number in range(20, 28)} <= twice.keys()  # the copies go, what they copy stays
    rest = sorted(scores.keys() - twice.keys(), key=lambda key: -scores[key])
    assert kept(cwd / "new") == {*rest[: round(0.5 * len(rest))]}
    report = json.loads((cwd / "new/report.json").read_text())
    assert report["dropped"] == {"is not among the best": len(rest) - round(0.5 * len(rest)), **report["dropped"]}
    assert report["scores"]["median"] == pytest.approx(float(np.median([*scores.values()])), abs=1e-3)
    limit = float(np.median([*scores.values()]))
    prepare(*RUN, f"min_score={limit}", "out=scored")
    assert kept(cwd / "scored") == {key for key, score in scores.items() if score >= limit}
    assert metadata_of(cwd / "scored", "val")[0]["name"] == "val/v.tar/v"  # validation samples all stay


def test_each_reason_has_a_page_with_the_picture_that_a_copy_is_like(prepare: Command, cwd: Path) -> None:
    prepare(*RUN, "max_similarity=0.999", "min_score=-1", "keep=0.9")
    pages = {path.name for path in (cwd / "new").glob("*.png")}
    assert pages == {"left_out-is_a_near_duplicate.png", "left_out-is_not_among_the_best.png"}
    pairs = min(SHOWN, sum("near-dup" in reason for reason in dropped(cwd / "new").values()))
    with Image.open(cwd / "new/left_out-is_a_near_duplicate.png") as page:
        assert page.height > 300 * (2 * pairs // 4)


@pytest.mark.parametrize("layout", ["pictures", "shards", "classes"])
def test_pictures_that_stand_in_an_evaluation_set_are_left_out(layout: str, prepare: Command, cwd: Path) -> None:
    found = {one.key: one for one in samples(cwd / "pool")}
    twins = [key for key in found if key.startswith("3")]
    if layout == "pictures":
        (cwd / "eval/cats").mkdir(parents=True)
        for key in twins:
            (cwd / f"eval/cats/{key}.png").write_bytes(found[key].picture)
    else:
        more = [("txt", b"some words")] if layout == "shards" else [("cls", b"0")]
        members = [(f"{key}.{kind}", data) for key in twins for kind, data in (("png", found[key].picture), *more)]
        write_tar(cwd / ("eval/0.tar" if layout == "shards" else "eval/test/0.tar"), members)
    prepare(*RUN, "exclude=[eval]", "exclude_similarity=0.999")
    rows = dropped(cwd / "new")
    assert {key.rpartition("/")[2] for key in rows} >= {*twins}
    assert all(
        re.match(r"stands in an evaluation set: cosine (1.000|0.999) to eval, .*3", reason) for reason in rows.values()
    )
    assert kept(cwd / "new") == found.keys() - rows.keys()


def test_a_killed_command_resumes_to_the_same_bytes_and_keeps_the_features(
    prepare: Command, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (*RUN, "max_similarity=0.999", "keep=0.5", "samples_per_shard=5")
    prepare(*args, "out=whole")

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("clipx.prepare.pack", kill)
        assert last_line(prepare, *args) == "interrupted; rerun the same command to resume"
    assert list((cwd / "new/.prepare/embeddings/img_emb").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(EvalEncoder, "encode_pictures", kill)  # nothing is encoded again
        prepare(*args)
    assert read_tree(cwd / "new") == read_tree(cwd / "whole")
    assert last_line(prepare, *args, "keep=0.6").startswith("out=new holds shards with other settings (keep=0.5 there")


def test_a_dry_run_reports_the_same_and_writes_nothing(
    prepare: Command, cwd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="clipx")
    args = (*RUN, "max_similarity=0.999", "keep=0.5", "min_words=3")
    prepare("source=shards", "src=pool")  # the indexes
    before = read_tree(cwd)
    caplog.clear()
    prepare(*args, "dry_run=true")
    assert read_tree(cwd) == before
    said = [record.getMessage() for record in caplog.records]
    assert said[-1] == "dry run: nothing was written"
    caplog.clear()
    prepare(*args)
    really = [record.getMessage() for record in caplog.records]
    about = ("left out", "scores", "          ")
    assert [line.partition(";")[0] for line in said if line.startswith(about)] == [
        line.partition("; see")[0].partition(";")[0] for line in really if line.startswith(about)
    ]
    assert sum(line.startswith(about) for line in said) == 6


def test_shards_are_packed_again_with_an_order_a_size_and_a_split_of_their_own(prepare: Command, cwd: Path) -> None:
    shutil.rmtree(cwd / "pool/val")
    args = ("source=shards", "src=pool", "workers=0", "samples_per_shard=10", "val=0.25", "encode=jpg")
    prepare(*args, "out=a")
    assert sizes(cwd / "a") == [9, 9, 9, 9] and sizes(cwd / "a", "val") == [6, 6]
    train, val = kept(cwd / "a"), {row["name"].rpartition("/")[2] for row in metadata_of(cwd / "a", "val")}
    assert train | val == {one.key for one in samples(cwd / "pool")} and not train & val
    captions = {one.captions[0]: Image.open(io.BytesIO(one.picture)).format for one in samples(cwd / "a")}
    assert {*captions.values()} == {"JPEG"} and {*captions} < {one.captions[0] for one in samples(cwd / "pool")}
    prepare(*args, "out=b", "seed=1")
    assert kept(cwd / "b") != train
    assert last_line(prepare, *args, "out=c", "val=0.001").startswith("val=0.001 of 48 pictures leaves a split empty")


def test_splits_by_name_are_kept(prepare: Command, cwd: Path) -> None:
    (cwd / "pool/val/v.tar").rename(cwd / "pool/x-validation-0.tar")
    for name in ("a", "b"):
        (cwd / f"pool/train/{name}.tar").rename(cwd / f"pool/x-train-{name}.tar")
    prepare("source=shards", "src=pool", "out=new", "workers=0")
    assert sizes(cwd / "new") == [48] and sizes(cwd / "new", "val") == [1]


def test_rules_on_shape_words_and_language(prepare: Command, cwd: Path) -> None:
    shutil.rmtree(cwd / "pool")

    def picture(width: int, height: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(file, "PNG")
        return file.getvalue()

    said = {
        "en": ["A man riding a wave on top of a surfboard in the sea", "wave"],
        "de": ["Ein Mann reitet auf einem Surfbrett eine Welle im Meer"],
        "fr": ["Un homme surfe sur une grande vague au bord de la mer", "A man rides a wave near the shore of the sea"],
        "short": ["wave"],
        "brand": ["nike air max"],  # too short to tell its language
        "long": ["word " * 40],
        "narrow": ["A man riding a wave on top of a surfboard"],
    }
    sides = {"narrow": (90, 20)}
    write_tar(
        cwd / "pool/0.tar",
        [
            member
            for key, captions in said.items()
            for member in (
                (f"{key}.png", picture(*sides.get(key, (40, 32)))),
                (f"{key}.json", json.dumps({"caption": captions}).encode()),
            )
        ],
    )
    prepare(
        "source=shards", "src=pool", "out=new", "workers=0",
        "languages=[en]", "min_words=2", "max_words=30", "max_aspect=3",
    )  # fmt: skip
    assert {row["name"]: row["caption"] for row in metadata_of(cwd / "new")} == {
        "0.tar/en": said["en"][:1],
        "0.tar/fr": said["fr"][1:],
        "0.tar/brand": said["brand"],
    }
    assert dropped(cwd / "new") == {
        "de": "its caption is in another language: de",
        "short": "its caption is too short: wave",
        "long": "its caption is too long: 40 words",
        "narrow": "is too narrow: 90 x 20 pixels",
    }


def test_a_wrong_command_is_refused_in_one_line_and_leaves_nothing(
    prepare: Command, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: str) -> str:
        return last_line(prepare, *args)

    prepare("source=shards", "src=pool")  # the indexes
    (cwd / "empty").mkdir()
    (cwd / "folder/images").mkdir(parents=True)
    (cwd / "folder/images/a.png").write_bytes(samples(cwd / "pool")[0].picture)
    (cwd / "folder/captions.txt").write_text("a.png\ta thing\n")
    before = read_tree(cwd)
    shards = ("source=shards", "src=pool", "out=new", "workers=0")
    assert refused(*shards, "keep=0.5").startswith("keep=0.5 needs the model whose features decide; ")
    assert refused(*RUN).startswith("by=outputs/x has no effect without a rule on features; add exclude=[DIR], ")
    assert refused(*RUN, "keep=0.5", "exclude_similarity=0.9").startswith("exclude_similarity=0.9 has no effect")
    assert refused(*RUN, "keep=1.5") == "keep=1.5: should be less than or equal to 1"
    assert refused(*RUN, "keep=0.5", "exclude=[empty]") == (
        "exclude=empty holds neither shards (*.tar, test/*.tar) nor pictures"
    )
    assert "no such" in refused(*RUN, "keep=0.5", "by=outputs/none")
    assert refused("source=shards", "src=pool", "keep=0.5", "by=outputs/x").startswith(
        "keep=0.5 has no effect on existing shards, which are only indexed and verified; leave it out, or add out=NEW"
    )
    assert refused(*shards, "languages=[xx]").startswith("languages=['xx']: lingua does not know xx; its codes are ")
    assert refused(*shards, "val=0.1").startswith("val=0.1 would split the training pictures, but src has val/; ")
    assert refused("source=folder", "src=folder", "out=new", "keep=0.5", "by=outputs/x") == (
        "keep=0.5 chooses among shards; pack these pictures, then use source=shards src=SHARDS out=NEW keep=0.5"
    )
    monkeypatch.setattr("clipx.data.prepare.caption_rules.find_spec", lambda name: None)
    assert refused(*shards, "languages=[en]").startswith("languages needs lingua, which is not installed; ")
    assert read_tree(cwd) == before
