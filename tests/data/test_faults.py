"""Data faults, on real tars broken on purpose: the run continues and reports every skipped sample, or ends with an
error that says what is wrong."""

import gzip
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import picture, write_tar
from PIL import Image

from clipx.data import files
from clipx.data.folder import open_folder
from clipx.data.images import TrainCrop
from clipx.data.loader import load_chunks, train_ranges
from clipx.data.plan import Plan
from clipx.data.readers import TRIES, Chunk, TrainReader
from clipx.data.shards import open_shards
from clipx.data.tar.headers import DataError
from clipx.evals import encoder
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer

TOKENIZER = SimpleTokenizer()
SAMPLES = 40
Members = dict[str, list[tuple[str, bytes]]]


def members(count: int = SAMPLES) -> Members:
    """Members of intact samples, by key."""
    return {
        f"{number:03d}": [
            (f"{number:03d}.jpg", picture(number, "jpeg")),
            (f"{number:03d}.json", json.dumps({"caption": [f"thing {number}"]}).encode()),
        ]
        for number in range(count)
    }


def write(path: Path, samples: Members) -> Path:
    return write_tar(path, [member for group in samples.values() for member in group])


def reader_of(root: Path, **options: object) -> TrainReader:
    source = open_shards(str(root), val=0, index_dir=str(root / "cache"), **options).train
    return TrainReader(source, Plan(source.sizes, 0, 64), TrainCrop(Preprocessing(16), (0.9, 1.0), "fast"), TOKENIZER)


def two_epochs(reader: TrainReader, workers: int = 0, **shared: int) -> list[Chunk]:
    count = -(-2 * reader.plan.samples // 8)
    return list(itertools.islice(load_chunks(reader, train_ranges(0, 8, **shared), workers, pin=False), count))


def account(chunks: list[Chunk]) -> dict[str, str]:
    """Reason for each skipped sample, by key; checks that every batch is full."""
    assert {len(chunk) for chunk in chunks} == {8}
    return {record.place.partition("/")[2]: record.reason for chunk in chunks for record in chunk.skipped}


def spoil(sample: str, kind: str, data: bytes | None) -> Callable[[Members], None]:
    """Replaces the bytes of a member, or removes it if ``data`` is None."""

    def change(samples: Members) -> None:
        name = f"{sample}.{kind}"
        samples[sample] = [(n, data if n == name else d) for n, d in samples[sample] if n != name or data is not None]

    return change


WHOLE = picture(1, "jpeg", (200, 150))
FLIPPED = bytes(byte ^ 0xFF if 150 < index < 400 else byte for index, byte in enumerate(WHOLE))


def bomb() -> bytes:
    file = bytearray(WHOLE)
    frame = file.find(b"\xff\xc0")
    file[frame + 5 : frame + 9] = b"\x4e\x20\x4e\x20"
    return bytes(file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil("007", "jpg", WHOLE[:900]), "does not decode"),
        (spoil("007", "jpg", FLIPPED), "does not decode"),
        (spoil("007", "jpg", b""), "does not decode"),
        (spoil("007", "jpg", b"<html>404</html>"), "does not decode: it is not a picture"),
        (spoil("007", "jpg", bomb()), "has 20000 x 20000 pixels, more than"),
        (spoil("007", "json", None), "has no caption"),
        (spoil("007", "json", b'{"caption": " "}'), "its caption is empty"),
        (spoil("007", "json", b'{"caption": []}'), "its caption is empty"),
        (spoil("007", "json", b'{"caption": "\xff\xfe"}'), "its caption is not UTF-8"),
        (spoil("007", "json", b'{"text": "a cat"}'), "its json has no 'caption'"),
        (spoil("007", "json", b'{"caption": '), "its json cannot be read"),
        (spoil("007", "jpg", None), "has no picture"),
    ],
    ids=[
        "cut",
        "flipped",
        "zero bytes",
        "no picture",
        "bomb",
        "no caption",
        "empty caption",
        "no captions",
        "not UTF-8",
        "json without the key",
        "broken json",
        "no image",
    ],
)
def test_a_bad_sample_is_replaced_and_listed(tmp_path: Path, change: Callable[[Members], None], reason: str) -> None:
    samples = members()
    change(samples)
    write(tmp_path / "x.tar", samples)
    chunks = two_epochs(reader_of(tmp_path))
    skipped = account(chunks)
    assert list(skipped) == ["007"] and skipped["007"].startswith(reason)
    used = torch.cat([chunk.samples for chunk in chunks])
    assert set(used.tolist()) == set(range(SAMPLES)) - {7}


