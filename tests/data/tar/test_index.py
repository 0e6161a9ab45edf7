import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import write_tar

from clipx.data.catalogue import open_catalogue
from clipx.data.tar.headers import DataError
from clipx.data.tar.index import KEY, expand_home, make_index, read_head, read_table, scan, temporary_dir

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG = "a folder/" + "deep/" * 30 + "a very long name" * 8
NAMES = ["plain", "with space", "文件夹/导盲犬", "été/ñandú", LONG]


def shard_with(path: Path, names: list[str], format: int) -> Path:
    members = []
    for number, name in enumerate(names):
        members += [(f"{name}.JPG", bytes([number]) * (number * 700)), (f"{name}.seg.txt", f"caption {name}".encode())]
    return write_tar(path, members, format)


def contents(shard: Path) -> dict[str, dict[str, bytes]]:
    data = shard.read_bytes()

    samples = {}
    for row in scan(shard)[0]:
        members = {kind: data[row[kind][0] : sum(row[kind])] for kind in row.dtype.names[1:] if row[kind][0]}
        samples[row[KEY].decode()] = members
    return samples


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore:.*Exception ignored in")  # webdataset's own
@pytest.mark.parametrize("format", FORMATS)
def test_byte_ranges_hold_what_webdataset_reads(tmp_path: Path, format: int) -> None:
    names = NAMES if format != tarfile.USTAR_FORMAT else NAMES[:4]
    shard = shard_with(tmp_path / "x.tar", names, format)
    expected = {
        sample["__key__"]: {kind: data for kind, data in sample.items() if not kind.startswith("__")}
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False)
    }
    assert contents(shard) == expected and len(expected) == len(names)


