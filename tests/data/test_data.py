"""Captions, sources and held-out samples."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FEW, picture, run_python, summary, write_tar

from clipx.data import handles
from clipx.data.captions import read_captions
from clipx.data.dummy import open_dummy
from clipx.data.emoji import THINGS, open_emoji
from clipx.data.folder import open_folder
from clipx.data.images import decode
from clipx.data.mix import open_mix
from clipx.data.sample import BadSample, hold_out
from clipx.data.shards import open_shards
from clipx.data.tar.headers import DataError
from clipx.tools.findings import check_data


@pytest.mark.parametrize(
    ("members", "key", "captions"),
    [
        ({"txt": b" a cat \n"}, None, ["a cat"]),
        ({"txt": "导盲犬".encode(), "json": b"{}"}, None, ["导盲犬"]),
        ({"json": b'{"caption": "one"}'}, None, ["one"]),
        ({"json": b'{"caption": ["one", "two"]}'}, None, ["one", "two"]),
        ({"txt": b"x", "json": b'{"alt": ["one", " "]}'}, "alt", ["one"]),
    ],
)
def test_captions_come_from_txt_or_json(members: dict[str, bytes], key: str | None, captions: list[str]) -> None:
    assert read_captions(members, key) == captions


@pytest.mark.parametrize(
    ("members", "key", "reason"),
    [
        ({}, None, "no caption"),
        ({"txt": b"  \n"}, None, "empty"),
        ({"txt": b"\xff\xfe"}, None, "not UTF-8"),
        ({"json": b'{"caption": "\xff"}'}, None, "not UTF-8"),
        ({"json": b"{"}, None, "json cannot be read"),
        ({"json": b"[1]"}, "alt", "json is not an object with 'alt'"),
        ({"json": b'{"alt": "x", "url": "y"}'}, None, "no 'caption'; its keys: alt, url; .*: data.caption_key=KEY"),
        ({"json": b"{}"}, None, "no 'caption'; its keys: none"),
        ({"json": b'{"alt": 5}'}, "alt", "neither text"),
        ({"json": b'{"caption": []}'}, None, "empty"),
    ],
)
def test_a_sample_without_a_usable_caption_is_bad(members: dict[str, bytes], key: str | None, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        read_captions(members, key)


def test_a_directory_with_train_and_val_uses_both(make_shards: Callable[..., Path]) -> None:
    root = make_shards(4, folder="set/train").parent
    make_shards(3, folder="set/val")
    data = open_shards(str(root))
    assert list(data.train.sizes) == [4] and list(data.val.sizes) == [3]
    sample = data.train.read(2)
    assert sample.key == "00002" and sample.captions[0] == "thing number 2" and decode(sample.picture).size == (40, 32)
    assert data.train.locate(2) == "part-000.tar/00002"


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "test"])
def test_validation_shards_are_found_under_their_other_names_and_the_log_says_where(
    name: str, make_shards: Callable[..., Path]
) -> None:
    root = make_shards(4, folder="set/train").parent
    make_shards(3, folder=f"set/{name}")
    data = open_shards(str(root))
    assert list(data.train.sizes) == [4] and list(data.val.sizes) == [3]
    assert data.notes == [f"validating on {root / name}"]
    other = make_shards(2, folder="set/val")
    assert list(open_shards(str(root)).val.sizes) == [2]
    named = open_shards(str(root), val=str(other))
    assert list(named.val.sizes) == [2] and named.notes == []


def test_shards_of_one_directory_are_told_apart_by_their_names(tmp_path: Path) -> None:
    """As in pixparse/cc3m-wds."""
    for name, number in (("cc3m-train-0000", 1), ("cc3m-train-0001", 2), ("cc3m-validation-0000", 3)):
        members = [(f"{number:09d}.jpg", picture(number, "jpeg")), (f"{number:09d}.txt", b"a thing")]
        write_tar(tmp_path / f"cc3m/{name}.tar", [*members, (f"{number:09d}.json", b'{"url": "x"}')])
    data = open_shards(str(tmp_path / "cc3m"), made_by="cc3m")
    assert list(data.train.sizes) == [1, 1] and list(data.val.sizes) == [1]
    assert data.val.locate(0) == "cc3m-validation-0000.tar/000000003"
    assert data.notes == [f"validating on {tmp_path / 'cc3m/cc3m-validation-0000.tar'} and its like"]
    write_tar(tmp_path / "cc3m/more.tar", [("9.jpg", picture(9, "jpeg")), ("9.txt", b"a thing")])
    assert list(open_shards(str(tmp_path / "cc3m"), val=0).train.sizes) == [1, 1, 1, 1]  # not all names tell
    (tmp_path / "cc3m/more.tar").unlink()
    (tmp_path / "cc3m/train").mkdir()
    (tmp_path / "cc3m/cc3m-train-0000.tar").rename(tmp_path / "cc3m/train/0.tar")
    assert open_shards(str(tmp_path / "cc3m"), val=0).val is None


def test_validation_shards_do_not_train_and_the_log_says_so(
    make_shards: Callable[..., Path], train: Callable[..., None], tmp_path: Path
) -> None:
    root = make_shards(4, 2, 3)
    data = open_shards(shards=f"{root}/*.tar", val_shards=f"{root}/../shards/part-001.tar")
    assert list(data.train.sizes) == [4, 3] and list(data.val.sizes) == [2]
    assert data.notes == ["1 of 3 shards are validation shards and left out of training"]
    train(
        "data=shards",
        f"data.shards={root}/*.tar",
        f"data.val_shards={root}/part-001.tar",
        "model=tiny",
        "batch_size=4",
        "max_steps=1",
        "workers=0",
        "device=cpu",
        "name=x",
        "evals=[]",
    )
    assert "1 of 3 shards are validation shards" in (tmp_path / "outputs/x/train.log").read_text()
    with pytest.raises(ValueError, match="^all 3 training shards, such as .*part-000.tar, are validation shards"):
        open_shards(str(root), val=str(root))


def test_globs_and_brace_lists_replace_a_directory(make_shards: Callable[..., Path]) -> None:
    root = make_shards(4, 2, 3)
    brace = open_shards(shards=f"{root}/part-{{000..001}}.tar", val_shards=f"{root}/part-002.tar")
    assert list(brace.train.sizes) == [4, 2] and list(brace.val.sizes) == [3]
    from_list = open_shards(shards=[f"{root}/part-00[01].tar", f"{root}/part-002.tar"], val=0)
    assert list(from_list.train.sizes) == [4, 2, 3] and from_list.val is None


def test_a_list_of_patterns_has_its_braces_expanded_each(make_shards: Callable[..., Path]) -> None:
    root = make_shards(4, 2, 3)
    data = open_shards(shards=[f"{root}/part-{{000..001}}.tar", f"{root}/part-00[2].tar"], val=0)
    assert list(data.train.sizes) == [4, 2, 3]


def test_many_shards_are_read_where_few_files_may_be_open(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    root = make_shards(*[1] * 150)
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        "from clipx.data.shards import open_shards\n"
        f"data = open_shards({str(root)!r}, val=0.1)\n"
        "for source in (data.train, data.val):\n"
        "    for sample in range(int(sum(source.sizes))):\n"
        "        source.read(sample)\n"
    )
    assert run_python("-c", code, cwd=tmp_path).stderr == ""


def test_a_low_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [[256, 100_000]]
    monkeypatch.setattr(handles.resource, "getrlimit", lambda _: tuple(limits[-1]))
    monkeypatch.setattr(handles.resource, "setrlimit", lambda _, new: limits.append(new))
    assert handles.max_open_shards() == handles.OPEN_SHARDS and limits[-1] == (4096, 100_000)


def test_a_file_name_with_braces_is_taken_as_it_is(make_shards: Callable[..., Path]) -> None:
    shard = make_shards(4) / "part-000.tar"
    renamed = shard.rename(shard.with_name("a{1..2} [b]~é=c.tar"))
    assert list(open_shards(shards=str(renamed), val=0).train.sizes) == [4]


def test_a_share_is_held_out_by_key_alone(make_shards: Callable[..., Path]) -> None:
    root = make_shards(60, 40)
    data = open_shards(str(root), val=0.1)
    val_keys = {data.val.read(number).key for number in range(10)}
    train_keys = {data.train.read(number).key for number in range(90)}
    assert (
        sum(data.val.sizes) == 10 and len(val_keys) == 10 and sum(data.train.sizes) == 90 and not val_keys & train_keys
    )
    assert sorted(val_keys | train_keys) == [f"{number:05d}" for number in range(100)]
    other = open_shards(str(make_shards(100, folder="one")), val=0.1)  # the same samples in one shard
    assert {other.val.read(number).key for number in range(10)} == val_keys
    assert data.train.id != open_shards(str(root), val=0.2).train.id


def test_no_more_than_5000_are_held_out() -> None:
    train, val = hold_out(open_dummy(samples=30_000).train, 0.5)
    assert sum(val.sizes) == 5000 and sum(train.sizes) == 25_000


@pytest.mark.parametrize("options", [{}, {"root": "a", "shards": "b"}])
def test_root_or_shards_is_given(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="set exactly one"):
        open_shards(**options)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^root=.*nowhere is not a directory"):
        open_shards(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"^root=.* holds no shards"):
        open_shards(str(tmp_path))
    with pytest.raises(ValueError, match=r"^shards=.*x-\{0\.\.1\}\.tar: there is no file .*x-0\.tar"):
        open_shards(shards=str(tmp_path / "x-{0..1}.tar"))
    with pytest.raises(ValueError, match=r"^shards=\[\] names no shards"):
        open_shards(shards=[])


def test_a_missing_named_set_says_which_command_makes_it(fails: Callable[..., str], tmp_path: Path) -> None:
    prepare = "python -m clipx.prepare source="
    for name in ("coco", "cc3m", "flickr30k"):
        assert fails(f"data={name}", f"data.root={name}") == (
            f"data.root={name} is not a directory; make its shards with: {prepare}{name} src=DIR out={name}"
        )
    (tmp_path / "published/train2017").mkdir(parents=True)
    assert fails("data=coco", "data.root=published") == (
        "data.root=published holds no shards (*.tar, train/*.tar); make them with: "
        f"{prepare}coco src=published out=published-shards, then data.root=published-shards"
    )
    assert fails("data=laion400m", "data.root=no").endswith("set data.root=DIR to the output directory of img2dataset")
    assert fails("data=shards", "data.root=published").endswith("for pictures with captions.txt use data=folder")
    assert fails("data=folder", "data.root=no").startswith("data.root=no is not a directory (relative to ")
    assert fails("data=mix", "data.sources.coco.root=no").startswith("data.sources.coco.root=no is not a directory; ")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("shuffle_window=0", "should be greater than 0"),
        ("max_skipped=-0.1", "should be greater than or equal to 0"),
        ("max_skipped=2", "should be less than or equal to 1"),
        ("crop=[0,1]", "expected the smallest and the largest share of the area to keep, above 0 and up to 1"),
        ("crop=[0.9,0.2]", "expected the smallest and the largest"),
        ("crop=[1,2]", "expected the smallest and the largest"),
        ("caption=second", "should be 'random', 'first', 'weighted' or 'join'"),
        ("decode=slow", "should be 'fast' or 'exact'"),
        ("cache_gb=0", "should be greater than 0"),
        ("val=5", "expected a share of the pictures (0.02 is 2 %; 0 is none), or a directory"),
        ("val=-1", "expected a share"),
        ("val=nowhere", "holds no shards (*.tar)"),
        ("val_shards=no.tar", "there is no file no.tar"),
    ],
)
def test_a_value_that_cannot_be_is_named(
    setting: str, reason: str, fails: Callable[..., str], make_shards: Callable[..., Path]
) -> None:
    message = fails("data=shards", f"data.root={make_shards(4)}", f"data.{setting}")
    assert message.startswith(f"data.{setting.partition('=')[0]}=") and reason in message


def test_what_a_source_of_a_mix_has_lost_is_bounded_by_its_own_key(make_shards: Callable[..., Path]) -> None:
    root = make_shards(40)
    open_shards(str(root), val=0)  # the index records 40 samples
    with (root / "part-000.tar").open("rb+") as shard:
        shard.truncate(shard.seek(0, 2) // 2)
    with pytest.raises(ValueError, match=r"^max_skipped=0\.01: .* set 0\.425 "):
        open_shards(str(root), val=0)
    lossy = open_shards(str(root), val=0, max_skipped=0.6)
    mix = open_mix({"a": lossy}, {"a": 1.0}, max_skipped=0.6)
    assert mix.lost == lossy.lost and not mix.vals  # a mix may have no validation set
    with pytest.raises(DataError, match=r"data\.sources\.a\.caption is not used in a mix"):
        open_mix({"a": open_shards(str(root), val=0, max_skipped=0.6, caption="first")}, {"a": 1.0})


# ---------------------------------------------------------------- CLIP_benchmark


def benchmark_set(root: Path, kind: str) -> Path:
    """A retrieval set as written by clip_benchmark.webdataset_builder: one caption per line of .txt."""
    members = []
    for number in range(3):
        captions = "\n".join(f"number {number}, said {time} times" for time in range(5))
        members += [(f"s{number:07d}.png", picture(number)), (f"s{number:07d}.txt", captions.encode())]
    write_tar(root / "test" / "0.tar", members)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text(f"{kind}\n")
    return root


@pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_each_line_is_a_caption_where_clip_benchmark_says_that_a_set_is_for_retrieval(tmp_path: Path) -> None:
    from clip_benchmark.datasets.builder import build_wds_dataset

    root = benchmark_set(tmp_path / "x", "retrieval")
    source = open_shards(str(root / "test"), val=0.0).train
    theirs = [texts for _, texts in build_wds_dataset("x", lambda image: image, "test", str(root))]
    assert [source.read(number).captions for number in range(3)] == theirs and len(theirs[0]) == 5
    other = open_shards(str(benchmark_set(tmp_path / "y", "classification") / "test"), val=0.0).train
    assert len(other.read(0).captions) == 1 and other.id != source.id


def test_a_set_with_only_test_shards_is_refused_with_the_evaluate_command(tmp_path: Path) -> None:
    root = benchmark_set(tmp_path / "x", "retrieval")
    with pytest.raises(
        ValueError,
        match=rf"^root={root} holds no shards to train on, but some in test/; "
        rf"to evaluate on them, set data\.root={root}/test data\.val=0 split=train$",
    ):
        open_shards(str(root))


@pytest.mark.parametrize("prefix", ["", "test/"])
def test_each_line_is_a_caption_in_remote_retrieval_sets_too(
    prefix: str, tmp_path: Path, serve: Callable[[Path], str]
) -> None:
    root = benchmark_set(tmp_path / "served/x", "retrieval")
    (root / "dataset_type.txt").rename(root / f"{prefix}dataset_type.txt")
    url = f"{serve(tmp_path / 'served')}/x/test/0.tar"
    local = open_shards(str(root / "test"), val=0.0).train
    for _ in range(2):
        remote = open_shards(shards=url, val=0.0, index_dir=str(tmp_path / "i"), cache=str(tmp_path / "c")).train
        assert remote.caption_per_line and remote.id == local.id
        (root / f"{prefix}dataset_type.txt").unlink(missing_ok=True)  # it is requested only once


def test_shards_of_which_some_have_one_caption_a_line_are_two_sources(tmp_path: Path) -> None:
    for name in ("retrieval", "pairs"):
        benchmark_set(tmp_path / name, name)
    with pytest.raises(
        ValueError,
        match=r"shards: .*retrieval/test has one caption per line .* and "
        r".*pairs/test does not; make each a source of its own",
    ):
        open_shards(shards=str(tmp_path / "*/test/0.tar"), val=0.0)


def test_a_shard_that_changed_since_it_was_indexed_ends_the_run(make_shards: Callable[..., Path]) -> None:
    root = make_shards(4)
    source = open_shards(str(root), val=0).train
    write_tar(root / "part-000.tar", [("new.jpg", b"1" * 100_000)])
    with pytest.raises(DataError, match=r"part-000\.tar changed"):
        source.read(0)


def test_a_sample_without_a_picture_is_bad(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.txt", b"words")])
    with pytest.raises(BadSample, match=r"no picture \(\.jpg, \.jpeg, \.png, \.webp\)$"):
        open_shards(str(tmp_path), val=0).train.read(0)


def test_a_key_with_a_dot_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("Track 2.0.jpg", picture(1, "jpeg")), ("Track 2.0.txt", b"words")])
    source = open_shards(str(tmp_path), val=0).train
    with pytest.raises(BadSample, match=r"no picture .* but \.0\.jpg: .* rename the members so that keys have no dots"):
        source.read(0)


def test_a_batch_of_a_mix_holds_no_picture_twice(fails: Callable[..., str], make_shards: Callable[..., Path]) -> None:
    many, few = make_shards(40, folder="many"), make_shards(3, folder="few")
    args = (
        "data=mix",
        "data@data.sources.coco=shards",
        "data@data.sources.cc3m=shards",
        "model=tiny",
        "device=cpu",
        f"data.sources.coco.root={many}",
        f"data.sources.cc3m.root={few}",
        "workers=0",
        "data.sources.coco.val=0",
        "data.sources.cc3m.val=0",
        "max_steps=1",
        "evals=[]",
    )
    assert fails(*args, "batch_size=8") == (
        "batch_size=8 is more than the smallest source provides with these data.weights, so a batch would hold a "
        "picture twice; set at most batch_size=6, or a smaller weight for that source"
    )


def make_folder(root: Path, lines: str) -> Path:
    (root / "images" / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b b.png", "sub/ç.png")):
        (root / "images" / name).write_bytes(picture(number))
    (root / "captions.txt").write_text(lines, encoding="utf-8")
    return root


def test_a_folder_is_read_as_it_is(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", "a.png\tone\nb b.png\ttwo\n\na.png\tuno\tdos\nsub/ç.png\tthree\n")
    source = open_folder(str(root), val=0).train
    assert list(source.sizes) == [3]
    assert [source.read(number).captions for number in range(3)] == [["one", "uno\tdos"], ["two"], ["three"]]
    assert source.locate(2) == "images/sub/ç.png" and source.read(0).picture == picture(0)


def test_a_missing_image_is_a_bad_sample(tmp_path: Path) -> None:
    source = open_folder(str(make_folder(tmp_path / "f", "gone.png\tone\n")), val=0).train
    with pytest.raises(BadSample, match="no such file"):
        source.read(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a.png one\n", r"line 1: 'a\.png one' is not FILENAME<TAB>"), ("\n", "is empty"), ("a.png\t \n", "line 1")],
)
def test_a_line_that_is_no_caption_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_folder(str(make_folder(tmp_path / "f", text)))


def test_a_listing_in_another_encoding_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", "a.png\tone\n")
    (root / "captions.txt").write_bytes("a.png\té\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        open_folder(str(root))


def test_lines_of_captions_txt_end_at_line_feeds_alone(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", "a.png\tone\u2028on a wall\r\nb b.png\ttwo\x85\x0bthree\r\n")
    source = open_folder(str(root), val=0).train
    assert [source.read(number).captions for number in range(2)] == [["one\u2028on a wall"], ["two\x85\x0bthree"]]


def test_names_match_in_any_unicode_normalisation(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "f", "b\u00e9b\u00e9.png\tone\na.png\ttwo\n")
    (root / "images/a.png").rename(root / "images/be\u0301be\u0301.png")
    (root / "images/c.png").write_bytes(b"")
    source = open_folder(str(root), val=0).train
    assert source.read(0).captions == ["one"]
    assert source.matched[1] == ["b b.png", "c.png", "sub/ç.png"]
    assert any(
        "3 pictures are not in captions.txt and are not trained on, for example b b.png" in finding.message
        for finding in check_data(open_folder(str(root), val=0.5))
    )
    with pytest.raises(BadSample, match="no such file"):
        source.read(1)


def test_the_validation_of_a_folder_may_be_another_folder(tmp_path: Path) -> None:
    train = make_folder(tmp_path / "a", "a.png\tone\nb b.png\ttwo\n")
    val = make_folder(tmp_path / "b", "a.png\tone\n")
    data = open_folder(str(train), val=str(val))
    assert list(data.train.sizes) == [2] and list(data.val.sizes) == [1]
    shutil.rmtree(val)
    with pytest.raises(ValueError, match=r"^val=.* needs images/"):
        open_folder(str(train), val=str(val))


def test_a_folder_may_have_train_and_validation_folders(tmp_path: Path) -> None:
    make_folder(tmp_path / "set/train", "a.png\tone\nb b.png\ttwo\n")
    make_folder(tmp_path / "set/dev", "a.png\tone\n")
    data = open_folder(str(tmp_path / "set"))
    assert list(data.train.sizes) == [2] and list(data.val.sizes) == [1]
    assert data.notes == [f"validating on {tmp_path / 'set/dev'}"]
    with pytest.raises(ValueError, match="^val=.* is the training directory; set another one"):
        open_folder(str(tmp_path / "set/train"), val=str(tmp_path / "set/dev/../train"))


def test_dummy_pictures_are_the_same_each_time_and_differ_from_those_held_out() -> None:
    a, b = open_dummy(), open_dummy()
    assert a.train.read(7) == b.train.read(7) != a.val.read(7)
    captions = {a.train.read(number).captions[0] for number in range(400)}
    assert len(captions) > 80 and "a red circle in the upper left" in captions


def test_a_run_on_dummy_pictures_needs_none_to_validate(train: Callable[..., None], tmp_path: Path) -> None:
    train(*FEW, "data.val_samples=0", "max_steps=1", "eval_every=1", "name=x")
    assert summary(tmp_path / "outputs/x")["step"] == 1
    assert open_dummy(val_samples=0).val is None


def test_the_embedded_pictures_are_whole() -> None:
    data = open_emoji()
    train, val = data.train, data.val
    keys = np.concatenate([source.keys(shard) for source in (train, val) for shard in range(len(source.sizes))])
    assert len(set(keys.tolist())) == len(keys) and sum(val.sizes) == round(len(keys) / 10)
    names = THINGS.read_text().splitlines()
    captions = {sample.captions[0] for source in (train, val) for sample in map(source.read, range(sum(source.sizes)))}
    assert captions == set(names) and len(names) == len(captions) and len(keys) == 3 * len(names)
    picture = decode(val.read(0).picture)
    assert picture.size == (64, 64)


def test_a_house_that_is_left_out_of_training_is_a_validation_set_of_its_own() -> None:
    everything, data = open_emoji(), open_emoji(without=["fluent"])
    sources = {"train": data.train, "": data.val, **data.further}
    keys = {
        name: {source.read(sample).key.partition("-")[0] for sample in range(sum(source.sizes))}
        for name, source in sources.items()
    }
    assert keys == {"train": {"noto", "twemoji"}, "": {"noto", "twemoji"}, "fluent": {"fluent"}}
    assert list(data.vals) == ["", "fluent"]
    assert sum(sum(val.sizes) for val in data.vals.values()) == sum(everything.val.sizes)
    alone = open_emoji(without=["noto", "twemoji"])
    assert sum(alone.train.sizes) + sum(data.train.sizes) == sum(everything.train.sizes)
    assert alone.val.id == data.further["fluent"].id and alone.train.id != data.train.id
    assert open_emoji(without=[]).train.id == everything.train.id


def test_a_house_that_does_not_exist_or_leaving_out_all_is_an_error(fails: Callable[..., str]) -> None:
    assert fails("experiment=demo", "data.without=[apple]", "max_steps=1") == (
        "data.without=['apple']: should be 'noto', 'twemoji' or 'fluent'"
    )
    assert fails("experiment=demo", "data.without=[noto,twemoji,fluent]", "max_steps=1") == (
        "data.without=['noto', 'twemoji', 'fluent'] leaves nothing to train on; leave out at most two"
    )
