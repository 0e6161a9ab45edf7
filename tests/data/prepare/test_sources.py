"""Packing folders, imagefolders and tables: skipped rows are reported, unusable input is refused in one line."""

import json
import sys
from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from unicodedata import normalize

import pillow_heif
import pyarrow
import pyarrow.parquet
import pytest
from conftest import picture, write_tar
from packed_data import SOURCES, dropped, metadata_of, read_tree, samples, save, sizes
from PIL import Image

from clipx.data import images, sample
from clipx.data.images import decode
from clipx.data.prepare import encode
from clipx.data.prepare.rows import texts as texts_of
from clipx.data.sample import BadSample

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file", "ignore:.*Exception ignored in")  # webdataset's own


# ---------------------------------------------------------------- folders


def test_a_folder_is_read_by_its_listing_or_by_texts_beside_the_pictures(
    prepare: Callable[..., None], tmp_path: Path
) -> None:
    save(tmp_path / "a/images/x.PNG", picture(1))
    save(tmp_path / "a/images/deep/文.jpg", picture(2, "jpeg"))
    save(tmp_path / "a/captions.txt", "x.PNG\tone\ndeep/文.jpg\ttwo\nx.PNG\tuno\n")
    save(tmp_path / "b/x.y.png", picture(1))
    save(tmp_path / "b/x.y.txt", "one\n\n uno \n")
    save(tmp_path / "b/sub/文.jpeg", picture(2, "jpeg"))
    save(tmp_path / "b/sub/文.txt", "two")
    save(tmp_path / "b/sub/alone.png", picture(3))
    for split in ("train", "val"):
        save(tmp_path / f"c/{split}/p.png", picture(4))
        save(tmp_path / f"c/{split}/p.txt", split)
    for root in "abc":
        prepare("source=folder", f"src={root}", f"out=o{root}", "shuffle=false")
    both = {("images/x.PNG", "one uno"), ("images/deep/文.jpg", "two")}
    assert {(row["name"], " ".join(row["caption"])) for row in metadata_of(tmp_path / "oa")} == both
    both = {("x.y.png", "one uno"), ("sub/文.jpeg", "two")}
    assert {(row["name"], " ".join(row["caption"])) for row in metadata_of(tmp_path / "ob")} == both
    assert "has no caption" in (tmp_path / "ob/dropped.jsonl").read_text()
    assert [row["name"] for row in metadata_of(tmp_path / "oc", "val")] == ["val/p.png"]


def test_pictures_that_captions_txt_does_not_name_are_counted(prepare: Callable[..., None], tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / f"a/images/{number}.png", picture(number))
    save(tmp_path / "a/captions.txt", "0.png\tone\n./1.png\ttwo\n2.png\tthree\n")
    prepare("source=folder", "src=a", "out=o")
    assert json.loads((tmp_path / "o/report.json").read_text())["dropped"] == {"is not in captions.txt": 3}
    assert '"picture": "images/3.png", "reason": "is not in captions.txt"' in (tmp_path / "o/dropped.jsonl").read_text()


def test_pictures_of_every_ending_are_packed(prepare: Callable[..., None], tmp_path: Path) -> None:
    pillow_heif.from_pillow(Image.open(BytesIO(picture(1)))).save(tmp_path / "x.heic", quality=-1)
    heic = (tmp_path / "x.heic").read_bytes()
    files = dict.fromkeys(("jfif", "jpe", "JPG"), picture(1, "jpeg")) | {"heic": heic, "HEIF": heic}
    files |= {"avif": picture(1, "avif")} if "AVIF" in sample.DECODED else {}
    for ending, data in files.items():
        save(tmp_path / f"a/{ending}.{ending}", data)
        save(tmp_path / f"a/{ending}.txt", ending)
    prepare("source=folder", "src=a", "out=o", "shuffle=false")
    names = {row["name"] for row in metadata_of(tmp_path / "o")}
    assert names == {f"{ending}.{ending}" for ending in files}
    for number in range(len(names)):
        decoded = decode(samples(tmp_path / "o")[number].picture)
        assert decoded.size == (40, 32) and decoded.getpixel((20, 16))[2] <= 3


