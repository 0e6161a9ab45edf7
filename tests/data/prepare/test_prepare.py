"""Packing data sets in their published layouts, and verifying existing shards."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature
from io import BytesIO
from pathlib import Path
from threading import Thread

import hydra
import pytest
import webdataset
import yaml
from conftest import ROOT, picture, run_python, write_tar
from packed_data import SOURCES, dropped, metadata_of, read_tree, samples, save, sizes
from PIL import Image

from clipx.config.instantiate import build, locate
from clipx.config.resolve import resolve
from clipx.config.schema import PrepareConfig
from clipx.data.prepare import pack
from clipx.data.prepare import shard as writer
from clipx.data.shards import open_shards

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file", "ignore:.*Exception ignored in")  # webdataset's own


def make_coco(root: Path, train: int = 10, val: int = 4) -> Path:
    """COCO 2017 in its published layout, with five captions per picture whose ids are not in file order."""
    for split, count, shift in (("train", train, 0), ("val", val, 100)):
        images, annotations = [], []
        for number in range(shift, shift + count):
            name = f"{9 + 16 * number:012d}.jpg"
            save(root / f"{split}2017" / name, picture(number, "jpeg"))
            images.append(
                {
                    "license": 3,
                    "file_name": name,
                    "coco_url": f"http://images.cocodataset.org/{name}",
                    "height": 32,
                    "width": 40,
                    "date_captured": "2013-11-14 17:02:52",
                    "id": 9 + 16 * number,
                }
            )
            annotations += [
                {
                    "image_id": 9 + 16 * number,
                    "id": 1000 * number + 9 - turn,
                    "caption": f"Thing {number} seen for the {turn}th time. \n",
                }
                for turn in range(5)
            ]
        content = {"info": {"year": 2017}, "images": images, "licenses": [], "annotations": annotations}
        save(root / "annotations" / f"captions_{split}2017.json", content)
    return root


# ---------------------------------------------------------------- config


def composed(*overrides: str) -> PrepareConfig:
    with hydra.initialize_config_module("clipx.conf", version_base="1.3"):
        return resolve(hydra.compose("prepare", list(overrides)), PrepareConfig)


@pytest.mark.parametrize("path", sorted((ROOT / "conf/source").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_source_composes_and_restates_the_defaults_of_what_it_calls(path: Path) -> None:
    config = composed(f"source={path.stem}", "src=x", *SOURCES.get(path.stem, []))
    parameters = signature(locate(config.source["_target_"], "source")).parameters
    for key, parameter in parameters.items():
        assert parameter.default is parameter.empty or config.source[key] == parameter.default, key
    assert config.resize == (256 if path.stem == "cc3m" else None)
    build(config.source, "source")


def test_prepare_yaml_states_every_key_of_the_schema_and_the_help_every_source(tmp_path: Path) -> None:
    documented = yaml.safe_load((ROOT / "conf/prepare.yaml").read_text())
    keys = {field.name for field in fields(PrepareConfig)} - {"choices", "varied"}
    assert set(documented) - {"defaults", "hydra"} == keys
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    output = run_python("-m", "clipx.prepare", "--help", cwd=tmp_path).stdout
    assert all(path.stem in output for path in (ROOT / "conf/source").glob("*.yaml"))
    assert "samples_per_shard: 2000" in output


def test_a_mistake_ends_in_one_line_and_leaves_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    coco = str(make_coco(tmp_path / "coco", 1, 1))
    before = read_tree(tmp_path)
    args = ["source=coco", f"src={coco}"]
    assert refused() == "source has no value; add source=cc3m|coco|csv|flickr30k|folder|shards"
    assert refused("source=coko", "src=x") == "source=coko: there is no such option; did you mean coco?"
    assert refused("source=coco") == "src has no value; add src=..."
    assert refused(*args) == "out has no value; add out=DIR, a new directory"
    assert refused("source=csv", "src=x") == "source.image has no value; add source.image=..."
    assert refused(*args, "sedd=1") == "sedd: there is no such key; did you mean seed?"
    assert refused(*args, "out=o", "quality=101") == "quality=101: should be less than or equal to 100"
    assert refused(*args, "out=o", "encode=gif") == "encode='gif': should be 'jpg', 'webp' or 'png'"
    assert refused(*args, "out=o", "samples_per_shard=0").startswith("samples_per_shard=0: should be greater than 0")
    assert refused("source=coco", "src=no where", "out=o") == "src=no where is not a directory"
    assert refused("source=coco", f"src={coco}/val2017", "out=o").endswith(
        "has neither train2017/ nor val2017/; COCO's layout is train2017/, val2017/ and "
        "annotations/captions_train2017.json, captions_val2017.json"
    )
    assert refused(*args, "out=o", "source.karpathy=no.json") == "no.json: there is no such file"
    assert refused(*args, "out=o", f"source.karpathy={coco}/annotations/captions_val2017.json").endswith(
        "captions_val2017.json is not the published json: KeyError 'filename'"
    )
    assert refused("source=flickr30k", f"src={coco}", "out=o").startswith(
        f"src={coco} does not have Flickr30k's layout: "
    )
    assert refused("source=folder", f"src={coco}", "out=o").startswith(f"{coco} has neither images/ and captions.txt ")
    assert refused("source=cc3m", f"src={coco}", "out=o").startswith(f"src={coco} has neither Train_GCC-training.tsv ")
    assert refused("source=cc3m", "src=x", "source.timeout=0") == "source.timeout=0: should be greater than 0"
    assert refused("source=csv", "src=x", *SOURCES["csv"], "source.connections=0").endswith("should be greater than 0")
    assert refused("source=shards", f"src={coco}").startswith(f"src={coco} holds no shards (*.tar")
    assert refused("source=csv", "src=x", *SOURCES["csv"], "out=o").startswith("src=x is neither a .csv, .tsv,")
    assert read_tree(tmp_path) == before


# ---------------------------------------------------------------- layouts


def test_coco_is_one_sample_a_picture_with_its_five_captions(prepare: Callable[..., None], tmp_path: Path) -> None:
    make_coco(tmp_path / "co é=co")
    prepare("source=coco", "src=co é=co", "out=o u~t", "samples_per_shard=4")
    out = tmp_path / "o u~t"
    assert sizes(out) == [4, 3, 3] and sizes(out, "val") == [4]
    by_name = {row["name"]: row for row in metadata_of(out)}
    assert len(by_name) == 10
    assert by_name["train2017/000000000025.jpg"] == {
        "caption": [f"Thing 1 seen for the {turn}th time." for turn in (4, 3, 2, 1, 0)],
        "height": 32,
        "name": "train2017/000000000025.jpg",
        "width": 40,
    }
    by_key = {sample.key: sample for sample in samples(out)}
    assert sorted(by_key) == [f"{number:09d}" for number in range(10)]
    assert by_key["000000001"].picture == picture(1, "jpeg") and len(by_key["000000001"].captions) == 5
    report = json.loads((out / "report.json").read_text())
    tars = [path.stat().st_size for path in (out / "train").glob("*.tar")]
    assert report["splits"]["train"] == {
        "shards": 3,
        "samples": 10,
        "captions": 50,
        "bytes": sum(tars),
        "short_side": {"32": 10},
        "caption_words": {"7": 50},
    }
    assert report["splits"]["val"]["samples"] == 4 and report["dropped"] == {}
    assert not (out / ".prepare").exists() and (out / "dropped.jsonl").read_text() == ""
    indexes = {path.name: path.stat().st_mtime_ns for path in out.rglob("*.index")}
    assert len(indexes) == 4
    open_shards(str(out))  # the indexes are up to date
    assert {path.name: path.stat().st_mtime_ns for path in out.rglob("*.index")} == indexes


def test_captions_of_pictures_that_cocos_file_does_not_list_are_counted(
    prepare: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = make_coco(tmp_path / "c", 2, 1) / "annotations/captions_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"].append({"image_id": 777777, "id": 1, "caption": "of nothing"})
    save(file, content)
    prepare("source=coco", "src=c", "out=o")
    assert "1 captions belong to pictures that are not listed, such as image_id 777777" in caplog.text
    assert len(metadata_of(tmp_path / "o")) == 2


def test_karpathys_split_counts_where_it_is_given(prepare: Callable[..., None], tmp_path: Path) -> None:
    images = []
    for number, (folder, split) in enumerate(
        [("train2014", "train"), ("val2014", "restval"), ("val2014", "val"), ("val2014", "test")]
    ):
        name = f"COCO_{folder}_{number:012d}.jpg"
        save(tmp_path / "coco" / folder / name, picture(number, "jpeg"))
        save(tmp_path / "coco17" / "train2017" / f"{number:012d}.jpg", picture(number, "jpeg"))
        images.append(
            {
                "filepath": folder,
                "sentids": [number],
                "filename": name,
                "imgid": number,
                "split": split,
                "sentences": [{"tokens": ["a"], "raw": f"A {number}.", "imgid": number, "sentid": number}],
                "cocoid": number,
            }
        )
    save(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    for root in ("coco", "coco17"):
        prepare("source=coco", f"src={root}", "source.karpathy=dataset_coco.json", f"out={root}-out", "shuffle=false")
        out = tmp_path / f"{root}-out"
        assert [row["caption"] for row in metadata_of(out)] == [["A 0."], ["A 1."]]
        assert [row["caption"] for split in ("val", "test") for row in metadata_of(out, split)] == [["A 2."], ["A 3."]]


FLICKR_CSV = (
    "image_name| comment_number| comment\n"
    "1000.jpg| 0| Two men , one | with a hat .\n"
    "1000.jpg| 1| Two men .\n"
    "2199200615.jpg| 4   A dog runs across the grass .\n"  # malformed like this in the published file
)
FLICKR_TOKEN = (
    "1000.jpg#0\tTwo men , one | with a hat .\n1000.jpg#1\tTwo men .\n2199200615.jpg#4\tA dog runs across the grass .\n"
)


@pytest.mark.parametrize(
    ("listing", "text", "folder"),
    [("results.csv", FLICKR_CSV, "flickr30k_images"), ("results_20130124.token", FLICKR_TOKEN, "flickr30k-images")],
)
def test_flickr30k_is_read_from_its_csv_and_from_its_token_file(
    listing: str, text: str, folder: str, prepare: Callable[..., None], tmp_path: Path
) -> None:
    save(tmp_path / "f" / listing, text)
    for name in ("1000.jpg", "2199200615.jpg"):
        save(tmp_path / "f" / folder / name, picture(len(name), "jpeg"))
    prepare("source=flickr30k", "src=f", "out=o", "shuffle=false")
    assert [(row["name"], row["caption"]) for row in metadata_of(tmp_path / "o")] == [
        (f"{folder}/1000.jpg", ["Two men , one | with a hat .", "Two men ."]),
        (f"{folder}/2199200615.jpg", ["A dog runs across the grass ."]),
    ]


def test_a_line_that_cannot_be_read_is_named_and_left_out(
    prepare: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "f/results.csv", FLICKR_CSV + "what is this\n")
    save(tmp_path / "f/images/1000.jpg", picture(1, "jpeg"))
    prepare("source=flickr30k", "src=f", "out=o")
    assert "1 lines are not PICTURE|NUMBER|CAPTION and are left out: 'what is this'" in caplog.text
    assert json.loads((tmp_path / "o/report.json").read_text())["dropped"] == {"there is no such file": 1}
    assert json.loads((tmp_path / "o/dropped.jsonl").read_text()) == {
        "split": "train",
        "picture": "images/2199200615.jpg",
        "reason": "there is no such file",
    }


class Web(BaseHTTPRequestHandler):
    """Serves pictures by number, and the usual failures of the web."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        path = self.path.removeprefix("/")
        if path == "slow":
            time.sleep(1)
        status, data = (200, picture(int(path), "jpeg", (400, 300))) if path.isdigit() else (200, b"<html>no</html>")
        status = {"gone": 404, "busy": 503 if self.server.asked.count("/busy") < 2 else 200}.get(path, status)
        data = picture(77, "png") if path == "busy" else data
        self.send_response(status)
        if path == "shy":
            self.send_header("X-Robots-Tag", "noai, noimageai")
        self.send_header("Content-Length", str(len(data) * (1 + (path == "cut"))))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def web() -> Iterator[ThreadingHTTPServer]:
    """A server at ``web.url``; ``web.asked`` lists the requested paths."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.asked, server.url, server.handle_error = [], f"http://127.0.0.1:{server.server_port}", lambda *_: None
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_cc3m_is_downloaded_and_shrunk_and_unreachable_urls_are_reported(
    prepare: Callable[..., None], tmp_path: Path, web: ThreadingHTTPServer
) -> None:
    faulty = ["gone", "slow", "html", "cut", "shy", "busy"]
    rows = [(f"picture {path} , said <PERSON>", f"{web.url}/{path}") for path in [*map(str, range(6)), *faulty]]
    rows += [("nobody", "http://127.0.0.1:9/x"), ("picture 0 again", f"{web.url}/0")]
    save(tmp_path / "cc/Train_GCC-training.tsv", "".join(f"{caption}\t{url}\n" for caption, url in rows))
    save(tmp_path / "cc/Validation_GCC-1.1.0-Validation.tsv", f"held\t{web.url}/9\n")
    prepare("source=cc3m", "src=cc", "out=o", "shuffle=false", "source.timeout=0.4", "source.connections=8")
    assert [row["name"].rpartition("/")[2] for row in metadata_of(tmp_path / "o")] == [*map(str, range(6)), "busy"]
    assert metadata_of(tmp_path / "o")[0]["caption"] == ["picture 0 , said <PERSON>", "picture 0 again"]
    assert {(row["width"], row["height"]) for row in metadata_of(tmp_path / "o")} == {(341, 256), (40, 32)}
    assert [row["name"] for row in metadata_of(tmp_path / "o", "val")] == [f"{web.url}/9"]
    dropped = [json.loads(line) for line in (tmp_path / "o/dropped.jsonl").read_text().splitlines()]
    assert {row["picture"].rpartition("/")[2]: row["reason"] for row in dropped} == {
        "gone": "unreachable: HTTP 404",
        "slow": "unreachable: ReadTimeoutError",
        "html": "is not a picture",
        "cut": "unreachable: ProtocolError",
        "x": "unreachable: NewConnectionError",
        "shy": "unreachable: its owner asks not to be trained on (X-Robots-Tag)",
    }
    requests = len(web.asked)
    prepare(
        "source=cc3m", "src=cc", "out=o", "shuffle=false", "source.timeout=5"
    )  # source.timeout does not affect the result, so nothing is left to do
    assert len(web.asked) == requests


def test_labels_after_the_url_of_cc3m_are_left_alone(
    prepare: Callable[..., None], tmp_path: Path, web: ThreadingHTTPServer
) -> None:
    save(tmp_path / "labels.tsv", f"one\t{web.url}/1\tlabel,other\t/m/01,/m/0\t0.9,0.8\ntwo\t{web.url}/2\n")
    prepare("source=cc3m", "src=labels.tsv", "out=o", "shuffle=false")
    assert [(row["name"], row["caption"]) for row in metadata_of(tmp_path / "o")] == [
        (f"{web.url}/1", ["one"]),
        (f"{web.url}/2", ["two"]),
    ]


def test_a_lost_network_ends_the_run_and_the_same_command_resumes(
    prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path
) -> None:
    save(tmp_path / "x.tsv", "one\thttp://127.0.0.1:9/a\ntwo\thttp://127.0.0.1:9/b\n")
    message = refused("source=cc3m", "src=x.tsv", "out=o")
    assert message == (
        "none of the 2 pictures for o/train/cc3m-train-000000.tar can be used (2 unreachable; such "
        "as http://127.0.0.1:9/b); fix that and rerun the same command to resume"
    )
    assert not list((tmp_path / "o").iterdir())
    assert refused("source=cc3m", "src=x.tsv", "out=o2", "drop_duplicates=true").startswith("drop_duplicates=true comp")


# ---------------------------------------------------------------- order and encoding


def test_the_order_is_seeded_and_the_shards_are_of_even_size(prepare: Callable[..., None], tmp_path: Path) -> None:
    make_coco(tmp_path / "coco", 23, 1)
    orders = {}
    for name, args in {"a": [], "b": ["workers=2"], "c": ["seed=1"], "plain": ["shuffle=false"]}.items():
        prepare("source=coco", "src=coco", f"out={name}", "samples_per_shard=5", *args)
        assert sizes(tmp_path / name) == [5, 5, 5, 4, 4]
        orders[name] = [int(sample.key) for sample in samples(tmp_path / name)]
    assert orders["plain"] == list(range(23)) == sorted(orders["a"])
    assert orders["a"] == orders["b"] != orders["c"] and orders["a"] != orders["plain"]
    assert read_tree(tmp_path / "a") == read_tree(tmp_path / "b")


def make_mixed(root: Path) -> Path:
    """Pictures in various formats, one caption each; two are unusable and one is a duplicate."""
    large = picture(1, "jpeg", (640, 480))
    rows = {
        "big.jpg": large,
        "big.png": picture(2, "png", (300, 600)),
        "small.webp": picture(3, "webp", (50, 40)),
        "anim.gif": picture(4, "gif"),
        "again.jpg": large,
        "cut.jpg": large[: len(large) // 2],
        "text.jpg": b"hello",
        "wrong.png": picture(5, "jpeg"),
    }
    for name, data in rows.items():
        save(root / "images" / name, data)
    save(root / "captions.txt", "".join(f"{name}\tthis is {name}\n" for name in [*rows, "gone.jpg"]))
    return root


def formats_of(out: Path) -> dict[str, tuple[str, tuple[int, int]]]:
    """Format and size of each picture, by name; checks that the extension matches the format."""
    formats = {}
    for shard in sorted((out / "train").glob("*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            (kind,) = {"jpg", "png", "webp"} & set(sample)
            image = Image.open(BytesIO(sample[kind]))
            metadata = json.loads(sample["json"])
            assert image.format.lower().replace("jpeg", "jpg") == kind
            assert image.size == (metadata["width"], metadata["height"])
            formats[Path(metadata["name"]).name] = (kind, image.size)
    return formats


def test_bytes_stay_unless_they_must_not_and_the_extension_says_what_they_are(
    prepare: Callable[..., None], tmp_path: Path
) -> None:
    make_mixed(tmp_path / "m")
    prepare("source=folder", "src=m", "out=o", "shuffle=false")
    assert formats_of(tmp_path / "o") == {
        "big.jpg": ("jpg", (640, 480)),
        "big.png": ("png", (300, 600)),
        "small.webp": ("webp", (50, 40)),
        "anim.gif": ("png", (40, 32)),
        "again.jpg": ("jpg", (640, 480)),
        "cut.jpg": ("jpg", (640, 480)),
        "wrong.png": ("jpg", (40, 32)),
    }
    assert samples(tmp_path / "o")[0].picture == (tmp_path / "m/images/big.jpg").read_bytes()
    assert dropped(tmp_path / "o") == {"text.jpg": "is not a picture", "gone.jpg": "there is no such file"}


@pytest.mark.parametrize(
    ("args", "changed", "dropped_reasons"),
    [
        (["resize=100"], {"big.jpg": ("jpg", (133, 100)), "big.png": ("jpg", (100, 200)), "anim.gif": ("png", (40, 32)),
                          "cut.jpg": None}, {"cut.jpg": "does not decode"}),
        (["resize=100", "encode=webp"], {"big.jpg": ("webp", (133, 100)), "anim.gif": ("webp", (40, 32))}, {}),
        (["encode=png"], {"big.jpg": ("png", (640, 480)), "small.webp": ("png", (50, 40))}, {}),
        (["min_size=41"], {"small.webp": None, "anim.gif": None}, {"small.webp": "is too small: 50 x 40 pixels"}),
        (["drop_duplicates=true"], {"again.jpg": None}, {"again.jpg": "is a duplicate: of images/big.jpg"}),
        (["verify=true"], {"cut.jpg": None, "big.jpg": ("jpg", (640, 480))}, {"cut.jpg": "does not decode"}),
    ],
)  # fmt: skip
def test_pictures_are_shrunk_encoded_and_left_out_as_asked(
    args: list[str], changed: dict, dropped_reasons: dict, prepare: Callable[..., None], tmp_path: Path
) -> None:
    make_mixed(tmp_path / "m")
    prepare("source=folder", "src=m", "out=o", "shuffle=false", *args)
    formats = formats_of(tmp_path / "o")
    assert {name: formats.get(name) for name in changed} == changed
    for name, reason in dropped_reasons.items():
        assert dropped(tmp_path / "o")[name].startswith(reason)


def test_of_pictures_with_the_same_bytes_the_first_stays_with_its_own_captions(
    prepare: Callable[..., None], tmp_path: Path
) -> None:
    make_mixed(tmp_path / "m")
    prepare("source=folder", "src=m", "out=o", "drop_duplicates=true")
    captions = {Path(row["name"]).name: row["caption"] for row in metadata_of(tmp_path / "o")}
    assert captions["big.jpg"] == ["this is big.jpg"] and "again.jpg" not in captions
    assert json.loads((tmp_path / "o/report.json").read_text())["dropped"]["is a duplicate"] == 1


def test_nothing_left_is_an_error(prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path) -> None:
    save(tmp_path / "m/images/x", "")
    save(tmp_path / "m/captions.txt", "a.jpg\tone\nx\ttwo\n")
    assert refused("source=folder", "src=m", "out=o", "shuffle=false") == (
        "none of the 2 pictures for o/train/folder-train-000000.tar can be used (1 there is no such file, 1 is not "
        "a picture; such as images/a.jpg); fix that and rerun the same command to resume"
    )
    assert list((tmp_path / "o").iterdir()) == []  # so the corrected command can use it
    save(tmp_path / "m/images/a.jpg", picture(1, "jpeg"))
    prepare("source=folder", "src=m", "out=o")
    assert [sample.captions for sample in samples(tmp_path / "o")] == [["one"]]


# ---------------------------------------------------------------- interruptions


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(prepare: Callable[..., None], tmp_path: Path) -> None:
    make_coco(tmp_path / "coco", 300, 20)
    args = ["source=coco", "src=coco", "samples_per_shard=10", "encode=webp", "workers=2"]
    command = [sys.executable, "-m", "clipx.prepare", *args, "out=killed"]
    for shards in (3, 12):
        with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}) as running:
            while len(list(tmp_path.glob("killed/train/*.tar"))) < shards and running.poll() is None:
                time.sleep(0.005)
            running.send_signal(signal.SIGKILL)
        assert running.returncode == -signal.SIGKILL
        assert (tmp_path / "killed/.prepare").is_dir() and not (tmp_path / "killed/report.json").exists()
    prepare(*args, "out=killed", "workers=0")
    prepare(*args, "out=whole", "workers=0")
    assert read_tree(tmp_path / "killed") == read_tree(tmp_path / "whole")


def test_a_failure_between_any_two_files_costs_one_shard(
    prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_coco(tmp_path / "coco", 8, 2)
    args = ["source=coco", "src=coco", "samples_per_shard=2"]
    prepare(*args, "out=whole")
    failures = [
        (writer, "make_index", 3),
        (pack, "write", 1),
        (writer, "write", 3),
        (writer, "encode", 7),
        (pack, "finish", 1),
    ]
    for number, (module, name, nth) in enumerate(failures):
        calls, real = [], getattr(module, name)

        def fail(*args: object, calls: list = calls, real: Callable = real, nth: int = nth, **kwargs: object) -> object:
            calls.append(args)
            if len(calls) == nth:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as broken:
            broken.setattr(module, name, fail)
            assert refused(*args, f"out=o{number}") == (
                f"o{number}: No space left on device; fix that and rerun the same command to resume"
            )
        prepare(*args, f"out=o{number}")
        assert read_tree(tmp_path / f"o{number}") == read_tree(tmp_path / "whole")


def test_a_finished_directory_is_left_as_it_is_and_any_other_is_refused(
    prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path
) -> None:
    make_coco(tmp_path / "coco", 4, 2)
    args = ["source=coco", "src=coco"]
    prepare(*args, "out=o")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")}
    prepare(*args, "out=o", "workers=1")
    (tmp_path / "coco").rename(tmp_path / "moved")
    prepare("source=coco", "src=moved", "out=o")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")} == before
    args = ["source=coco", "src=moved"]
    assert refused(*args, "out=o", "resize=20", "shuffle=false").startswith(
        "out=o holds shards with other settings (shuffle=true there, false now; resize=null there, 20 now); "
    )
    save(tmp_path / "p/thesis.txt", "dear")
    assert refused(*args, "out=p").startswith("out=p holds something else (thesis.txt); shards need a new or empty")
    assert refused(*args, "out=p/thesis.txt").startswith("out=p/thesis.txt is a file")
    assert refused(*args, "out=moved").startswith("out=moved holds something else (annotations, train2017, val2017)")
    assert read_tree(tmp_path / "p") == {"thesis.txt": b"dear"}


# ---------------------------------------------------------------- existing shards


def test_every_bad_sample_is_listed_with_its_place_and_reason(
    prepare: Callable[..., None], refused: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = picture(1, "jpeg", (64, 64))
    rows = {
        "good": (original, "fine"),
        "cut": (original[:600], "fine"),
        "mute": (original, " "),
        "text": (b"no picture", "x"),
    }
    for shard, names in {"train/a.tar": ["good", "cut", "mute"], "val/b.tar": ["text", "good"]}.items():
        write_tar(
            tmp_path / "s" / shard,
            [
                member
                for name in names
                for member in ((f"{name}.txt", rows[name][1].encode()), (f"{name}.jpg", rows[name][0]))
            ],
        )
    write_tar(tmp_path / "s/train/c.tar", [("lonely.txt", b"words")])
    save(tmp_path / "s/train/d.tar", "no tar" * 300)
    (tmp_path / "s/train/e.tar").mkdir()
    for args in ([], ["workers=2"]):
        caplog.clear()
        caplog.set_level(logging.INFO, logger="clipx")
        assert refused("source=shards", "src=s", "verify=true", *args) == (
            "training would fail on 2 of 5 files (d.tar, e.tar); pack the incomplete tars again, or move them out of s"
        )
        bad = [json.loads(line) for line in (tmp_path / "s/bad.jsonl").read_text().splitlines()]
        assert [(row["shard"], row["key"]) for row in bad] == [
            ("train/a.tar", "cut"),
            ("train/a.tar", "mute"),
            ("train/c.tar", "lonely"),
            ("train/d.tar", None),
            ("train/e.tar", None),
            ("val/b.tar", "text"),
        ]
        starts = [
            "does not decode",
            "its caption is empty",
            "has no picture",
            "s/train/d.tar is not a tar",
            "s/train/e.tar is not a file",
            "does not decode: it is not a picture",
        ]
        assert all(row["reason"].startswith(start) for row, start in zip(bad, starts, strict=True))
        data = {row["key"]: (tmp_path / "s" / row["shard"]).read_bytes()[row["offset"] :] for row in bad if row["key"]}
        assert data["cut"].startswith(original[:600]) and data["mute"].startswith(original)
        assert data["text"].startswith(b"no picture") and data["lonely"].startswith(b"words")
        assert "verified  6 samples, 4 of them bad" in caplog.text and "train/a.tar, cut, byte" in caplog.text
        assert "s/train/d.tar is not a tar; leave it out" in caplog.text and "next" not in caplog.text
    (tmp_path / "s/train/d.tar").unlink()
    (tmp_path / "s/train/e.tar").rmdir()
    prepare("source=shards", "src=s", "verify=true")
    assert "next      python -m clipx.train model=small data=shards data.root=s" in caplog.text


@pytest.mark.parametrize("args", [[], ["verify=true"]])
def test_shards_that_training_would_refuse_end_with_exit_code_1(
    args: list[str], refused: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="clipx")
    rows = [(f"{number}.jpg", picture(number, "jpeg")) for number in range(20)]
    write_tar(tmp_path / "s/a.tar", [*rows, *((f"{number}.txt", b"a thing") for number in range(20))])
    assert refused("source=shards", "src=s", *args).startswith(
        "40 of the 40 samples in s cannot be used, but training tolerates 1% (data.max_skipped); "
    )
    assert "the members of a sample are not adjacent" in caplog.text and "next" not in caplog.text


def test_img2datasets_shards_are_indexed_as_they_are_and_its_counts_are_held_against_them(
    prepare: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="clipx")
    for shard, promised in (("00000", 2), ("00001", 3)):
        members = []
        for number in range(2):
            key = f"{shard}{number:04d}"
            metadata = {"caption": f"caption {key}", "url": "http://x", "key": key, "status": "success", "width": 40}
            members += [
                (f"{key}.jpg", picture(number, "jpeg")),
                (f"{key}.json", json.dumps(metadata).encode()),
                (f"{key}.txt", f"caption {key}".encode()),
            ]
        write_tar(tmp_path / f"laion/{shard}.tar", members)
        save(tmp_path / f"laion/{shard}_stats.json", {"count": 5, "successes": promised, "status_dict": {}})
        save(tmp_path / f"laion/{shard}.parquet", b"PAR1")
    prepare("source=shards", "src=laion")
    assert "indexed   4 samples in 2 shards" in caplog.text
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "laion/00001.tar holds 2 samples, but 00001_stats.json says 3"
    ]
    assert len(list((tmp_path / "laion").glob("*.index"))) == 2 and not (tmp_path / "laion/bad.jsonl").exists()
    assert samples_of(tmp_path / "laion") == [
        "caption 000000000",
        "caption 000000001",
        "caption 000010000",
        "caption 000010001",
    ]


def samples_of(root: Path) -> list[str]:
    source = open_shards(str(root), val=0).train
    return [source.read(number).captions[0] for number in range(sum(source.sizes))]


@pytest.mark.long
def test_coco_from_its_published_files_to_retrieval_over_five_captions(tmp_path: Path) -> None:
    make_coco(tmp_path / "coco 2017", train=90, val=12)
    commands = {
        "prepare": ["source=coco", "src=coco 2017", "out=data/coco", "samples_per_shard=40"],
        "check": ["model=small", "data=coco", "batch_size=16", "max_steps=3"],
        "train": ["model=small", "data=coco", "batch_size=16", "max_steps=3", "name=x"],
    }
    for command, args in commands.items():
        result = run_python("-m", f"clipx.{command}", *args, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert "90 pictures to train, 12 to validate" in (tmp_path / "outputs/x/train.log").read_text()
    final = json.loads((tmp_path / "outputs/x/summary.json").read_text())["final"]
    ranks = [final[f"val/retrieval/t2i_r{k}"] * 12 * 5 for k in (1, 5, 10)]  # number of hits among 60 captions
    assert all(abs(rank - round(rank)) < 1e-6 for rank in ranks) and ranks[2] > 0
    assert 0 < final["val/retrieval/i2t_median_rank"] <= 56  # the best of the five captions of a picture