def test_two_samples_with_one_key_are_two_samples(tmp_path: Path) -> None:
    samples = list(members().values())
    write_tar(tmp_path / "x.tar", [*itertools.chain(*samples), *samples[3]])
    reader = reader_of(tmp_path)
    assert list(reader.source.sizes) == [SAMPLES + 1] and account(two_epochs(reader)) == {}
    assert reader.source.read(3) == reader.source.read(SAMPLES)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_with_spaces_dots_chinese_and_folders_are_names(tmp_path: Path, format: int) -> None:
    names = ["a b c", "导盲犬", "folder/deep er/é", "./here", "folder.with.dots/x", "many.dots.in it"]
    rows = [
        (f"{name}{kind}", data)
        for name in names
        for kind, data in ((".jpg", WHOLE), (".json", b'{"caption": "x"}'), (".extra.txt", b""))
    ]
    write_tar(tmp_path / "名 字 [1].tar", rows, format)
    source = reader_of(tmp_path).source
    keys = [source.read(number).key for number in range(5)]
    assert keys == names[:5]
    with pytest.raises(Exception, match="has no picture"):  # the kind is everything after the first dot
        source.read(5)


def cut_in(shard: Path, sample: str) -> None:
    """Truncate a tar in the middle of a sample's picture."""
    with tarfile.open(shard) as tar:
        picture = tar.getmember(f"{sample}.jpg")
    os.truncate(shard, picture.offset_data + picture.size // 2)


def cut_shard(root: Path) -> Path:
    """Two shards, the second truncated in sample 022."""
    write(root / "a.tar", members())
    shard = write(root / "b.tar", members())
    cut_in(shard, "022")
    return shard


def test_a_tar_truncated_in_a_member_is_used_up_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut_shard(tmp_path)
    chunks = two_epochs(reader_of(tmp_path))
    assert "b.tar is cut short: 22 of its 23 samples can be read" in caplog.text
    assert account(chunks) == {"022": "is lost: its shard is cut short"}
    assert set(torch.cat([chunk.samples for chunk in chunks]).tolist()) == set(range(SAMPLES + 22))


def test_a_cut_that_loses_more_than_allowed_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    shard = cut_shard(tmp_path)
    shard.with_name("b_stats.json").write_text(json.dumps({"successes": SAMPLES}))
    with pytest.raises(
        ValueError,
        match=r"^max_skipped=0\.01: .*b\.tar is cut short: 22 of its 40 samples can be "
        r"read; pack it again, or set 0\.225 to train without them",
    ):
        reader_of(tmp_path)
    assert account(two_epochs(reader_of(tmp_path, max_skipped=0.225))) == {"022": "is lost: its shard is cut short"}


def test_what_a_cut_has_lost_counts_and_is_listed(tmp_path: Path, train: Callable[..., None]) -> None:
    shard = cut_shard(tmp_path / "data")
    shard.with_name("b_stats.json").write_text(json.dumps({"successes": 31}))
    train("data=shards", "data.root=data", "data.val=0", "batch_size=21", "max_steps=6", "name=x", "workers=0")
    listed = [json.loads(line) for line in (tmp_path / "outputs/x/skipped.jsonl").read_text().splitlines()]
    assert listed[0] == {"samples": 0, "place": "b.tar", "reason": "8 of its samples are lost: cut short, or empty"}
    assert {line["place"] for line in listed[1:]} == {"b.tar/022"}


def test_a_warning_about_shards_is_logged_once(tmp_path: Path, train: Callable[..., None]) -> None:
    cut_shard(tmp_path / "data").with_name("b_stats.json").write_text(json.dumps({"successes": 31}))
    train("data=shards", "data.root=data", "data.val=0", "batch_size=21", "max_steps=2", "name=x", "workers=0")
    assert (tmp_path / "outputs/x/train.log").read_text().count("b.tar is cut short") == 1


def test_what_a_cut_has_lost_is_listed_once_by_a_run_that_was_killed_before_its_first_checkpoint(
    tmp_path: Path, train: Callable[..., None]
) -> None:
    shard = cut_shard(tmp_path / "data")
    shard.with_name("b_stats.json").write_text(json.dumps({"successes": 31}))
    args = ("data=shards", "data.root=data", "data.val=0", "batch_size=21", "max_steps=2", "name=x", "workers=0")
    train(*args)
    shutil.rmtree(tmp_path / "outputs/x/checkpoints")  # as if it had been killed before the first one
    train(*args)
    listed = [json.loads(line) for line in (tmp_path / "outputs/x/skipped.jsonl").read_text().splitlines()]
    assert [line["place"] for line in listed].count("b.tar") == 1


def test_a_worker_without_shared_memory_says_how_much_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    write(tmp_path / "a.tar", members())
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(
        DataError,
        match=r"^shared memory \(/dev/shm\) is full: workers=1 needs about .* MB of it here; "
        r"enlarge it \(docker run --shm-size=\.\.\., or --ipc=host\)",
    ):
        two_epochs(reader_of(tmp_path), workers=1)


def test_a_tar_without_members_among_others_is_nothing_and_alone_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", members())
    write_tar(tmp_path / "b.tar", [])
    reader = reader_of(tmp_path)
    assert list(reader.source.sizes) == [SAMPLES, 0] and account(two_epochs(reader)) == {}
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="there are no samples in the shards, such as .*b.tar"):
        reader_of(tmp_path)


