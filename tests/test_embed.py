"""``python -m clipx.embed``, and ``clipx.predict`` on what it writes."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, last_line, merge_args, picture, run_ranks, train_in
from PIL import Image
from pyarrow.parquet import read_table

from clipx import load
from clipx.data.dummy import Dummy
from clipx.tools import index as index_module
from clipx.tools.index import Index, search_index
from clipx.training.lock import directory_lock

RUN = ("run=outputs/x", "workers=0", "device=cpu")
FOLDER = (*RUN, "data=folder", "data.root=pictures", "out=emb", "part_size=70")
Command = Callable[..., None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a trained run, and 150 pictures in a folder."""
    cwd = tmp_path_factory.mktemp("embed")
    train_in(cwd, "max_steps=20", "optim.lr=1e-3", "evals=[]")
    shapes, lines = Dummy(150, 32, 0), []
    (cwd / "pictures/images").mkdir(parents=True)
    for number in range(150):
        sample = shapes.read(number)
        (cwd / f"pictures/images/{number:03d}.png").write_bytes(sample.picture)
        lines += [f"{number:03d}.png\t{caption}\n" for caption in (*sample.captions, "another caption")]
    (cwd / "pictures/captions.txt").write_text("".join(lines))
    return cwd


@pytest.fixture
def cwd(made: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may change."""
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def embed(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m clipx.embed ARGUMENTS`` in this process."""
    return command("embed", cwd, monkeypatch)


@pytest.fixture
def predict(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m clipx.predict ARGUMENTS`` in this process."""
    return command("predict", cwd, monkeypatch)


def tree(directory: Path) -> dict[str, bytes]:
    """The bytes of all files below a directory, by name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def vectors(directory: Path, kind: str) -> np.ndarray:
    """All rows of an index, (N, E) fp16."""
    return np.concatenate([np.load(path) for path in sorted((directory / kind).glob(f"{kind}_*.npy"))])


def faiss_search(rows: np.ndarray, query: torch.Tensor, top: int) -> tuple[list[float], list[int]]:
    """Cosines and numbers of the rows nearest to a query, (N, E) and (E,), by faiss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of SWIG's types, on Python 3.12
        import faiss
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(rows.astype(np.float32))
    cosines, places = flat.search(query[None].numpy(), top)
    return cosines[0].tolist(), places[0].tolist()


def metadata(directory: Path) -> list[dict[str, str]]:
    return [row for path in sorted((directory / "metadata").glob("*.parquet")) for row in read_table(path).to_pylist()]


def test_a_row_has_the_features_of_a_picture_and_of_its_first_caption_and_where_it_is(
    embed: Command, cwd: Path
) -> None:
    embed(*FOLDER)
    rows = metadata(cwd / "emb")
    assert sorted(path.name for path in (cwd / "emb").iterdir()) == [
        "embed.json", "img_emb", "metadata", "parts", "text_emb",
    ]  # fmt: skip
    assert [path.name for path in sorted((cwd / "emb/img_emb").iterdir())] == [
        f"img_emb_000{part}.npy" for part in "012"
    ]
    assert [row["key"] for row in rows] == [
        f"{number:03d}.png" for number in range(150)
    ]  # held-out ones in their place
    assert [row["caption"] for row in rows] == [Dummy(150, 32, 0).read_captions(number)[0] for number in range(150)]
    assert {row["shard"] for row in rows} == {None}
    model, transform, tokenizer = load("outputs/x")
    with torch.no_grad():
        pictures = torch.stack([transform(Image.open(row["image_path"])) for row in rows])
        images, texts = (
            model.encode_image(pictures, True),
            model.encode_text(tokenizer([r["caption"] for r in rows]), True),
        )
    for kind, expected in (("img_emb", images), ("text_emb", texts)):
        found = vectors(cwd / "emb", kind)
        assert found.dtype == np.float16 and np.abs(found - expected.numpy()).max() < 1e-3
        assert np.abs(np.linalg.norm(found.astype(np.float32), axis=1) - 1).max() < 1e-3


def test_faiss_finds_what_predict_finds_and_its_pictures_are_drawn(
    embed: Command, predict: Command, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(*FOLDER)
    capsys.readouterr()
    text = "a red circle in the upper left"
    predict("run=outputs/x", "index=emb", f"search={text}", "top=20", "json=true", "out=page.png", "device=cpu")
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert "page.png shows them" in output.err
    with Image.open(cwd / "page.png") as page:
        assert page.width == 1200
    rows, (model, _, tokenizer) = metadata(cwd / "emb"), load("outputs/x")
    with torch.no_grad():
        query = model.encode_text(tokenizer([text]), True)[0]
    cosines, places = faiss_search(vectors(cwd / "emb", "img_emb"), query, len(rows))
    near = {rows[place]["image_path"]: cosine for cosine, place in zip(cosines, places, strict=True)}
    captions = {row["image_path"]: row["caption"] for row in rows}
    assert [near[row["image"]] for row in found] == pytest.approx(cosines[:20], abs=1e-6)  # but for ties
    assert [row["cosine"] for row in found] == pytest.approx(cosines[:20], abs=1e-6)
    assert [row["caption"] for row in found] == [captions[row["image"]] for row in found]
    assert len({row["image"] for row in found}) == 20


@pytest.mark.parametrize("top", [1, 7, 500])
def test_a_search_over_tiles_and_parts_is_exact(top: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "TILE", 16 * 8)
    index = Index(tmp_path, {"samples": 100, "part_size": 40})
    every = torch.nn.functional.normalize(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), dim=1).half()
    (tmp_path / "img_emb").mkdir()
    for number, part in enumerate(index.parts):
        np.save(index.path("img_emb", number), every[part.start : part.stop].numpy())
    hits = search_index(index, every[3].float(), top)
    cosines, places = faiss_search(every.numpy(), every[3].float(), min(top, 100))
    assert [40 * hit.part + hit.row for hit in hits] == places
    assert [hit.cosine for hit in hits] == pytest.approx(cosines, abs=1e-6)


def test_shards_give_key_and_tar_and_their_pictures_are_found_again(
    embed: Command, predict: Command, cwd: Path, make_shards: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(30, 20)
    embed(*RUN, "data=shards", "data.root=shards", "out=emb", "part_size=40")
    rows = metadata(cwd / "emb")
    assert [row["image_path"] for row in rows] == [row["key"] for row in rows] == [f"{n:05d}" for n in range(50)]
    assert [row["shard"] for row in rows] == [str(cwd / f"shards/part-00{number >= 30:d}.tar") for number in range(50)]
    assert [row["caption"] for row in rows] == [f"thing number {number}" for number in range(50)]  # the first of two
    capsys.readouterr()
    predict("run=outputs/x", "index=emb", "search=thing number 7", "top=8", "json=true", "out=page.png")
    output = capsys.readouterr()
    assert "not drawn" not in output.err and "page.png shows them" in output.err
    (cwd / "shards/part-000.tar").unlink()
    predict("run=outputs/x", "index=emb", "search=thing number 7", "top=50", "json=true", "out=page.png")
    output = capsys.readouterr()
    assert len(json.loads(output.out)) == 50 and "30 of the pictures are not drawn, as they" in output.err


KILLED = """
import os, signal
from clipx.data.files import write_atomic
from clipx.tools import index
from clipx.embed import main
def write(path, data):
    if path.name == {name!r}:
        path.with_name(path.name + ".writing-1").write_bytes(bytes(data)[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    write_atomic(path, data)
index.write_atomic = write
main()
"""


@pytest.mark.parametrize("name", ["text_emb_0001.npy", "parts_0002.json"])
def test_killed_and_rerun_it_writes_the_bytes_of_an_uninterrupted_run(name: str, embed: Command, cwd: Path) -> None:
    script = KILLED.format(name=name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script, *FOLDER], cwd=cwd, env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    before = {path: path.stat().st_mtime_ns for path in (cwd / "emb").glob("*/*_0000.*")}
    assert len(before) == 4 and list((cwd / "emb").glob("*/*.writing-1"))
    embed(*FOLDER)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # kept
    embed(*FOLDER, "out=whole")
    assert tree(cwd / "emb") == tree(cwd / "whole")


def test_a_damaged_part_is_refused_by_predict_and_written_again(embed: Command, predict: Command, cwd: Path) -> None:
    embed(*FOLDER)
    whole = tree(cwd / "emb")
    search = ("run=outputs/x", "index=emb", "search=a circle", "device=cpu")
    half = cwd / "emb/text_emb/text_emb_0001.npy"
    half.write_bytes(half.read_bytes()[:1000])
    (cwd / "emb/img_emb/img_emb_0002.npy").unlink()
    assert last_line(predict, *search) == (
        "index=emb: 2 of its 3 parts are missing or incomplete, such as img_emb_0001.npy; rerun the python -m "
        "clipx.embed that made it, to complete it"
    )
    flipped = cwd / "emb/metadata/metadata_0000.parquet"
    flipped.write_bytes(flipped.read_bytes()[:-200] + b"0" + flipped.read_bytes()[-199:])
    embed(*FOLDER)
    assert tree(cwd / "emb") == whole


def on_rank(rank: int, world: int, root: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=world)
    os.chdir(root)
    from clipx.embed import main

    sys.argv = ["clipx.embed", *merge_args(*FOLDER, "out=two", "part_size=40")]
    main()
    torch.distributed.destroy_process_group()


def test_two_ranks_and_any_number_of_workers_write_the_same_bytes(embed: Command, cwd: Path) -> None:
    embed(*FOLDER, "out=one", "part_size=40")
    embed(*FOLDER, "out=with_worker", "part_size=40", "workers=1")
    run_ranks(on_rank, 2, str(cwd))
    assert tree(cwd / "one") == tree(cwd / "with_worker") == tree(cwd / "two")


def test_training_and_validation_samples_are_embedded_apart_or_together(embed: Command, cwd: Path) -> None:
    keys = {}
    for split in ("all", "train", "val"):
        embed(*FOLDER, "data.val=0.2", f"split={split}", f"out={split}")
        keys[split] = [row["key"] for row in metadata(cwd / split)]
    assert (len(keys["all"]), len(keys["train"]), len(keys["val"])) == (150, 120, 30)
    assert sorted(keys["train"] + keys["val"]) == keys["all"]


def test_pictures_that_do_not_decode_are_left_out_and_listed(
    embed: Command, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cwd / "pictures/images/003.png").write_bytes(b"no picture")
    embed(*FOLDER)
    assert (
        "skipped 1 pictures, listed in parts/; for example images/003.png: does not decode" in capsys.readouterr().err
    )
    record = json.loads((cwd / "emb/parts/parts_0000.json").read_text())
    assert record["rows"] == 69 and [place for place, _ in record["skipped"]] == ["images/003.png"]
    assert len(np.load(cwd / "emb/img_emb/img_emb_0000.npy")) == 69
    keys = [row["key"] for row in metadata(cwd / "emb")]
    assert len(keys) == 149 and "003.png" not in keys


def test_a_part_may_be_empty_but_not_all_of_them(
    embed: Command, predict: Command, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(70):
        (cwd / f"pictures/images/{number:03d}.png").write_bytes(b"no picture")
    embed(*FOLDER)
    assert np.load(cwd / "emb/img_emb/img_emb_0000.npy").shape == (0, 192)
    capsys.readouterr()
    predict("run=outputs/x", "index=emb", "search=a circle", "top=200", "json=true")
    assert len(json.loads(capsys.readouterr().out)) == 80
    for number in range(70, 150):
        (cwd / f"pictures/images/{number:03d}.png").write_bytes(b"no picture")
    assert last_line(embed, *FOLDER, "out=none").startswith("none of the 150 pictures can be used, for example images/")


def test_without_room_on_the_disk_nothing_is_lost(embed: Command, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "text_emb_0001" in path.name:
            write(path, data[:50])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert last_line(embed, *FOLDER) == (
            "out=emb cannot be written: No space left on device; fix that and rerun the same command: the finished "
            "parts are kept"
        )
    assert not list((cwd / "emb").rglob("*.writing-*"))
    kept = (cwd / "emb/img_emb/img_emb_0000.npy").stat().st_mtime_ns
    embed(*FOLDER)
    assert (cwd / "emb/img_emb/img_emb_0000.npy").stat().st_mtime_ns == kept
    embed(*FOLDER, "out=whole")
    assert tree(cwd / "emb") == tree(cwd / "whole")


def test_a_directory_of_other_embeddings_or_of_other_files_is_refused(
    embed: Command, predict: Command, cwd: Path
) -> None:
    embed(*FOLDER)
    before = tree(cwd / "emb")
    shutil.copytree(cwd / "outputs/x", cwd / "outputs/y")
    (cwd / "other").mkdir()
    train_in(cwd / "other", "max_steps=1", "evals=[]", "seed=5")
    other = "run=other/outputs/x"
    assert last_line(embed, *FOLDER, other) == (
        "out=emb holds embeddings of other weights (run=outputs/x); choose another directory, or delete it"
    )
    assert last_line(predict, other, "index=emb", "search=a circle").startswith(
        "index=emb was made with other weights, run=outputs/x; search it with these, or embed the collection again"
    )
    embed(*FOLDER, "run=outputs/y")  # the same weights elsewhere
    (cwd / "pictures/images/000.png").write_bytes(picture(5))
    assert last_line(embed, *FOLDER).startswith("out=emb holds embeddings of other data (run=outputs/x); choose")
    (cwd / "pictures/images/000.png").write_bytes(Dummy(150, 32, 0).read(0).picture)
    assert last_line(embed, *FOLDER, "part_size=50") == (
        "out=emb was made with part_size=70, not 50; set it so, or choose another directory"
    )
    assert last_line(embed, *FOLDER, "out=pictures") == (
        "out=pictures holds captions.txt, but no embed.json; choose an empty or a new directory"
    )
    assert last_line(embed, *FOLDER, "out=pictures/captions.txt").startswith(
        "out=pictures/captions.txt cannot be written"
    )
    assert tree(cwd / "emb") == before
    (cwd / "emb/embed.json").write_text("{")
    assert last_line(embed, *FOLDER).startswith(
        "out=emb: emb/embed.json was not written by this version of embed (it is"
    )


def test_two_commands_do_not_write_the_same_directory(embed: Command, cwd: Path) -> None:
    holder = (
        "import sys; from pathlib import Path; from clipx.training.lock import directory_lock\n"
        "with directory_lock(Path('emb')): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder], cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        assert last_line(embed, *FOLDER).endswith(
            "works there; wait for it, stop it, or choose another directory: out=DIR"
        )
    finally:
        process.communicate("")
    with directory_lock(cwd / "emb"):
        pass


@pytest.mark.parametrize(
    ("name", "args", "line"),
    [
        ("embed", ["out=emb", "data=dummy"], "run has no value; add run=..."),
        ("embed", ["run=outputs/x", "data=dummy"], "out has no value; add out=..."),
        ("embed", ["run=outputs/z", "out=emb", "data=dummy"], "run=outputs/z: there is no such run"),
        ("embed", ["run=outputs/x", "out=emb"], "data has no value; add data=coco|folder|shards|... data.root=DIR"),
        ("embed", ["run=outputs/x", "out=emb", "data=dummy", "part_size=0"], "part_size=0: should be greater than 0"),
        (
            "embed",
            ["run=outputs/x", "out=emb", "data=folder", "data.root=pictures", "data.val=0", "split=val"],
            "split=val: data has no validation pictures; split=all embeds everything",
        ),
        ("predict", ["run=outputs/x", "search=a"], "give either images=DIR, or index=DIR, which clipx.embed has"),
        ("predict", ["run=outputs/x", "search=a", "images=pictures", "index=emb"], "give either images=DIR, or index="),
        ("predict", ["run=outputs/x", "texts=a", "index=emb"], "index=emb is searched by text: give search="),
        (
            "predict",
            ["run=outputs/x", "search=a", "index=emb"],
            "index=emb has no embed.json; make it: python -m clipx.",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(
    name: str, args: list[str], line: str, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert last_line(command(name, cwd, monkeypatch), *args).startswith(line)
    assert not (cwd / "emb").exists()


def test_without_pyarrow_both_commands_say_what_to_install(
    embed: Command, predict: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else find(name, *rest)
    )
    assert last_line(embed, *FOLDER) == "embed needs pyarrow to write metadata: pip install 'clipx[parquet]'"
    assert last_line(predict, "run=outputs/x", "index=emb", "search=a").startswith("index=emb needs pyarrow to be read")
