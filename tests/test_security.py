"""Every promise of SECURITY.md, tested with an attack."""

import argparse
import ast
import io
import json
import os
import pickle
import socket
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from conftest import ROOT, picture, write_tar
from PIL import EpsImagePlugin, Image

from clipx import load
from clipx.config.instantiate import build, locate
from clipx.data import sample
from clipx.data.catalogue import open_catalogue
from clipx.data.folder import open_folder
from clipx.data.images import decode, get_image_transform
from clipx.data.prepare.encode import look, read_file
from clipx.data.readers import EvalReader
from clipx.data.remote.stores import download
from clipx.data.sample import BadSample, hold_out
from clipx.data.shards import open_shards
from clipx.data.tar.headers import MAX_HEADER, DataError
from clipx.data.tar.index import make_index, read_head, read_table, scan, successes
from clipx.errors import UserError
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer
from clipx.weights import checkpoint
from clipx.weights.checkpoint import CheckpointError

CODE = sorted((ROOT / "clipx").rglob("*.py"))


class Bomb:
    """Unpickling this runs a command."""

    def __init__(self, ran: Path):
        self.ran = ran

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.ran}",)


@pytest.fixture
def ran(tmp_path: Path) -> Iterator[Path]:
    """A file that a successful attack creates; fails the test if it exists at the end."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails if Python and numpy allocate more than 16 MB."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- no pickle


def test_a_pickle_in_place_of_a_checkpoint_is_not_run(tmp_path: Path, ran: Path) -> None:
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model_state_dict": Bomb(ran)}, 2))
    torch.save({"model_state_dict": {"a": Bomb(ran)}}, tmp_path / "saved.pt")
    for name in ("plain.pt", "saved.pt"):
        with pytest.raises(CheckpointError, match=f"{name} is not a checkpoint"):
            load(tmp_path / name)


@pytest.mark.parametrize("kind", ["a call", "a name of torch", "a tensor out of bounds", "written on the reader"])
def test_a_torchscript_archive_runs_no_code(tmp_path: Path, ran: Path, kind: str) -> None:
    storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI1\ntQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I0\n(I%d\nt(I1\ntI00\nNtR"
    payload = {
        "a call": pickle.dumps(Bomb(ran), 2),
        "a name of torch": b"ctorch\nload\n(V/x\ntR.",
        "a tensor out of bounds": tensor % 10**9 + b".",
        "written on the reader": b"ctorch._utils\n_rebuild_tensor_v2\n(N}V__name__\nI1\nstb.",
    }[kind]
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        for name, data in (
            ("data.pkl", payload),
            ("constants.pkl", payload),
            ("version", b"3"),
            ("data/0", bytes(4)),
            ("code/__torch__.py", b"import os"),
        ):
            archive.writestr(f"evil/{name}", data)
    with pytest.raises(CheckpointError, match=r"evil\.pt is not a checkpoint"):
        load(tmp_path / "evil.pt")


def test_a_pickle_in_place_of_what_was_held_out_is_not_run(
    make_shards: Callable[..., Path], tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "LARGE", 1)
    source = open_shards(str(make_shards(20)), val=0).train
    expected = hold_out(source, 0.3, tmp_path / "kept")[1].ids
    (file,) = (tmp_path / "kept").iterdir()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb(ran)], object), allow_pickle=True)
    for payload in (pickle.dumps(Bomb(ran)), objects.getvalue(), header.getvalue()):
        file.write_bytes(payload)
        with little_memory():
            assert np.array_equal(hold_out(source, 0.3, tmp_path / "kept")[1].ids, expected)


def test_no_line_of_clipx_unpickles_evaluates_unpacks_or_asks_a_shell() -> None:
    banned = {
        "eval of ",
        "exec of ",
        "system of os",
        "popen of os",
        "loads of pickle",
        "load of pickle",
        "load of yaml",
        "load of np",
        "load of torch.jit",
        "load of jit",
        "instantiate",
        "extractall",
        "extract",
        "unsafe_load",
        "full_load",
    }
    for file in CODE:
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            module, _, last = name.rpartition(".")
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert not {last, f"{last} of {module}"} & banned, f"{file}:{call.lineno}: {name}"
            assert "shell" not in keywords and "allow_pickle" not in keywords, f"{file}:{call.lineno}"
            assert name != "torch.load" or keywords["weights_only"] == "True"


# ---------------------------------------------------------------- what configs and checkpoints may call


TOWERS = {
    "image": {"_target_": "clipx.models.vision.ImageEncoder", "size": 32, "patch": 16, "width": 64, "depth": 1,
              "heads": 1, "embed": 32},
    "text": {"_target_": "clipx.models.text.TextEncoder", "width": 64, "depth": 1, "heads": 1, "embed": 32},
}  # fmt: skip
MODEL = {"_target_": "clipx.models.clip.CLIP", **TOWERS}


def checkpoint_of(path: Path, node: object) -> Path:
    checkpoint.save(path, {"model_state_dict": {}, "config": {"model": node}})
    return path


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"_target_": "os.system", "command": "touch {ran}"}, "os.system is not clipx's own code"),
        ({"_target_": "builtins.exec", "source": "open('{ran}', 'w')"}, "builtins.exec is not clipx's own code"),
        ({"_target_": "pathlib.Path.write_text", "self": "{ran}", "data": ""}, "Path.write_text is not clipx"),
        ({"_target_": "clipx.weights.checkpoint.save", "path": "{ran}", "content": {}}, "save is outside clipx.models"),
        ({"_target_": "clipx.data.prepare.report.write", "path": "{ran}"}, "report.write is outside clipx.models"),
        ({"_target_": "clipx.training.run.Path.write_text", "data": ""}, "run.Path.write_text is outside clipx.models"),
        ({"_target_": "clipx.models.tower.UserError"}, "tower.UserError is outside clipx.models"),
        ({"_target_": "clipx.models.clip.Any"}, "comes from typing"),
        ({"_target_": "clipx.models.resnet.RESIDUAL_GAIN"}, "is a float, neither a function nor a class"),
        ({"_target_": "clipx.models.clip.torch.save", "obj": 1, "f": "{ran}"}, "cannot be imported"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True], ids=["model", "nested"])
def test_of_a_checkpoints_config_nothing_is_called_but_its_model(
    tmp_path: Path, ran: Path, node: dict[str, object], reason: str, nested: bool
) -> None:
    node = {key: value.format(ran=ran) if isinstance(value, str) else value for key, value in node.items()}
    path = checkpoint_of(tmp_path / "evil.pt", {**MODEL, "text": {"a": node}} if nested else node)
    with pytest.raises(CheckpointError, match=f"evil.pt: model{'.text.a' if nested else ''}._target_=.*{reason}"):
        load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["evil.pt"]


@pytest.mark.parametrize(
    ("node", "made"), [(TOWERS["image"], "ImageEncoder"), ({**MODEL, "_partial_": True}, "partial"), ("clipx", "str")]
)
def test_what_a_checkpoints_config_makes_is_a_clip(tmp_path: Path, node: object, made: str) -> None:
    with pytest.raises(CheckpointError, match=f"evil.pt: its config's model is a {made}, not a CLIP"):
        load(checkpoint_of(tmp_path / "evil.pt", node))


@pytest.mark.parametrize("override", [{"width": "wide"}, {"wings": 2}])
def test_a_model_that_cannot_be_made_from_a_checkpoints_config_is_one_line(
    tmp_path: Path, override: dict[str, object]
) -> None:
    path = checkpoint_of(tmp_path / "odd.pt", {**MODEL, "image": {**TOWERS["image"], **override}})
    with pytest.raises(CheckpointError, match="odd.pt: its config's model cannot be built: [^\n]*$"):
        load(path)


@pytest.mark.parametrize(
    ("target", "home"),
    [
        ("clipx.training.run.Path", "pathlib"),
        ("clipx.prepare.asdict", "dataclasses"),
        ("clipx.config.resolve.files", "importlib"),
        ("clipx.data.remote.cache.mkstemp", "tempfile"),
        ("clipx.track.tensorboard.SummaryWriter", "torch"),
    ],
)
def test_what_a_module_of_clipx_has_only_imported_is_not_called(target: str, home: str) -> None:
    with pytest.raises(UserError, match=rf"^model\._target_={target} comes from {home}.*; trust=\[{home}\] allows it"):
        build({"_target_": target})
    assert callable(locate(target, "model", [home]))


def test_a_trusted_package_passes_on_only_what_it_says_that_it_does(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models.py").write_text(
        "from os import system\nfrom torch.nn import GELU\n"
        "from clipx.weights.checkpoint import save\nfrom clipx import CLIP\n"
        "__all__ = ['GELU', 'own']\n"
        "def own(**parts): return CLIP(**parts)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    trust = ["my_models"]
    assert locate("my_models.GELU", "model", trust) is torch.nn.GELU
    model = build({**MODEL, "_target_": "my_models.own"}, trust=trust)
    checkpoint.save(
        tmp_path / "own.pt",
        {"model_state_dict": model.state_dict(), "config": {"model": {**MODEL, "_target_": "my_models.own"}}},
    )
    assert type(load(tmp_path / "own.pt", trust=trust)[0]).__name__ == "CLIP"
    with pytest.raises(CheckpointError, match=r"my_models\.own is not clipx's own code; trust=\[my_models\]"):
        load(tmp_path / "own.pt")
    for node in (
        {"_target_": "my_models.system", "command": f"touch {ran}"},
        {"_target_": "my_models.save", "path": str(ran), "content": {}},
    ):
        with pytest.raises(CheckpointError, match=r"comes from (posix|nt);|is outside clipx\.models"):
            load(checkpoint_of(tmp_path / "evil.pt", node), trust=trust)
    monkeypatch.delitem(sys.modules, "my_models")


# ---------------------------------------------------------------- no shell


@pytest.mark.parametrize("kind", ["after another shard", "in a brace", "for validation", "as a root", "in a list"])
def test_a_command_hidden_in_a_name_is_not_run(make_shards: Callable[..., Path], ran: Path, kind: str) -> None:
    good, command = str(make_shards(3) / "part-000.tar"), f"pipe:touch {ran}"
    keys = {
        "after another shard": {"shards": f"{good}::{command}"},
        "in a brace": {"shards": f"pipe:touch {ran}-{{0..3}}"},
        "for validation": {"shards": good, "val": command},
        "as a root": {"root": command},
        "in a list": {"shards": [good, command]},
    }[kind]
    with pytest.raises(ValueError, match="would run a command; data.allow_pipe=true|holds no shards|not a directory"):
        open_shards(**keys)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch ran) (w) file\n%%EOF\n"


def test_a_picture_that_is_a_program_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was asked"))
    with pytest.raises(BadSample, match="it is not a picture"):
        decode(POSTSCRIPT)
    with pytest.raises(BadSample, match="is not a picture"):
        look(POSTSCRIPT)


# ---------------------------------------------------------------- bounds


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with any bytes in its size field."""
    block = bytearray(name.ljust(124, b"\0") + size.ljust(12, b"\0") + b" " * 20 + kind)
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[136:156] = b"00000000000\0" + b" " * 8
    block += bytes(512 - len(block))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: bytes, size: int | None = None) -> bytes:
    return header(b"pax", b"%011o" % (len(records) if size is None else size), b"x") + padded(records)