def test_a_file_of_zero_bytes_counts_as_samples_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.tar", members())
    (tmp_path / "c.tar").touch()
    with pytest.raises(
        ValueError,
        match=rf"^max_skipped=0\.01: .*c\.tar is empty \(0 bytes\); about {SAMPLES} samples "
        r"are lost; fetch or pack it again, or set 0\.5 to train without them",
    ):
        reader_of(tmp_path)
    (tmp_path / "c_stats.json").write_text(json.dumps({"successes": 3}))
    (tmp_path / "c.tar.index").unlink()
    reader = reader_of(tmp_path)
    assert list(reader.source.sizes) == [SAMPLES, 0] and account(two_epochs(reader)) == {}
    assert "c.tar is empty (0 bytes); about 3 samples are lost" in caplog.text


def test_a_file_of_zero_bytes_is_listed_as_what_it_is(tmp_path: Path, train: Callable[..., None]) -> None:
    write(tmp_path / "data/a.tar", members())
    (tmp_path / "data/c.tar").touch()
    train(
        "data=shards",
        "data.root=data",
        "data.val=0",
        "data.max_skipped=0.5",
        "model=tiny",
        "batch_size=4",
        "max_steps=1",
        "workers=0",
        "device=cpu",
        "evals=[]",
        "name=x",
    )
    listed = [json.loads(line) for line in (tmp_path / "outputs/x/skipped.jsonl").read_text().splitlines()]
    reason = f"{SAMPLES} of its samples are lost: cut short, or empty"
    assert listed == [{"samples": 0, "place": "c.tar", "reason": reason}]


@pytest.mark.parametrize("args", [(), ("verify=true",)])
def test_prepare_reports_a_file_of_zero_bytes_of_a_set_that_cannot_be_written(
    args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clipx.prepare import main

    write(tmp_path / "data/a.tar", members(19))
    (tmp_path / "data/c.tar").touch()
    can, writable = os.access, tmp_path / "temporary"
    writable.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(writable))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and can(path, mode))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clipx.prepare", "source=shards", "src=data", "workers=0", *args])
    with pytest.raises(SystemExit, match="^19 of the 38 samples in data cannot be used, but training tolerates"):
        main()
    assert "data/c.tar is empty (0 bytes); about 19 samples are lost" in capsys.readouterr().err
    listed = [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("bad.jsonl")]
    assert listed == ["temporary"] * len(args)