def test_an_image_whose_reader_is_not_installed_is_counted_with_the_install_command(
    prepare: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sample, encode, images):
        monkeypatch.setattr(module, "DECODED", ["JPEG", "PNG"])
    save(tmp_path / "a/1.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    save(tmp_path / "a/2.avif", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif")
    save(tmp_path / "a/3.png", picture(3))
    for number in (1, 2, 3):
        save(tmp_path / f"a/{number}.txt", "a thing")
    prepare("source=folder", "src=a", "out=o")
    assert json.loads((tmp_path / "o/report.json").read_text())["dropped"] == {
        "is HEIC, which needs an extra; pip install 'clipx[heic]'": 1,
        "is AVIF, which needs Pillow 11.3; pip install --upgrade pillow": 1,
    }
    with pytest.raises(BadSample, match="does not decode: it is HEIC, .*clipx.heic"):
        decode((tmp_path / "a/1.heic").read_bytes())


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.95])
def test_a_heic_that_is_cut_short_is_a_bad_sample(fraction: float, tmp_path: Path) -> None:
    pillow_heif.from_pillow(Image.open(BytesIO(picture(1)))).save(tmp_path / "x.heic")
    data = (tmp_path / "x.heic").read_bytes()
    with pytest.raises(BadSample):
        decode(data[: int(fraction * len(data))])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_imagefolder_is_read_by_its_metadata(
    kind: str, prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path
) -> None:
    names = [normalize("NFC", "b\u00e9b\u00e9.png"), "sub/2.png", "3.png"]
    for number, name in enumerate([normalize("NFD", names[0]), names[1], "alone.png"]):
        save(tmp_path / "f" / name, picture(number))
    rows = [{"file_name": name, "text": f"thing, {name}", "title": f"a {name}"} for name in names]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f/metadata.parquet")
    elif kind == "jsonl":
        save(tmp_path / "f/metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        save(tmp_path / "f/metadata.csv", "\n".join(lines))
    prepare("source=folder", "src=f", "out=o", "shuffle=false")

    packed = [(row["name"], row["caption"]) for row in metadata_of(tmp_path / "o")]
    assert packed == [(normalize("NFD", names[0]), [f"thing, {names[0]}"]), ("sub/2.png", ["thing, sub/2.png"])]
    assert json.loads((tmp_path / "o/report.json").read_text())["dropped"] == {
        f"is not in metadata.{kind}": 1,
        "there is no such file": 1,
    }
    prepare("source=folder", "src=f", "out=p", "source.caption=title")
    assert {row["caption"][0] for row in metadata_of(tmp_path / "p")} == {f"a {name}" for name in names[:2]}
    assert refused("source=folder", "src=f", "out=q", "source.caption=words") == (
        f"source.caption=words: f/metadata.{kind} has no such column; there are file_name, text, title"
    )


def test_an_imagefolder_may_have_splits(prepare: Callable[..., None], tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        save(tmp_path / f"f/{split}/1.png", picture(len(split)))
        save(tmp_path / f"f/{split}/metadata.csv", f"file_name,text\n1.png,{split}\n")
    with (tmp_path / "f/test/metadata.csv").open("a") as file:
        file.write("1.png,a,b\n")
    prepare("source=folder", "src=f", "out=o")
    captions = {split: metadata_of(tmp_path / "o", split)[0]["caption"] for split in ("train", "val", "test")}
    assert captions == {"train": ["train"], "val": ["validation"], "test": ["test"]}
    assert '"split": "test"' in (tmp_path / "o/dropped.jsonl").read_text()


def test_a_folder_that_training_cannot_read_is_refused_with_the_prepare_command(
    fails: Callable[..., str], prepare: Callable[..., None], tmp_path: Path
) -> None:
    save(tmp_path / "f/1.png", picture(1))
    save(tmp_path / "f/metadata.jsonl", '{"file_name": "1.png", "text": "a"}\n')
    message = fails("model=tiny", "data=folder", "data.root=f")
    args = message.partition("python -m clipx.prepare ")[2].partition(", then data=shards data.root=f-shards")[0]
    prepare(*args.split())
    assert metadata_of(tmp_path / "f-shards")[0]["caption"] == ["a"]


def test_a_folder_may_have_another_encoding(
    prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path
) -> None:
    save(tmp_path / "a/images/1.png", picture(1))
    save(tmp_path / "a/captions.txt", "1.png\tb\u00e9b\u00e9\n".encode("cp1252"))
    save(tmp_path / "b/1.png", picture(1))
    save(tmp_path / "b/1.txt", "b\u00e9b\u00e9\n".encode("utf-16"))
    for root, listing, encoding in (("a", "captions.txt", "cp1252"), ("b", "1.txt", "utf-16")):
        args = ("source=folder", f"src={root}", f"out=o{root}")
        message = refused(*args)
        assert message.startswith(f"{root}/{listing} cannot be read as source.encoding=utf-8")
        assert message.endswith("set its encoding, such as source.encoding=cp1252")
        assert refused(*args, "source.encoding=x").startswith(f"{root}/{listing} cannot be read as source.encoding=x")
        prepare(*args, f"source.encoding={encoding}")
        assert metadata_of(tmp_path / f"o{root}")[0]["caption"] == ["b\u00e9b\u00e9"]


def test_files_that_a_system_leaves_in_a_folder_are_no_pictures(prepare: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "a/0000.png", picture(1))
    save(tmp_path / "a/0000.txt", "a thing")
    for name in ("._0000.png", "@eaDir/0000.png", ".thumbnails/1.png"):
        save(tmp_path / "a" / name, b"\0\5\x16\7")
    save(tmp_path / "a/._0000.txt", b"\0\5\x16\7\xff")
    prepare("source=folder", "src=a", "out=o")
    assert sizes(tmp_path / "o") == [1] and dropped(tmp_path / "o") == {}


def test_a_caption_key_without_verify_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    write_tar(tmp_path / "s/a.tar", [("1.jpg", picture(1, "jpeg")), ("1.json", b'{"title": "a"}')])
    assert refused("source=shards", "src=s", "source.caption_key=title").startswith(
        "source.caption_key=title has no effect on an index; add verify=true"
    )


@pytest.mark.parametrize("given", ["resize=64", "encode=webp", "quality=90", "shuffle=false", "max_empty=0.5"])
def test_keys_that_shape_new_shards_are_refused_for_existing_ones(
    refused: Callable[..., str], tmp_path: Path, given: str
) -> None:
    write_tar(tmp_path / "s/a.tar", [("1.jpg", picture(1, "jpeg")), ("1.txt", b"a")])
    for more in ([], ["verify=true"]):
        message = refused("source=shards", "src=s", given, *more)
        assert message.replace('"', "").startswith(f"{given} has no effect on existing shards")


TEXT = "only on tables of text (.csv, .tsv); leave it out"
METADATA = "only on imagefolders (metadata.csv, metadata.jsonl, metadata.parquet); leave it out"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("source=csv src=t.jsonl source.encoding=cp1252", f"source.encoding=cp1252 has no effect on t.jsonl, {TEXT}"),
        ("source=csv src=t.jsonl source.sep=;", f"source.sep=; has no effect on t.jsonl, {TEXT}"),
        ("source=csv src=t.parquet source.quote='", f"source.quote=' has no effect on t.parquet, {TEXT}"),
        ("source=csv src=t source.sep=;", f"source.sep=; has no effect on t, {TEXT}"),
        ("source=csv src=t.parquet source.max_bad=1", "source.max_bad=1.0 has no effect on t.parquet, only on tables "
         "of text (.csv, .tsv) and .jsonl; leave it out"),
        ("source=csv src=t.jsonl source.timeout=3", "source.timeout=3.0 has no effect on t.jsonl, only on pictures "
         "that are URLs; leave it out"),
        ("source=csv src=t.csv source.connections=3", "source.connections=3 has no effect on t.csv, only on pictures "
         "that are URLs; leave it out"),
        ("source=folder src=a source.caption=b", f"source.caption=b has no effect on a/captions.txt, {METADATA}"),
        ("source=folder src=b source.max_bad=1", f"source.max_bad=1.0 has no effect on b with a .txt for each picture, "
         f"{METADATA}"),
        ("source=folder src=c source.image=b source.encoding=utf-16", "source.encoding=utf-16 has no effect on "
         "c/metadata.jsonl, only on captions.txt, .txt and metadata.csv; leave it out"),
    ],
)  # fmt: skip
def test_a_key_of_a_source_that_has_no_effect_is_refused(
    args: str, message: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    save(tmp_path / "t.jsonl", '{"a": "1.png", "b": "one"}')
    save(tmp_path / "t.csv", "a,b\n1.png,one\n")
    (tmp_path / "t").mkdir()
    for file in ("t.parquet", "t/t.parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"a": ["1.png"], "b": ["x"]}), tmp_path / file)
    for name in ("a/images/1.png", "b/1.png", "c/1.png"):
        save(tmp_path / name, picture(1))
    save(tmp_path / "a/captions.txt", "1.png\tone\n")
    save(tmp_path / "b/1.txt", "one")
    save(tmp_path / "c/metadata.jsonl", '{"b": "1.png", "text": "one"}')
    more = SOURCES["csv"] if "source=csv" in args else []
    assert refused(*args.split(), *more, "out=o") == message


# ---------------------------------------------------------------- tables


ROWS = [("p/a.png", "one, with a comma"), ("p/b.png", "two"), ("p/a.png", 'un "uno"'), ("p/b.png", "")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolon", "parquet", "directory"])
def test_a_table_of_any_kind_and_columns(kind: str, prepare: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "t/p/a.png", picture(1))
    save(tmp_path / "t/p/b.png", picture(2))
    columns = {"n": range(4), "the text": [text for _, text in ROWS], "file": [name for name, _ in ROWS]}
    src, more = f"t/t.{kind}", []
    if kind in ("parquet", "directory"):
        src = "t/t.parquet" if kind == "parquet" else "t"
        pyarrow.parquet.write_table(pyarrow.table({**columns, "n": list(range(4))}), tmp_path / "t/t.parquet")
    else:
        sep = {"csv": ",", "tsv": "\t", "semicolon": ";"}[kind]
        lines = [
            sep.join(columns),
            *(sep.join((str(n), '"' + text.replace('"', '""') + '"', name)) for n, (name, text) in enumerate(ROWS)),
        ]
        save(tmp_path / src, "\ufeff" + "\r\n".join(lines))
        more = {"semicolon": ["source.sep=;"], "tsv": ['source.quote="', r"source.sep=\t"]}.get(kind, [])
    prepare("source=csv", f"src={src}", "source.image=file", "source.caption=the text", "out=o", "shuffle=false", *more)
    assert [(row["name"], row["caption"]) for row in metadata_of(tmp_path / "o")] == [
        ("p/a.png", ["one, with a comma", 'un "uno"']),
        ("p/b.png", ["two"]),
    ]


def test_a_table_that_is_otherwise_is_refused_in_one_line(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "t.csv", "a,c\nx.png,one\n")
    args = ["source=csv", *SOURCES["csv"], "out=o"]
    assert refused(*args, "src=t.csv") == "source.caption=b: t.csv has no such column; there are a, c"
    save(tmp_path / "t.csv", b"a,b\nx.png,\xe9\n")
    message = refused(*args, "src=t.csv")
    assert message.startswith("t.csv cannot be read as source.encoding=utf-8") and "source.encoding=cp1252" in message
    assert refused(*args, "src=t.csv", "source.encoding=x").startswith("t.csv cannot be read as source.encoding=x")
    assert refused(*args, "src=t.csv", "source.sep=ab").startswith("t.csv cannot be read with source.sep='ab' and ")
    save(tmp_path / "t.csv", 'a,b\nx.png,"one\ny.png,two\n')
    assert refused(*args, "src=t.csv").startswith("t.csv, line 2: a quotation mark is never closed")
    save(tmp_path / "t.parquet", b"PAR1 and no more")
    assert refused(*args, "src=t.parquet").startswith("t.parquet is not a complete parquet file")
    pyarrow.parquet.write_table(pyarrow.table({"a": [b"bytes"], "b": ["x"]}), tmp_path / "t.parquet")
    assert refused(*args, "src=t.parquet").startswith("none of the 1 pictures for ")
    pyarrow.parquet.write_table(pyarrow.table({"a": [7], "b": ["x"]}), tmp_path / "t.parquet")
    assert refused(*args, "src=t.parquet") == "source.image=a holds int in t.parquet, not paths, URLs or pictures"
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x.png"], "b": [{"raw": "x"}]}), tmp_path / "t.parquet")
    assert refused(*args, "src=t.parquet").startswith("source.caption=b holds dict in t.parquet, not text")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(*args, "src=t.parquet") == "t.parquet needs pyarrow to be read: pip install 'clipx[parquet]'"


def packed_table(prepare: Callable[..., None], tmp_path: Path, name: str, text: str | bytes, *more: str) -> list[str]:
    """Captions packed from a table with columns image and caption; 0.png to 59.png exist."""
    for number in range(60):
        save(tmp_path / f"{number}.png", picture(number))
    save(tmp_path / name, text)
    args = ("source=csv", "source.image=image", "source.caption=caption", "shuffle=false")
    prepare(*args, f"src={name}", "out=o", *more)
    return [caption for row in metadata_of(tmp_path / "o") for caption in row["caption"]]


def test_rows_with_more_fields_than_the_header_are_listed_and_too_many_end_it(
    prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path
) -> None:
    rows = [f"{n}.png,thing {n}" + (", on a table" if n < 10 else "") for n in range(60)]
    captions = packed_table(prepare, tmp_path, "t.csv", "\n".join(["image,caption", *rows]))
    assert captions == [f"thing {n}" for n in range(10, 60)]
    assert json.loads((tmp_path / "o/report.json").read_text())["dropped"] == {"has more fields than the header": 10}
    assert (
        (tmp_path / "o/dropped.jsonl")
        .read_text()
        .startswith(
            '{"split": "train", "picture": "t.csv, line 2", "reason": "has more fields than the header: 3, not 2"}'
        )
    )
    save(tmp_path / "t.csv", "\n".join(["image,caption", *rows, "11.png,a,b"]))
    args = ("source=csv", "src=t.csv", "source.image=image", "source.caption=caption")
    assert refused(*args, "out=p").startswith("t.csv: 11 of 61 rows cannot be read, such as t.csv, line 2, which has ")
    prepare(*args, "out=p", "source.max_bad=0.5")


def test_a_field_beyond_what_csv_reads_costs_its_row_alone(prepare: Callable[..., None], tmp_path: Path) -> None:
    rows = [f"{n}.png,{'long ' * 40_000 if n == 5 else n}" for n in range(60)]
    captions = packed_table(prepare, tmp_path, "t.csv", "\n".join(["image,caption", *rows]))
    assert captions == [str(n) for n in range(60) if n != 5]
    assert '"t.csv, line 7", "reason": "cannot be parsed: ' in (tmp_path / "o/dropped.jsonl").read_text()


def test_quotation_marks_are_text_in_a_tsv(prepare: Callable[..., None], tmp_path: Path) -> None:
    texts = ['"a quote opens' if n in (10, 40) else f"thing {n}" for n in range(60)]
    rows = ["image\tcaption", *(f"{n}.png\t{text}" for n, text in enumerate(texts))]
    assert packed_table(prepare, tmp_path, "t.tsv", "\n".join(rows)) == texts


def test_a_table_may_be_lines_of_json(
    prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path
) -> None:
    text = '{"image": "1.png", "caption": ["a", "b"]}\nno json\n{"image": "2.png", "caption": "c"}\n{"image": "3.png"}'
    assert packed_table(prepare, tmp_path, "metadata.jsonl", text) == ["a", "b", "c"]
    assert json.loads((tmp_path / "o/report.json").read_text())["dropped"] == {
        "is not an object with 'image'": 1,
        "has no caption": 1,
    }
    args = ("source=csv", "src=metadata.jsonl", "source.image=image", "source.caption=text", "out=p")
    assert refused(*args) == "source.caption=text: metadata.jsonl has no such column; there are image, caption"


def test_fields_of_several_lines_are_reported(
    prepare: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert packed_table(prepare, tmp_path, "t.csv", 'image,caption\n1.png,"a\nb"\n2.png,c\n') == ["a\nb", "c"]
    assert "t.csv: 1 rows have multi-line fields, the first at line 2" in caplog.text


def test_a_table_may_have_another_encoding(prepare: Callable[..., None], tmp_path: Path) -> None:
    text = "image,caption\n1.png,bébé\n".encode("cp1252")
    assert packed_table(prepare, tmp_path, "t.csv", text, "source.encoding=cp1252") == ["bébé"]


def write_pictures(path: Path, count: int, first: int = 0, group: int = 3, inside: str = "struct") -> None:
    """A table as written by Hugging Face's datasets, with two captions per picture."""
    path.parent.mkdir(exist_ok=True)
    numbers = range(first, first + count)
    files = [picture(number, "jpeg") for number in numbers]
    column = files if inside == "bytes" else [{"bytes": file, "path": "x.jpg"} for file in files]
    table = pyarrow.table({"image": column, "caption": [[f"thing {number}", "a thing"] for number in numbers]})
    pyarrow.parquet.write_table(table, path, row_group_size=group)


PARQUET = ("source=csv", "source.image=image", "source.caption=caption")


@pytest.mark.parametrize("inside", ["bytes", "struct"])
def test_pictures_inside_a_parquet_table_are_packed(inside: str, prepare: Callable[..., None], tmp_path: Path) -> None:
    write_pictures(tmp_path / "p/a.parquet", 8, inside=inside)
    write_pictures(tmp_path / "p/b.parquet", 4, first=8, inside=inside)
    orders = {}
    for out, more in {"plain": ["shuffle=false"], "a": [], "b": ["workers=2"], "c": ["seed=1"]}.items():
        prepare(*PARQUET, "src=p", f"out={out}", "samples_per_shard=5", *more)
        packed = samples(tmp_path / out)
        assert all(one.picture == picture(int(one.key), "jpeg") for one in packed)
        assert all(one.captions == [f"thing {int(one.key)}", "a thing"] for one in packed)
        orders[out] = [int(one.key) for one in packed]
    assert [row["name"] for row in metadata_of(tmp_path / "plain")][6:9] == [
        "a.parquet, row 6",
        "a.parquet, row 7",
        "b.parquet, row 0",
    ]
    assert orders["plain"] == list(range(12)) == sorted(orders["a"])
    assert orders["a"] == orders["b"] != orders["c"] and orders["a"] != orders["plain"]
    groups = [number // 3 if number < 8 else 3 + (number - 8) // 3 for number in orders["a"]]
    assert sum(one != other for one, other in pairwise(groups)) == 4  # rows of a group stay together


def test_cells_without_a_picture_are_counted_and_a_path_in_place_of_bytes_is_read(
    prepare: Callable[..., None], tmp_path: Path
) -> None:
    cells = [
        {"bytes": picture(1), "path": None},
        {"bytes": None, "path": "2.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"no", "path": "x"},
        {"bytes": None, "path": "no.png"},
        {"bytes": picture(1), "path": "again"},
    ]
    captions = ["one", "two", "three", "four", "five", "six", None]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "caption": captions}), tmp_path / "t.parquet")
    save(tmp_path / "2.png", picture(2))
    prepare(*PARQUET, "src=t.parquet", "out=o", "shuffle=false")
    assert [row["caption"] for row in metadata_of(tmp_path / "o")] == [["one"], ["two"]]
    assert dropped(tmp_path / "o") == {
        "t.parquet, row 2": "its cell is empty",
        "t.parquet, row 3": "its cell is empty",
        "t.parquet, row 4": "is not a picture",
        "t.parquet, row 5": "there is no such file",
        "t.parquet, row 6": "has no caption",
    }
    prepare(*PARQUET, "src=t.parquet", "out=p", "shuffle=false", "drop_duplicates=true")
    assert dropped(tmp_path / "p")["t.parquet, row 6"] == "is a duplicate: of t.parquet, row 0"


def test_a_damaged_group_of_rows_costs_its_pictures_alone(prepare: Callable[..., None], tmp_path: Path) -> None:
    write_pictures(tmp_path / "t.parquet", 9)
    with pyarrow.parquet.ParquetFile(tmp_path / "t.parquet") as file:
        offset = file.metadata.row_group(1).column(0).data_page_offset
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    data[offset : offset + 40] = bytes(40)
    save(tmp_path / "t.parquet", bytes(data))
    prepare(*PARQUET, "src=t.parquet", "out=o", "shuffle=false")
    assert [one.captions[0] for one in samples(tmp_path / "o")] == [f"thing {n}" for n in (0, 1, 2, 6, 7, 8)]
    assert json.loads((tmp_path / "o/report.json").read_text())["dropped"] == {
        "its part of the parquet file is corrupt": 3
    }


def test_captions_that_are_structs_are_refused_and_nan_counts_as_missing(
    prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path
) -> None:
    save(tmp_path / "1.png", picture(1))
    save(tmp_path / "2.png", picture(2))
    rows = {
        "image": ["1.png", "2.png"],
        "caption": [{"raw": "a"}, {"raw": "b"}],
        "sentences": [[{"raw": "a"}]] * 2,
        "number": [1.0, float("nan")],
        "nan": [float("nan"), None],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    for column, kind in (("caption", "dict"), ("sentences", "dict"), ("number", "float")):
        args = ("source=csv", "src=t.parquet", "source.image=image", f"source.caption={column}", "out=o")
        assert refused(*args) == (
            f"source.caption={column} holds {kind} in t.parquet, not text or lists of text; choose a text column"
        )
    args = ("source=csv", "src=t.parquet", "source.image=image", "source.caption=nan", "out=o")
    assert refused(*args).endswith("has no picture with a caption")
    save(tmp_path / "t.jsonl", '{"image": "1.png", "caption": "a"}\n{"image": "2.png", "caption": NaN}\n')
    prepare(*PARQUET, "src=t.jsonl", "out=o")
    assert json.loads((tmp_path / "o/report.json").read_text())["dropped"] == {"has no caption": 1}


def test_paths_of_a_table_match_in_any_unicode_normalisation(prepare: Callable[..., None], tmp_path: Path) -> None:
    name = "b\u00e9b\u00e9/1.png"
    save(tmp_path / normalize("NFD", name), picture(1))
    save(tmp_path / "t.csv", f"image,caption\n{normalize('NFC', name)},a\n")
    prepare(*PARQUET, "src=t.csv", "out=o")
    assert sizes(tmp_path / "o") == [1]


def test_a_tab_may_be_given_as_its_escape(prepare: Callable[..., None], tmp_path: Path) -> None:
    assert packed_table(prepare, tmp_path, "t.txt", "image\tcaption\n1.png\ta, b\n", r"source.sep=\t") == ["a, b"]


def test_a_caption_that_is_nan_is_missing() -> None:
    assert [texts_of(value, "") for value in (float("nan"), None, [None, float("nan")])] == [[], [], []]
    assert texts_of(["a", None, "b"], "") == ["a", "b"]


# ---------------------------------------------------------------- empty shards


def make_missing(root: Path, existing: set[int]) -> None:
    """A listing of twelve pictures, of which only ``existing`` are on disk."""
    save(root / "captions.txt", "".join(f"{n}.png\tthing {n}\n" for n in range(12)))
    (root / "images").mkdir(exist_ok=True)
    for n in existing:
        save(root / f"images/{n}.png", picture(n))


def test_an_empty_shard_is_left_out_reported_and_bounded(
    prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_missing(tmp_path / "a", set(range(12)) - {4, 5, 6, 7})
    args = ("source=folder", "src=a", "shuffle=false")
    prepare(*args, "samples_per_shard=4", "out=o")
    assert sizes(tmp_path / "o") == [4, 4]
    assert len(dropped(tmp_path / "o")) == 4
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert report["empty"] == ["train/folder-train-000001.tar"] and report["dropped"] == {"there is no such file": 4}
    assert (
        "o/train/folder-train-000001.tar is not written: none of its 4 pictures can be used (4 there is no such "
        "file; such as images/4.png)"
    ) in caplog.text
    message = refused(*args, "samples_per_shard=2", "out=p")
    assert message.endswith(
        "; fix that and rerun the same command to resume, or set max_empty=1 to leave out the 2 empty shards"
    )
    prepare(*args, "samples_per_shard=2", "out=p", "max_empty=1", "workers=2")
    assert sizes(tmp_path / "p") == [2, 2, 2, 2]
    report = json.loads((tmp_path / "p/report.json").read_text())
    assert report["empty"] == ["train/folder-train-000002.tar", "train/folder-train-000003.tar"]


def test_empty_shards_are_retried_by_the_same_command(
    prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path
) -> None:
    args = ("source=folder", "src=a", "samples_per_shard=2", "shuffle=false")
    make_missing(tmp_path / "a", {0, 1, 2, 3, 8, 9})
    assert "000003.tar" in refused(*args, "out=o")
    make_missing(tmp_path / "a", set(range(12)))
    prepare(*args, "out=o")
    prepare(*args, "out=whole")
    assert read_tree(tmp_path / "o") == read_tree(tmp_path / "whole")


def test_only_where_nothing_at_all_can_be_used_no_max_empty_helps(refused: Callable[..., str], tmp_path: Path) -> None:
    make_missing(tmp_path / "a", set())
    args = ("source=folder", "src=a", "samples_per_shard=3", "max_empty=1", "out=o")
    assert refused(*args).startswith("none of the 3 pictures for o/train/folder-train-000003.tar can be used (3 ")
    assert list((tmp_path / "o").iterdir()) == []