def test_directories_links_and_names_without_a_kind_are_passed_over(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    (tmp_path / "a.jpg").write_bytes(b"picture")
    (tmp_path / "README").write_bytes(b"no kind")
    with tarfile.open(shard, "w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
        tar.add(tmp_path / "README", "README")
        tar.add(tmp_path / "a.jpg", "a.jpg")
    assert contents(shard) == {"a": {"jpg": b"picture"}}


def test_a_large_size_in_gnu_notation_is_read(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (3).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    shard = tmp_path / "x.tar"
    shard.write_bytes(bytes(header) + b"abc".ljust(512, b"\0") + bytes(1024))
    assert contents(shard) == {"a": {"jpg": b"abc"}}


def test_a_shard_without_samples_and_one_without_an_end_mark(tmp_path: Path) -> None:
    assert contents(write_tar(tmp_path / "empty.tar", [])) == {}
    shard = write_tar(tmp_path / "x.tar", [("a.txt", b"x")])
    shard.write_bytes(shard.read_bytes()[:1024])
    assert contents(shard) == {"a": {"txt": b"x"}}


def test_members_of_one_kind_twice_make_two_samples(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.txt", b"2"), ("a.jpg", b"3"), ("a.txt", b"4")])
    assert len(scan(shard)[0]) == 2


@pytest.mark.parametrize(
    ("kept", "readable", "samples"),
    [(1700, 1, 2), (1400, 1, 1), (1024, 1, 1), (700, 0, 1)],
    ids=["in a member", "in a header", "between", "in the first"],
)
def test_a_truncated_tar_is_used_up_to_the_cut(tmp_path: Path, kept: int, readable: int, samples: int) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 300), ("b.jpg", b"2" * 1000), ("c.jpg", b"3")])
    shard.write_bytes(shard.read_bytes()[:kept])
    head = read_head(make_index(shard, tmp_path))
    assert (head["readable"], head["samples"], head["total"], head["cut"]) == (readable, samples, samples, True)


def test_what_is_lost_is_known_from_an_older_index_or_from_the_counts_of_img2dataset(tmp_path: Path) -> None:
    members = [(f"{number}.jpg", b"1" * 300) for number in range(10)]
    old, counted = (write_tar(tmp_path / f"{name}.tar", members) for name in ("old", "00000"))
    make_index(old, tmp_path)
    (tmp_path / "00000_stats.json").write_text('{"count": 12, "successes": 10}')
    for shard in (old, counted):
        shard.write_bytes(shard.read_bytes()[:3700])  # cut in the fourth member
        for _ in range(2):  # the second time, the total comes from the first index
            head = read_head(make_index(shard, tmp_path))
            assert (head["readable"], head["samples"], head["total"], head["cut"]) == (3, 4, 10, True)
        assert len(read_table(shard.with_name(f"{shard.name}.index"))) == 4


def test_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    data = bytearray(shard.read_bytes())
    data[1024 + 10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar is corrupt after member 1"):
        scan(shard)


def test_names_whose_dots_are_no_kinds_are_refused(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [(f"photo.{number}.jpg", b"1") for number in range(70)])
    with pytest.raises(DataError, match="70 kinds of member.*keys have no dots"):
        scan(shard)


def test_an_index_is_made_once_and_again_when_the_shard_changes(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = sorted(make_shards(3, 2).glob("*.tar"))
    first = open_catalogue(shards, tmp_path / "cache")
    assert first.rows["samples"].tolist() == [3, 2]
    files = [shard.with_name(f"{shard.name}.index") for shard in shards]
    times = [file.stat().st_mtime_ns for file in files]
    reopened = open_catalogue(shards, tmp_path / "cache")
    assert [file.stat().st_mtime_ns for file in files] == times
    assert isinstance(read_table(files[0]), np.memmap) and reopened.id == first.id
    write_tar(shards[0], [("new.jpg", b"1" * 20_000)])
    assert open_catalogue(shards, tmp_path / "cache").rows["samples"].tolist() == [1, 2]


def test_an_index_of_an_older_format_is_made_again(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    shard = make_shards(3) / "part-000.tar"
    index = make_index(shard, tmp_path)
    new = index.read_bytes()
    index.write_bytes(new.replace(b'"format": 2', b'"format": 1').replace(b'"samples": 3', b'"samples": 2')[:-1])
    assert open_catalogue([shard], tmp_path / "cache").rows["samples"].tolist() == [3] and index.read_bytes() == new


def test_an_index_that_is_not_one_is_made_again(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    shard = make_shards(3) / "part-000.tar"
    shard.with_name(f"{shard.name}.index").write_bytes(b"\x93NUMPY not ours")
    assert open_catalogue([shard], tmp_path / "cache").rows["samples"].tolist() == [3]


def test_where_shards_cannot_be_written_the_index_goes_to_index_dir(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make_shards(3) / "part-000.tar"
    write = Path.write_bytes

    def refuse(path: Path, data: bytes) -> int:  # simulated, as root may write anywhere
        if path.parent == shard.parent:
            raise PermissionError(13, "read-only", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert open_catalogue([shard], tmp_path / "cache").rows["samples"].tolist() == [3]
    assert [path.name for path in (tmp_path / "cache").rglob("*.index")] == ["part-000.tar.index"]
    assert os.listdir(shard.parent) == ["part-000.tar"]


@pytest.mark.parametrize("foreign_owner", [False, True])
def test_where_neither_can_be_written_it_goes_to_a_temporary_directory_of_our_own_with_a_warning(
    make_shards: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    foreign_owner: bool,
) -> None:
    shard, own = make_shards(3) / "part-000.tar", tmp_path / f"tmp/clipx-{os.getuid()}"
    write = Path.write_bytes

    def refuse(path: Path, data: bytes) -> int:
        if own not in path.parents:
            raise PermissionError(13, "read-only", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(own.parent))
    own.mkdir(parents=True)
    if foreign_owner:  # another user could have put forged indexes there
        os.chown(own, 12345, 12345)
        with pytest.raises(DataError, match="part-000.tar.index cannot be written, nor .*set data.index_dir=DIR"):
            open_catalogue([shard], tmp_path / "cache")
        return
    for _ in range(2):
        assert open_catalogue([shard], tmp_path / "cache").rows["samples"].tolist() == [3]
    assert [record.getMessage() for record in caplog.records] == [
        f"1 indexes are in the temporary directory {own}, as {shard.parent} is not writable; set "
        "data.index_dir=DIR to keep them"
    ]


def test_without_a_home_directory_paths_in_it_are_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand_home("~/x") == Path.home() / "x" and expand_home("y") == Path("y")

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert expand_home("~/.cache/clipx") == temporary_dir() / ".cache/clipx"