def test_tars_that_were_joined_are_read_to_the_end_of_the_last(tmp_path: Path) -> None:
    samples = list(members().items())
    parts = [write(tmp_path / "parts" / name, dict(some)) for name, some in (("a", samples[:20]), ("b", samples[20:]))]
    (tmp_path / "joined.tar").write_bytes(bytes(3 << 20).join(part.read_bytes() for part in parts))
    source = reader_of(tmp_path).source
    assert [source.read(number).captions for number in range(SAMPLES)] == [[f"thing {n}"] for n in range(SAMPLES)]
    (tmp_path / "joined.tar").write_bytes(parts[0].read_bytes() + parts[1].read_bytes()[:-20_000])
    assert reader_of(tmp_path, max_skipped=1).source.catalogue.rows["cut"].all()


@pytest.mark.parametrize("after", [b"words", b"words" * 1000])
def test_bytes_after_the_end_mark_that_are_no_tar_are_an_error_that_says_how_to_cut_them_off(
    tmp_path: Path, after: bytes
) -> None:
    shard = write(tmp_path / "a.tar", members())
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + after)
    with pytest.raises(DataError, match=rf"a\.tar holds {len(after):,} bytes after its end mark .*truncate -s {size} "):
        reader_of(tmp_path)
    os.truncate(shard, size)
    assert list(reader_of(tmp_path).source.sizes) == [SAMPLES]


def by_kind(samples: Members) -> list[tuple[str, bytes]]:
    """Members in the order of an unsorted tar: all pictures, then all captions."""
    return [group[index] for index in (0, 1) for group in samples.values()]


def test_a_tar_that_was_not_sorted_says_so_and_how_to_write_it_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", by_kind(members()))
    with pytest.raises(
        ValueError,
        match=rf"^max_skipped=0\.01: .*a\.tar: the members of a sample are not adjacent, so "
        rf"{2 * SAMPLES} of its {2 * SAMPLES} samples are incomplete; pack it again .*\)$",
    ) as raised:
        reader_of(tmp_path)
    command = str(raised.value).partition("(")[2].rstrip(")")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    (tmp_path / "a.tar").unlink()
    reader = reader_of(tmp_path)
    assert list(reader.source.sizes) == [SAMPLES] and account(two_epochs(reader)) == {}


def test_a_few_samples_with_scattered_members_are_reported_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = members()
    scattered = by_kind({key: samples.pop(key) for key in ("000", "001", "002")})
    write_tar(
        tmp_path / "a.tar", [*scattered, *by_kind({"100": samples.pop("003")}), *itertools.chain(*samples.values())]
    )
    reader = reader_of(tmp_path)
    assert "so 6 of its 43 samples are incomplete" in caplog.text
    assert set(account(two_epochs(reader))) == {"000", "001", "002"}


def test_files_that_macos_adds_to_a_tar_are_left_out(tmp_path: Path) -> None:
    rows = [
        (name, data)
        for sample in members().values()
        for member in sample
        for name, data in ((f"./._{member[0]}", b"\x00\x05\x16\x07"), (f"./{member[0]}", member[1]))
    ]
    write_tar(tmp_path / "a.tar", rows)
    reader = reader_of(tmp_path)
    assert list(reader.source.sizes) == [SAMPLES] and account(two_epochs(reader)) == {}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"short", "; leave it out, or pack it again"),
        (random.Random(0).randbytes(5000), "; leave it out, or pack it again"),
        (b"PK\x03\x04" + b"x" * 2000, ": it is a zip archive"),
        (gzip.compress(bytes(10_240)), ": it is compressed with gzip; unpack it: gunzip < "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", ": it is a Git LFS .* git lfs pull"),
        (b"\n<!DOCTYPE html><html>" + b"x" * 600, ": it is an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", ": it is an XML page"),
    ],
    ids=["short", "random", "zip", "gzip", "Git LFS", "HTML", "XML"],
)
def test_a_file_that_is_no_tar_is_named_for_what_it_is(tmp_path: Path, data: bytes, what: str) -> None:
    write(tmp_path / "a.tar", members())
    (tmp_path / "b.tar").write_bytes(data)
    with pytest.raises(DataError, match=rf"b\.tar is not a tar{what}"):
        reader_of(tmp_path)