GOOD = header(b"good.txt", b"%011o" % 4) + padded(b"good")
LYING_HEADERS = {
    "pax of 8 GB": pax(b"9 a=bcde\n", 8 * 10**9),
    "global pax of 8 GB": header(b"pax", b"\x80" + (8 * 10**9).to_bytes(11, "big"), b"g"),
    "long name of 8 GB": header(b"././@LongLink", b"\x80" + (8 * 10**9).to_bytes(11, "big"), b"L"),
    "2 to the 87 bytes": header(b"a.jpg", b"\x80" + (1 << 87).to_bytes(11, "big")),
    "back to where it was": header(b"a.jpg", b"-0000002000"),
    "pax size of many digits": pax(b"4010 size=" + b"9" * 3999 + b"\n") + header(b"a.jpg", b"0"),
    "pax size below zero": pax(b"11 size=-1\n") + header(b"a.jpg", b"0"),
    "pax record that goes back": pax(b"6 a=b\n-6 a=b\n") + header(b"a.jpg", b"0"),
}


@pytest.mark.parametrize("name", LYING_HEADERS)
def test_a_header_that_lies_of_its_size_is_damage_and_takes_no_memory(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(GOOD + LYING_HEADERS[name] + bytes(1024))
    with little_memory(), pytest.raises(DataError, match=r"x\.tar is corrupt after member 1"):
        scan(tmp_path / "x.tar")


def test_one_long_name_does_not_make_room_in_every_row(tmp_path: Path) -> None:
    name = b"a" * 500_000 + b".txt"
    long = header(b"long", b"%011o" % len(name), b"L") + padded(name)
    (tmp_path / "x.tar").write_bytes(GOOD * 500 + long + GOOD + bytes(1024))
    with little_memory(), pytest.raises(DataError, match=r"x\.tar has a name of 500,004 bytes, more than 1,024"):
        scan(tmp_path / "x.tar")


def test_a_header_of_very_many_records_is_read_in_a_moment(tmp_path: Path) -> None:
    records = b"5 a=\n" * (MAX_HEADER // 5)
    (tmp_path / "x.tar").write_bytes(pax(records) + GOOD + bytes(1024))
    start = time.process_time()
    assert len(scan(tmp_path / "x.tar")[0]) == 1
    assert time.process_time() - start < 5


def sparse_tar(path: Path, *sizes: tuple[str, int]) -> Path:
    """A sparse tar: its members are full-length zeros that take no disk space."""
    with path.open("wb") as file:
        for name, size in sizes:
            file.write(header(name.encode(), b"%011o" % size))
            file.seek(size + -size % 512, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    return path


@pytest.mark.parametrize(
    ("member", "size", "reason"),
    [("txt", 50_000_000, "its caption (.txt) is too large: 50,000,000 bytes, more than 1,048,576"),
     ("json", 4_000_000_000, "its caption (.json) is too large: 4,000,000,000 bytes, more than 1,048,576"),
     ("jpg", 4_000_000_000, "its picture is too large: 4,000,000,000 bytes, more than 268,435,456")],
)  # fmt: skip
def test_a_member_that_is_too_large_is_not_read(tmp_path: Path, member: str, size: int, reason: str) -> None:
    sizes = {"jpg": 100, "txt": 100, member: size}
    if member == "json":
        del sizes["txt"]
    sparse_tar(tmp_path / "x.tar", *((f"a.{kind}", size) for kind, size in sizes.items()))
    source = open_shards(str(tmp_path), val=0).train
    with little_memory(), pytest.raises(BadSample) as error:
        source.read(0)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    ("members", "reason"),
    [({"txt": b"a" * 20_000}, "its caption is too large: 20,000 bytes, more than 16,384"),
     ({"json": json.dumps({"caption": ["ok", "a" * 20_000]}).encode()}, "its caption is too large: 20,000 bytes"),
     ({"json": b'{"caption": ' + b"[" * 900_000}, "its json cannot be read"),
     ({"json": b'{"caption": ' + b"9" * 900_000 + b"}"}, "its json cannot be read")],
    ids=["long", "one of two", "deep", "a number"],
)  # fmt: skip
def test_a_caption_that_would_hold_up_the_run_makes_its_sample_bad(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", picture(1)), *((f"a.{kind}", data) for kind, data in members.items())])
    with pytest.raises(BadSample) as error:
        open_shards(str(tmp_path), val=0).train.read(0)
    assert str(error.value).startswith(reason)


def test_what_a_listing_names_is_read_only_if_it_is_a_file_of_some_size(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with (tmp_path / "images/huge.jpg").open("wb") as file:
        file.truncate(10**10)
    (tmp_path / "images/zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "images/pipe.jpg")
    (tmp_path / "images/ok.png").write_bytes(picture(1))
    (tmp_path / "captions.txt").write_text("huge.jpg\tone\nzero.jpg\ttwo\npipe.jpg\tthree\nok.png\t" + "a" * 20_000)
    source = open_folder(str(tmp_path), val=0).train
    reasons = ["its picture is too large: 10,000,000,000", "there is no such file", "there is no such file"]
    for number, reason in enumerate([*reasons, "its caption is too large: 20,000 bytes"]):
        with little_memory(), pytest.raises(BadSample, match=reason):
            source.read(number)
    for name, reason in zip(("huge.jpg", "zero.jpg", "pipe.jpg"), reasons, strict=True):
        with little_memory(), pytest.raises(BadSample, match=reason):
            read_file(tmp_path / "images", name)


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "png")
    return file.getvalue()


def test_in_evaluation_a_picture_that_would_fill_the_memory_is_skipped(tmp_path: Path) -> None:
    caption = {"txt": b"a line"}
    bombs = {"ok": picture(1), "large": png(30_000, 3_000), "narrow": png(1, 60_000)}
    write_tar(
        tmp_path / "x.tar",
        [(f"{name}.{kind}", data) for name, bomb in bombs.items() for kind, data in {"png": bomb, **caption}.items()],
    )
    reader = EvalReader(open_shards(str(tmp_path), val=0).train, Preprocessing(224), SimpleTokenizer())
    chunk = reader.chunk(range(3))
    large, narrow = (record.reason for record in chunk.skipped)
    assert "decompression bomb" in large or "has 30000 x 3000 pixels, more than" in large
    assert narrow == "is too narrow: 1 x 60000 pixels"
    with pytest.raises(BadSample, match="is too narrow"):
        get_image_transform(224)(Image.new("RGB", (60_000, 1)))


@pytest.mark.parametrize("url", ["", "pipe:yes"])
def test_an_endless_response_is_cut_off(tmp_path: Path, serve: Callable[[Path], str], url: str) -> None:
    (tmp_path / "x.tar").write_bytes(bytes(20 << 20))
    url = url or f"{serve(tmp_path)}/x.tar"
    with pytest.raises(DataError, match=f"{url} has more than 1,000,000 bytes"):
        download(url, tmp_path / "part", Event(), 1_000_000)
    assert (tmp_path / "part").stat().st_size < 10 << 20


# ---------------------------------------------------------------- a forged index


def tampered(shard: Path, change: Callable[[dict], object], rows: bytes | None = None) -> None:
    """Rewrites the head of a shard's index, and optionally its rows."""
    index = shard.with_name(f"{shard.name}.index")
    with index.open("rb") as file:
        head = json.loads(file.readline())
        rows = file.read() if rows is None else rows
    change(head)
    index.write_bytes(json.dumps(head).encode() + b"\n" + rows)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda head: head.update(dtype=[["__key__", "|O"], ["json", "|O"], ["png", "|O"]]), b"\x41" * 24 * 3),
        (lambda head: head.update(dtype=[["__key__", "|S0"]], samples=10**12), b""),
        (lambda head: head.update(dtype=[["__key__", "|S2000000000"]], samples=0), b""),
        (lambda head: head.update(dtype=[["png", "<i8"]]), b"\x41" * 8 * 3),
        (lambda head: head.update(samples=10**12), None),
        (lambda head: head.update(samples=-1), None),
        (lambda head: head.update(total=10**30), None),
        (lambda head: head.update(readable="many"), None),
        (lambda head: head.pop("cut"), None),
    ],
    ids=["pointers", "rows of no bytes", "a key of 2 GB", "no key", "many samples", "fewer than none", "many lost",
         "no number", "a key less"],
)  # fmt: skip
def test_an_index_that_lies_is_made_again(
    make_shards: Callable[..., Path], tmp_path: Path, change: Callable[[dict], object], rows: bytes | None
) -> None:
    shard = make_shards(3) / "part-000.tar"
    index = make_index(shard, tmp_path)
    original = index.read_bytes()
    tampered(shard, change, rows)
    assert index.read_bytes() != original
    assert open_catalogue([shard], tmp_path).rows["samples"].tolist() == [3]
    assert index.read_bytes() == original


@pytest.mark.parametrize(
    "content", [b"[" * 900_000, pickle.dumps({"samples": 1}), b'{"dtype": [["__key__", "|S9"]]}\n']
)
def test_an_index_that_is_something_else_is_made_again(
    make_shards: Callable[..., Path], tmp_path: Path, content: bytes
) -> None:
    shard = make_shards(3) / "part-000.tar"
    shard.with_name("part-000.tar.index").write_bytes(content)
    assert open_catalogue([shard], tmp_path).rows["samples"].tolist() == [3]


@pytest.mark.parametrize(
    ("span", "reason"),
    [((-5, 10), "its index points outside the shard"), ((512, -1), "its index points outside the shard"),
     ((512, 1 << 40), "is lost"), ((1 << 62, 1 << 62), "is lost"), ((0, 0), "has no picture")],
)  # fmt: skip
def test_an_index_that_points_elsewhere_makes_its_samples_bad(
    make_shards: Callable[..., Path], tmp_path: Path, span: tuple[int, int], reason: str
) -> None:
    shard = make_shards(3) / "part-000.tar"
    table = np.array(read_table(make_index(shard, tmp_path)))
    table["png"] = table["json"] = span
    tampered(shard, lambda head: None, table.tobytes())
    with little_memory(), pytest.raises(BadSample, match=reason):
        open_shards(str(shard.parent), val=0).train.read(1)


@pytest.mark.parametrize("content", [b'{"successes": 1e400}', b'{"successes": -3}', b"[" * 900_000])
def test_counts_that_cannot_be_are_none(content: bytes) -> None:
    assert successes(content) is None


def test_a_member_called_like_the_key_is_no_member(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", picture(1)), ("a.__key__", b"x"), ("a.txt", b"one")])
    assert open_shards(str(tmp_path), val=0).train.read(0).captions == ["one"]
    assert read_head(tmp_path / "x.tar.index")["samples"] == 1


# ---------------------------------------------------------------- member names are not paths


def test_the_names_of_members_never_become_paths(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "inner/data"
    data.mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(picture(9))
    names = ["../../evil", "/etc/evil", f"{tmp_path}/secret", "a/../../../b", "..", "./x", "C:\\evil"]
    with tarfile.open(data / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for number, name in enumerate(names):
            for kind, content in (("png", picture(number)), ("txt", b"a thing")):
                info = tarfile.TarInfo(f"{name}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.png")
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(info)
    monkeypatch.chdir(tmp_path / "inner")
    train(
        "model=tiny",
        "data=shards",
        "data.root=data",
        "data.val=0",
        "batch_size=6",
        "max_steps=1",
        "name=x",
        "workers=0",
        "evals=[]",
    )
    source = open_shards(str(data), val=0).train
    assert sum(source.sizes) == 6  # ".." has no key; links and devices are ignored
    assert picture(9) not in [source.read(number).picture for number in range(6)]
    outside = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert outside == {"inner", "secret.png"} and (tmp_path / "secret.png").read_bytes() == picture(9)
    assert {path.name for path in (tmp_path / "inner").iterdir()} == {"data", "outputs"}
    assert {path.name for path in data.iterdir()} == {"x.tar", "x.tar.index"}
    assert not Path("/etc/evil.png").exists() and not (tmp_path.parent / "evil.png").exists()


# ---------------------------------------------------------------- network


def test_a_run_opens_no_socket_to_the_network(train: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket.bind

    def bind(self: socket.socket, address: object) -> None:
        assert self.family == socket.AF_UNIX, f"something listens at {address}"
        real(self, address)

    monkeypatch.setattr(socket.socket, "bind", bind)
    train("experiment=smoke", "max_steps=1", "workers=2", "name=x")


@pytest.mark.filterwarnings("ignore:html5lib", "ignore:pkg_resources")  # TensorBoard's own
def test_the_tensorboard_that_we_name_binds_to_localhost() -> None:
    from tensorboard.plugins.core.core_plugin import CorePluginLoader

    parser = argparse.ArgumentParser()
    CorePluginLoader().define_flags(parser)
    args = parser.parse_args(["--logdir", "outputs"])
    assert args.host is None and args.bind_all is False  # so its server binds to localhost
    for file in [*CODE, ROOT / "README.md", ROOT / "Makefile"]:
        assert not {"--bind_all", "--host", "0.0.0.0"} & set(file.read_text().replace('"', " ").split()), file


def test_a_checkpoint_that_swells_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {"a": torch.zeros(10_000_000)}}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "packed.pt").stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"packed\.pt is not a checkpoint"):
        load(tmp_path / "packed.pt")


@pytest.mark.parametrize("key", ["hydra: {callbacks: {x: {_target_: os.system}}}", "'hydra': {}", "defaults: [x]"])
def test_a_saved_config_that_would_steer_hydra_is_refused(fails: Callable[..., str], tmp_path: Path, key: str) -> None:
    (tmp_path / "config.yaml").write_text(f"seed: 0\n{key}\n")
    assert "does not belong in a run's config, as it can call any code; delete it" in fails("config=config.yaml")


def test_a_name_does_not_steer_the_terminal(fails: Callable[..., str], tmp_path: Path) -> None:
    names = [f"\x1b[2Jsample{n}.{kind}" for n in range(30) for kind in ("png", "txt")]
    write_tar(tmp_path / "data/x.tar", [(name, b"no") for name in names])
    message = fails("data=shards", "data.root=data", "data.val=0", "batch_size=4", "workers=0", "evals=[]", "name=x")
    assert "x.tar/?[2Jsample" in message and "\x1b" not in message