def test_a_header_that_is_damaged_in_the_middle_ends_the_run(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", members())
    data = bytearray(shard.read_bytes())
    data[next(offset for offset in range(10_240, len(data), 512) if data[offset + 257 : offset + 262] == b"ustar")] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar is corrupt after member \d+; the rest is unreadable"):
        reader_of(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_disappears_ends_the_run(tmp_path: Path, workers: int, short_waits: None) -> None:
    shard = write(tmp_path / "a.tar", members())
    reader = reader_of(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match=r"a\.tar cannot be read \(No such file or directory\), after 4 tries"):
        two_epochs(reader, workers)


def rewritten(shard: Path) -> None:
    write(shard, members(SAMPLES + 3))


def truncated(shard: Path) -> None:
    os.truncate(shard, 4000)


def same_size(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("change", [rewritten, truncated, same_size])
@pytest.mark.parametrize("opened", [False, True], ids=["before it is opened", "while it is open"])
def test_a_shard_that_changes_ends_the_run(tmp_path: Path, change: Callable[[Path], None], opened: bool) -> None:
    shard = write(tmp_path / "a.tar", members())
    reader = reader_of(tmp_path)
    batches = load_chunks(reader, train_ranges(0, 8), 0, pin=False)
    if opened:
        next(batches)
    change(shard)
    with pytest.raises(DataError, match=r"a\.tar changed during the run"):
        list(itertools.islice(batches, 20))


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAITS", (0.01, 0.02, 0.03))


class FlakyCall:
    """``os.open`` or ``os.pread`` on a disk that fails the first few times."""

    def __init__(self, real: Callable[..., object], failures: int):
        self.real, self.failures = real, failures

    def __call__(self, *args: object) -> object:
        if self.failures > 0 and (isinstance(args[0], int) or str(args[0]).endswith(".tar")):
            self.failures -= 1
            raise OSError(5, "Input/output error", *([] if isinstance(args[0], int) else [str(args[0])]))
        return self.real(*args)


@pytest.mark.parametrize(("module", "call"), [(os, "open"), (os, "pread"), (io, "open")])
def test_a_shard_that_cannot_be_read_is_tried_again_and_then_ends_the_run(
    tmp_path: Path, module: ModuleType, call: str, short_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.tar", members())
    reader = reader_of(tmp_path)
    expected = two_epochs(reader)
    real = getattr(module, call)
    monkeypatch.setattr(module, call, FlakyCall(real, failures=3))
    actual = two_epochs(reopened(reader))
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, actual, strict=True))
    monkeypatch.setattr(module, call, FlakyCall(real, failures=4))
    with pytest.raises(DataError, match=r"a\.tar cannot be read \(Input/output error\), after 4 tries"):
        two_epochs(reopened(reader))


@pytest.mark.parametrize(("module", "call"), [(os, "pread"), (io, "open")])
def test_a_shard_that_cannot_be_read_when_a_run_begins_is_named(
    tmp_path: Path, module: ModuleType, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.tar", members())
    monkeypatch.setattr(module, call, FlakyCall(getattr(module, call), failures=1))
    with pytest.raises(DataError, match=r"a\.tar cannot be read: Input/output error"):
        reader_of(tmp_path)
    (tmp_path / "b.tar").mkdir()
    with pytest.raises(DataError, match=r"b\.tar is not a file; leave it out"):
        reader_of(tmp_path)


def reopened(reader: TrainReader) -> TrainReader:
    """A copy of the reader, with no open files."""
    make, args = reader.source.__reduce__()
    return TrainReader(make(*args), reader.plan, reader.crop, TOKENIZER)


def test_a_worker_that_is_killed_ends_the_run_between_two_batches(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", members())
    batches = load_chunks(reader_of(tmp_path), killed_after(train_ranges(0, 8), 6), 2, pin=False)
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataError, match="one of the workers=2 processes that read data was killed.*memory ran out"):
        list(itertools.islice(batches, 50))
    assert signal.getsignal(signal.SIGCHLD) is handler


def killed_after(ranges: Iterator[range], count: int) -> Iterator[range]:
    """Kills a worker of this process, as the out-of-memory killer does."""
    import multiprocessing

    for number, positions in enumerate(ranges):
        if number == count:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        yield positions


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_bad_samples_is_an_error_within_seconds(tmp_path: Path, workers: int) -> None:
    samples = members(3000)
    for key in samples:
        spoil(key, "jpg", b"no")(samples)
    write(tmp_path / "a.tar", samples)
    with pytest.raises(DataError, match=f"^{TRIES} samples in a row are bad, the last one is a.tar/"):
        two_epochs(reader_of(tmp_path), workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_pictures_that_are_bad_by_the_chunk_are_counted_and_listed(
    tmp_path: Path,
    train: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    workers: int,
) -> None:
    monkeypatch.setattr(encoder, "CPU_BATCH", 8)
    write(tmp_path / "data/train/a.tar", members())
    validation = members(17)
    for key in list(validation)[8:]:
        spoil(key, "jpg", b"broken")(validation)
    write(tmp_path / "data/val/a.tar", validation)
    train(
        "data=shards",
        "data.root=data",
        "model=tiny",
        "batch_size=8",
        "max_steps=2",
        "eval_every=1",
        "name=x",
        f"workers={workers}",
        "device=cpu",
    )
    run = tmp_path / "outputs/x"
    assert "validation: skipped 9 pictures, for example a.tar/008: does not decode" in caplog.text
    rows = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [(row["set"], row["place"]) for row in rows] == [("validation", f"a.tar/{n:03d}") for n in range(8, 17)]
    scored = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val/loss" in row]
    assert len(scored) == 2 and all(row["val/retrieval/skipped"] == 9 for row in scored)


def test_only_a_validation_set_without_any_usable_picture_is_an_error(
    tmp_path: Path, fails: Callable[..., str]
) -> None:
    write(tmp_path / "data/train/a.tar", members())
    write_tar(tmp_path / "data/val/a.tar", [(f"{number}.jpg", b"broken") for number in range(9)])
    assert fails(
        "data=shards", "data.root=data", "model=tiny", "batch_size=8", "max_steps=1", "device=cpu", "workers=0"
    ).startswith("none of the 9 pictures to score can be used, for example a.tar/0: ")


def test_bad_samples_are_bounded_by_max_skipped(
    tmp_path: Path, train: Callable[..., None], fails: Callable[..., str]
) -> None:
    samples = members(100)
    for key in list(samples)[:30]:
        spoil(key, "jpg", b"no")(samples)
    write(tmp_path / "data/x.tar", samples)
    args = [
        "data=shards",
        "data.root=data",
        "data.val=0",
        "batch_size=20",
        "max_steps=10",
        "name=x",
        "workers=0",
        "log_every=1",
    ]
    message = fails(*args)
    assert message.startswith("11 bad samples, more than data.max_skipped allows") or int(message.split()[0]) > 11
    saved = torch.load(tmp_path / "outputs/x/checkpoints/clip_last.pt", weights_only=True)
    listed = [json.loads(line) for line in (tmp_path / "outputs/x/skipped.jsonl").read_text().splitlines()]
    assert {line["sample"] for line in listed} == set(saved["skipped"])
    assert len(saved["skipped"]) == int(message.split()[0])
    train(*args, "data.max_skipped=0.3")  # resumes
    summary = json.loads((tmp_path / "outputs/x/summary.json").read_text())
    assert summary["state"] == "finished" and summary["final"]["train/skipped"] == 30


def damaged_shards(root: Path) -> Path:
    """Two shards with every tenth sample bad in one of six ways; the second is also truncated."""
    for shard in range(2):
        samples = members(100)
        ways = [("jpg", WHOLE[:500]), ("jpg", b""), ("jpg", None), ("json", None), ("json", b"{"), ("json", b"{}")]
        for number, key in enumerate(list(samples)[::10]):
            kind, data = ways[number % len(ways)]
            spoil(key, kind, data)(samples)
        write(root / f"{shard}.tar", samples)
    cut_in(root / "1.tar", "049")
    return root


def test_workers_runs_and_ranks_skip_the_same_samples_and_see_the_same_batches(tmp_path: Path) -> None:
    reader = reader_of(damaged_shards(tmp_path))
    expected = two_epochs(reader)
    account(expected)
    assert len({record.place for chunk in expected for record in chunk.skipped}) == 10 + 5 + 1
    for other in (two_epochs(reader_of(tmp_path)), two_epochs(reader, workers=2)):
        for a, b in zip(expected, other, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.samples, b.samples) and a.skipped == b.skipped
    halves = [
        itertools.islice(load_chunks(reader, train_ranges(0, 8, rank=rank, world=2), 0, pin=False), len(expected))
        for rank in (0, 1)
    ]
    for whole, *parts in zip(expected, *halves, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert whole.skipped == [record for part in parts for record in part.skipped]


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip, remove, insert or zero some bytes, or cut off the end."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30])):
        offset = rng.randrange(len(damaged))
        kind = rng.randrange(10)
        if kind < 6:
            damaged[offset] ^= 1 << rng.randrange(8)
        elif kind < 7:
            del damaged[offset : offset + rng.choice([1, 100, 512, 3000])]
        elif kind < 8:
            damaged[offset:offset] = rng.randbytes(rng.choice([1, 512]))
        elif kind < 9:
            damaged[offset : offset + 600] = bytes(600)
        else:
            del damaged[offset:]
        if not damaged:
            break
    return bytes(damaged)


def test_random_damage_ends_in_full_batches_with_a_true_account_or_in_a_clear_error(
    tmp_path: Path, short_waits: None, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write(tmp_path / "whole.tar", members(24)).read_bytes()
    survived, refused = 0, 0
    for seed in range(300):
        rng = random.Random(seed)
        root = tmp_path / str(seed)
        root.mkdir()
        (root / "x.tar").write_bytes(damage(whole, rng))
        try:
            reader = reader_of(root, max_skipped=1.0)
            chunks = two_epochs(reader)
        except DataError as error:
            assert "\n" not in str(error) and ("x.tar" in str(error) or "samples in a row" in str(error))
            refused += 1
            continue
        skipped = {record.sample for chunk in chunks for record in chunk.skipped}
        used = set(torch.cat([chunk.samples for chunk in chunks]).tolist())
        assert {len(chunk) for chunk in chunks} == {8} and not skipped & used
        assert skipped | used == set(range(reader.plan.samples))  # each is accounted for
        survived += 1
    assert survived > 60 and refused > 20


def test_a_picture_with_flipped_bits_that_still_decodes_is_used(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg", quality=90)
    file = bytearray((tmp_path / "x.jpg").read_bytes())
    file[len(file) // 2] ^= 1
    samples = members()
    spoil("007", "jpg", bytes(file))(samples)
    write(tmp_path / "x.tar", samples)
    reader = reader_of(tmp_path)
    skipped, used = account(two_epochs(reader)), reader.source.read(7).picture == bytes(file)
    assert used and set(skipped) <= {"007"}


def test_a_picture_of_a_folder_that_cannot_be_read_ends_the_run(
    tmp_path: Path, short_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(picture(1))
    (tmp_path / "captions.txt").write_text("a.png\tone\n")
    source = open_folder(str(tmp_path), val=0).train

    def refuse(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a\.png cannot be read \(Input/output error\), after 4 tries"):
        source.read(0)
