"""Remote shards, from local servers that are slow, refuse requests, cut responses short or disappear."""

import errno
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Event

import pytest
import torch
from conftest import ROOT, write_tar

from clipx.data.images import TrainCrop
from clipx.data.loader import load_chunks, train_ranges
from clipx.data.mix import open_mix
from clipx.data.plan import Plan, Window
from clipx.data.readers import Chunk, TrainReader
from clipx.data.remote import prefetch, sizes, stores
from clipx.data.remote.cache import Cache
from clipx.data.sample import Data
from clipx.data.shards import open_shards
from clipx.data.tar.headers import DataError
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer

TOKENIZER = SimpleTokenizer()
SIZES = (9, 4, 14, 8, 11, 5, 12)  # samples of the shards
WINDOW = 6  # samples


class Handler(SimpleHTTPRequestHandler):
    """Serves a directory, with the faults set on its server."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, name = self.server, self.path.partition("?")[0].rpartition("/")[2]
        server.asked.append(name)
        fault = server.faults.get(name, [])
        status = fault.pop(0) if fault else server.fault
        if isinstance(status, int):
            self.send_error(status)
        elif status == "cut":
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        elif status == "short":  # complete, according to its Content-Length
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) // 2))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            time.sleep(server.wait)
            super().do_GET()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        self.root, self.wait, self.fault, self.up = root, 0.0, None, True
        self.faults: dict[str, list[int | str | None]] = {}
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        pass  # the client has disconnected

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        if self.up:
            self.socket.shutdown(socket.SHUT_RDWR)  # forked workers also hold it open
            self.up = False
        self.shutdown()
        self.server_close()

    def copies(self) -> list[str]:
        """The shards that were requested."""
        return [name for name in self.asked if name.endswith(".tar")]


@pytest.fixture
def server(make_shards: Callable[..., Path]) -> Iterator[Server]:
    """Serves seven shards, each next to its index."""
    root = make_shards(*SIZES)
    open_shards(str(root), val=0)
    server = Server(root)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "WAITS", (0.02, 0.04, 0.08))
    monkeypatch.setattr(stores, "PAUSE", 0.02)


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> Callable[..., Data]:
    """Opens the server's shards."""

    def open_remote(**overrides: object) -> Data:
        options = {
            "shards": f"{server.url}/part-{{000..006}}.tar", "val": 0, "index_dir": str(tmp_path / "indexes"),
            "cache": str(tmp_path / "cache"), "cache_gb": 1.0, "shuffle_window": WINDOW, **overrides,
        }  # fmt: skip
        return open_shards(**options)

    return open_remote


def reader_of(data: Data) -> TrainReader:
    return TrainReader(data.train, data.plan(0), TrainCrop(Preprocessing(16), (0.5, 1.0), "fast"), TOKENIZER)


def chunks_of(data: Data, count: int = 20, workers: int = 0, start: int = 0, batch: int = 5) -> list[Chunk]:
    return list(itertools.islice(load_chunks(reader_of(data), train_ranges(start, batch), workers, pin=False), count))


def assert_same(actual: list[Chunk], expected: list[Chunk]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.captions == b.captions and a.position == b.position and torch.equal(a.samples, b.samples)
        assert torch.equal(a.images, b.images) and torch.equal(a.tokens.ids, b.tokens.ids)


def local(server: Server) -> Data:
    return open_shards(str(server.root), val=0, shuffle_window=WINDOW)


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("shards-*/*"))


def sufficient_gb(server: Server, neighbours: int = 3) -> float:
    """Size in GB of the largest neighbouring windows: two, or three where an epoch ends."""
    data = local(server)
    sizes = data.train.catalogue.rows["bytes"]
    checked = itertools.islice(data.plan(0).windows(0), prefetch.CHECKED + neighbours)
    windows = [set(window.shards) for window in checked]
    neighbourhoods = zip(*(windows[first:] for first in range(neighbours)), strict=False)
    return max(int(sizes[list(set().union(*group))].sum()) for group in neighbourhoods) / 1e9


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_are_those_of_local_shards(server: Server, remote: Callable[..., Data], workers: int) -> None:
    data = remote(cache_gb=sufficient_gb(server))
    assert data.train.id == local(server).train.id
    assert_same(chunks_of(data, workers=workers), chunks_of(local(server)))
    assert_same(chunks_of(data, 6, workers, start=95), chunks_of(local(server), 6, start=95))


def test_the_cache_holds_no_more_than_it_may_at_any_moment(
    server: Server, remote: Callable[..., Data], tmp_path: Path
) -> None:
    limit = sufficient_gb(server)
    data = remote(cache_gb=limit)
    totals, done = [], threading.Event()

    def look() -> None:
        while not done.is_set():
            sizes = []
            for path in copies(tmp_path):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            totals.append(sum(sizes))

    watch = threading.Thread(target=look)
    watch.start()
    chunks_of(data, 40)
    done.set()
    watch.join()
    assert len(totals) > 50 and 0 < max(totals) <= 1e9 * limit
    assert len(server.copies()) > 2 * len(SIZES)  # evicted, and copied again
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_what_is_still_needed_is_not_evicted(server: Server, remote: Callable[..., Data]) -> None:
    data = remote(cache_gb=sufficient_gb(server))
    expected = chunks_of(local(server), 24)
    plan = data.plan(0)
    batches = load_chunks(reader_of(data), train_ranges(0, 5), 0, pin=False)
    for a, b in zip(batches, expected, strict=False):
        assert_same([a], [b])
        time.sleep(0.05)  # lets the cache prefetch far ahead
        needed = next(plan.windows(a.position)).shards
        assert all(data.train.catalogue.remotes[shard].is_cached() for shard in needed)


def test_too_small_a_cache_is_refused_with_a_sufficient_size(server: Server, remote: Callable[..., Data]) -> None:
    with pytest.raises(DataError, match=r"data\.cache_gb=1e-05 is too small for two windows of shards") as raised:
        chunks_of(remote(cache_gb=0.00001))
    sufficient = float(str(raised.value).partition("at least data.cache_gb=")[2])
    assert sufficient_gb(server, 2) <= sufficient < 1.02 * sufficient_gb(server, 3)
    chunks_of(remote(cache_gb=sufficient), 40)
    with pytest.raises(DataError, match=r"data\.cache_gb=1e-05 is too small for the validation shards"):
        remote(val_shards=f"{server.url}/part-000.tar", cache_gb=0.00001)


def test_a_set_much_smaller_than_the_window_starts_at_once(
    server: Server, remote: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(server.root / "part-007.tar", [])  # empty, so never read
    open_shards(str(server.root), val=0)
    visited, windows = [], Plan.windows

    def count_windows(plan: Plan, position: int) -> Iterator[Window]:
        for window in windows(plan, position):
            visited.append(window)
            yield window

    monkeypatch.setattr(Plan, "windows", count_windows)
    chunks_of(remote(shards=f"{server.url}/part-{{000..007}}.tar", shuffle_window=131_072), 1)
    assert len(visited) < 4 * prefetch.CHECKED  # not 2,000 for each window
    assert "part-007.tar" not in server.asked


def test_cached_shards_are_reused_without_another_request(server: Server, remote: Callable[..., Data]) -> None:
    chunks_of(remote())
    assert sorted(server.copies()) == sorted(f"part-{number:03d}.tar" for number in range(7))
    assert len(server.asked) == 15  # dataset_type.txt, and each shard with its index
    chunks_of(remote())
    assert len(server.asked) == 15


def test_copies_of_another_set_count_and_give_way(server: Server, remote: Callable[..., Data], tmp_path: Path) -> None:
    other = tmp_path / "cache" / "shards-0123456789abcdef" / "x.tar"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(int(1e9 * sufficient_gb(server))))
    unrelated = tmp_path / "cache" / "my.tar"
    unrelated.write_bytes(b"not ours")
    chunks_of(remote(cache_gb=sufficient_gb(server)))
    assert not other.exists() and unrelated.exists()


def test_a_copy_that_is_not_what_it_should_be_is_made_again(
    server: Server, remote: Callable[..., Data], tmp_path: Path
) -> None:
    chunks_of(remote())
    copies(tmp_path)[3].write_bytes(b"half")
    copies(tmp_path)[4].unlink()
    (copies(tmp_path)[0].parent / "left.part").write_bytes(b"x")
    server.asked.clear()
    assert_same(chunks_of(remote()), chunks_of(local(server)))
    assert sorted(server.asked) == ["part-003.tar", "part-004.tar"] and len(copies(tmp_path)) == 7


def test_faults_of_a_server_that_pass_are_survived(
    server: Server, remote: Callable[..., Data], caplog: pytest.LogCaptureFixture
) -> None:
    server.wait = 0.02
    server.faults = {
        "part-000.tar": [503, 503, "cut"], "part-001.tar": ["cut"], "part-002.tar": [429, 500],
        "part-003.tar": ["short"], "part-004.tar.index": [503, "cut"],
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert_same(chunks_of(remote()), chunks_of(local(server)))
    assert "part-000.tar cannot be copied (Generic HTTP error: HTTP error: request or respo" in caplog.text
    assert "trying again in 0.02 s" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("faults", "tries", "reason"),
    [
        ([404], 1, "HTTP 404 Not Found"),
        ([403], 1, "HTTP 403 Forbidden"),
        ([503] * 9, 4, "HTTP 503 Service Unavailable"),
        (["cut"] * 9, 4, "Generic HTTP error: HTTP error: request or response body error"),
        (["short"] * 9, 4, r"got [\d,]+ bytes instead of [\d,]+"),
    ],
    ids=["404", "403", "503", "cut", "short"],
)
def test_a_shard_that_cannot_be_had_ends_the_run_with_its_url_when_it_is_needed(
    server: Server, remote: Callable[..., Data], faults: list[int | str], tries: int, reason: str, workers: int
) -> None:
    data = remote()
    last = data.plan(0).windows(0)
    first, *_, bad = next(last).shards, *(next(last).shards for _ in range(4))
    name = f"part-{next(shard for shard in bad if shard not in first):03d}.tar"
    server.faults = {name: list(faults)}
    start = time.perf_counter()
    with pytest.raises(DataError, match=rf"^http://.*/{name} cannot be copied \({reason}.*rerun the same command"):
        chunks_of(data, 40, workers)
    assert server.asked.count(name) == tries and time.perf_counter() - start < 8


def test_a_server_that_is_down_is_reported_by_every_rank(server: Server, remote: Callable[..., Data]) -> None:
    data = remote(cache_gb=sufficient_gb(server))
    batches = load_chunks(reader_of(data), train_ranges(0, 5), 2, pin=False)
    next(batches)
    server.stop()
    with pytest.raises(DataError, match=r"/part-00\d\.tar cannot be copied \(HTTP error: error sending"):
        list(itertools.islice(batches, 40))
    with pytest.raises(DataError, match="cannot be copied"):
        chunks_of(remote(cache_gb=sufficient_gb(server)), 40)


def test_the_death_of_the_thread_ends_the_run(
    server: Server, remote: Callable[..., Data], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Cache, "make_room", broken)
    with pytest.raises(DataError, match="ZeroDivisionError: a defect"):
        chunks_of(remote(), workers=1)
    assert "the thread that copies shards failed" in caplog.text and "in broken" in caplog.text


def test_the_thread_does_not_outlive_the_reading(server: Server, remote: Callable[..., Data]) -> None:
    before = set(threading.enumerate())
    server.wait = 0.3
    batches = load_chunks(reader_of(remote()), train_ranges(0, 5), 0, pin=False)
    next(batches)
    batches.close()
    count = len(server.asked)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and {t.name for t in set(threading.enumerate()) - before if "worker" in t.name}:
        time.sleep(0.02)
    time.sleep(0.4)
    assert len(server.asked) == count


def test_a_process_can_exit_while_a_server_is_silent(
    server: Server, remote: Callable[..., Data], tmp_path: Path
) -> None:
    remote()
    server.wait = 20.0
    code = (
        "import sys\nsys.path[:0] = sys.argv[1].split()\nimport test_cache as t\nfrom pathlib import Path\n"
        "data = t.open_shards(shards=sys.argv[2], val=0, index_dir=sys.argv[3], cache=sys.argv[4], shuffle_window=10)\n"
        "next(t.load_chunks(t.reader_of(data), t.train_ranges(0, 5), 2, pin=False))"
    )
    paths = f"{ROOT / 'tests'} {Path(__file__).parent}"
    args = [paths, f"{server.url}/part-{{000..006}}.tar", str(tmp_path / "indexes"), str(tmp_path / "c")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, *args], env=environment, stderr=subprocess.PIPE, cwd=ROOT)
    while not server.copies():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    _, stderr = process.communicate(timeout=15)
    assert b"KeyboardInterrupt" in stderr and time.perf_counter() - start < 6


def test_one_run_at_a_time_fills_a_cache(server: Server, remote: Callable[..., Data], tmp_path: Path) -> None:
    batches = load_chunks(reader_of(remote()), train_ranges(0, 5), 0, pin=False)
    next(batches)
    with pytest.raises(DataError, match=r"data\.cache=.*cache is in use by another run; use another one"):
        chunks_of(remote())
    batches.close()
    chunks_of(remote(), 1)


def test_another_rank_waits_for_what_the_first_copies(server: Server, remote: Callable[..., Data]) -> None:
    server.wait = 0.05
    readers = [reader_of(remote()) for _ in range(2)]
    ranks = [
        load_chunks(reader, train_ranges(0, 6, rank=rank, world=2), 0, pin=False, fill=rank == 0)
        for rank, reader in enumerate(readers)
    ]
    batches = [list(itertools.islice(zip(*ranks, strict=True), 12))]
    expected = chunks_of(local(server), 12, batch=6)
    for halves, both in zip(batches[0], expected, strict=True):
        assert torch.equal(torch.cat([part.images for part in halves]), both.images)
    assert len(server.copies()) == 7


def test_a_sample_is_read_without_a_run_too(server: Server, remote: Callable[..., Data]) -> None:
    assert remote().train.read(20) == local(server).train.read(20)
    assert server.copies() == ["part-002.tar"]


def test_counts_come_from_img2datasets_stats(server: Server, remote: Callable[..., Data]) -> None:
    for number, size in enumerate(SIZES):
        server.root.joinpath(f"part-{number:03d}.tar.index").unlink()
        server.root.joinpath(f"part-{number:03d}_stats.json").write_text(json.dumps({"count": 99, "successes": size}))
    data = remote()
    assert list(data.train.sizes) == list(SIZES) and not server.copies()
    assert_same(chunks_of(data), chunks_of(local(server)))


def test_a_count_that_is_not_the_shards_ends_the_run(server: Server, remote: Callable[..., Data]) -> None:
    server.root.joinpath("part-002.tar.index").unlink()
    server.root.joinpath("part-002_stats.json").write_text(json.dumps({"successes": 15}))
    with pytest.raises(DataError, match=r"http://.*/part-002\.tar holds 14 samples, but the index or stats file"):
        chunks_of(remote(), 40)


def test_where_nothing_tells_the_counts_each_shard_is_copied_once(
    server: Server, remote: Callable[..., Data], tmp_path: Path
) -> None:
    for index in server.root.glob("*.index"):
        index.write_text("<html>there is no such page</html>")
    data = remote()
    assert list(data.train.sizes) == list(SIZES) and sorted(server.copies()) == sorted(set(server.copies()))
    remote()
    assert_same(chunks_of(data), chunks_of(local(server)))
    assert len(server.copies()) == 7 and len(copies(tmp_path)) == 7
    write_tar(server.root / "broken.tar", []).write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match=r"^http://.*/broken\.tar is not a tar"):
        remote(shards=f"{server.url}/broken.tar")


def test_more_shards_than_are_asked_about_at_once_and_a_query(
    server: Server, remote: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "ASKED", 3)
    signed = remote(shards=f"{server.url}/part-{{000..006}}.tar?token=a")
    assert list(signed.train.sizes) == list(SIZES) and len(server.asked) == 8
    assert list(remote(shards=f"{server.url}/part-{{000..006}}.tar?token=b").train.sizes) == list(SIZES)
    assert len(server.asked) == 8 and signed.train.id == local(server).train.id


def test_remote_validation_is_copied_whole_and_stays(
    server: Server, remote: Callable[..., Data], tmp_path: Path
) -> None:
    val_shards = f"{server.url}/part-00{{5..6}}.tar"
    data = remote(
        shards=f"{server.url}/part-00{{0..4}}.tar",
        val_shards=val_shards,
        val=0.02,
        cache_gb=1.5 * sufficient_gb(server),
    )
    assert sorted(server.copies()) == ["part-005.tar", "part-006.tar"] and list(data.val.sizes) == [5, 12]
    chunks_of(data, 40)
    assert all(data.val.catalogue.remotes[shard].is_cached() for shard in range(2))
    assert server.copies().count("part-005.tar") == 1 and data.val.read(3).captions[0] == "thing number 49"


def test_a_share_for_validation_is_refused(remote: Callable[..., Data]) -> None:
    with pytest.raises(ValueError, match=r"^val=0\.02 would hold out pictures.*data\.val_shards=URL, or data\.val=0"):
        remote(val=0.02)


def test_remote_and_local_shards_mix(
    server: Server, remote: Callable[..., Data], make_shards: Callable[..., Path]
) -> None:
    local_root = make_shards(30, folder="own")
    shards = [str(local_root / "part-000.tar"), f"{server.url}/part-{{000..006}}.tar"]
    same = remote(shards=[shards[0], str(server.root / "*.tar")])
    data = remote(shards=shards)
    assert data.train.id == same.train.id
    assert_same(chunks_of(data), chunks_of(same))

    def mix(shards: Data) -> Data:
        parts = {"own": open_shards(str(local_root), val=0.1), "far": shards}
        return open_mix(parts, {"own": 1, "far": 2}, shuffle_window=WINDOW)

    assert_same(chunks_of(mix(remote(shuffle_window=131_072))), chunks_of(mix(open_shards(str(server.root), val=0))))


def test_file_urls_are_files(server: Server, remote: Callable[..., Data]) -> None:
    for prefix in ("file:", "file://", "file://localhost"):
        data = remote(shards=f"{prefix}{server.root}/part-{{000..006}}.tar")
        assert data.train.id == local(server).train.id and not data.train.remotes
    assert not server.asked


def test_a_pipe_runs_only_where_it_is_allowed(server: Server, remote: Callable[..., Data], tmp_path: Path) -> None:
    shards = f"pipe:touch {tmp_path}/ran; cat {server.root}/part-{{000..006}}.tar"
    for keys in ({"shards": shards}, {"val_shards": shards}):
        with pytest.raises(ValueError, match=r"shards=pipe:touch .* would run a command; data\.allow_pipe=true"):
            remote(**keys)
    assert not (tmp_path / "ran").exists()
    data = remote(shards=shards, allow_pipe=True, cache_gb=sufficient_gb(server))
    assert (tmp_path / "ran").exists() and data.train.id == local(server).train.id
    assert_same(chunks_of(data), chunks_of(local(server)))
    with pytest.raises(DataError, match=r"^pipe:cat .*nowhere\.tar cannot be copied \(.*exit 1 "):
        remote(shards=f"pipe:cat {tmp_path}/nowhere.tar", allow_pipe=True)


def test_what_cannot_be_opened_is_one_line(remote: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"^odd://b/x\.tar cannot be opened: .* http\(s\)://, s3://, gs:// or az:"):
        remote(shards="odd://b/x.tar")
    with pytest.raises(DataError, match=r"^http://h/\*\.tar: web servers do not list files; give the numbers"):
        remote(shards="http://h/*.tar")
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(DataError, match=r'^gs://b/.* needs obstore, which is not .*; pip install "clipx\[remote\]"$'):
        remote(shards="gs://b/x.tar")
    with pytest.raises(ValueError, match=r"^root=s3://b/x is a URL; list the shards: data\.shards='s3://b/x/"):
        open_shards("s3://b/x")


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shards in S3, mocked by moto."""
    import boto3
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    for name, value in {
        "ENDPOINT_URL": f"http://{host}:{port}",
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="clipx-test")
    for path in sorted(server.root.iterdir()):
        s3.upload_file(str(path), "clipx-test", f"set/{path.name}")
    yield "s3://clipx-test/set"
    moto.stop()


def test_shards_come_from_s3(bucket: str, server: Server, remote: Callable[..., Data]) -> None:
    data = remote(shards=f"{bucket}/*.tar", cache_gb=sufficient_gb(server))
    assert data.train.id == local(server).train.id and not server.asked
    assert_same(chunks_of(data, workers=1), chunks_of(local(server)))
    with pytest.raises(DataError, match=r"^s3://clipx-test/set/part-007\.tar cannot be copied \(HTTP 404"):
        remote(shards=f"{bucket}/part-007.tar")


def test_a_bucket_without_credentials_fails_at_once(
    remote: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside the cloud, the metadata server that hands out credentials does not exist."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(stores, "METADATA", "127.0.0.1:9")
    monkeypatch.setattr(stores, "WAITS", (60,))
    start = time.monotonic()
    with pytest.raises(DataError, match=r"^s3://b/x\.tar cannot be copied \(no credentials; set AWS_ACCESS_KEY_ID and"):
        remote(shards="s3://b/x.tar")
    with pytest.raises(DataError, match=r"^az://c/x\.tar cannot be opened: .*Account must be specified"):
        remote(shards="az://c/x.tar")
    assert time.monotonic() - start < 10


def test_a_signed_url_keeps_its_query(server: Server, tmp_path: Path) -> None:
    stores.download(f"{server.url}/part-001.tar?X-Sig=a%2Fb&x=%20", tmp_path / "part", threading.Event(), 1 << 20)
    assert (tmp_path / "part").read_bytes() == (server.root / "part-001.tar").read_bytes()


def test_a_run_trains_from_http_and_resumes_when_the_server_is_back(
    server: Server, train: Callable[..., None], fails: Callable[..., str], tmp_path: Path
) -> None:
    args = [
        "data=shards", f"data.shards={server.url}/part-{{000..005}}.tar", f"data.val_shards={server.url}/part-006.tar",
        "data.index_dir=indexes", "data.cache=cache", "data.cache_gb=0.001", f"data.shuffle_window={WINDOW}",
        "batch_size=5", "max_steps=16", "name=far", "workers=1", "evals=[]", "log_every=1",
    ]  # fmt: skip
    windows = Plan(SIZES[:6], 0, WINDOW).windows(0)
    reachable = {shard for window in itertools.islice(windows, 3) for shard in window.shards}
    server.faults = {f"part-{number:03d}.tar": [503] * 9 for number in set(range(6)) - reachable}  # the others fail
    told = fails(*args)
    assert "cannot be copied (HTTP 503 Service Unavailable" in told
    saved = torch.load(tmp_path / "outputs/far/checkpoints/clip_last.pt", weights_only=True)
    assert 0 < saved["step"] < 16
    server.faults = {}
    train(*args)
    summary = json.loads((tmp_path / "outputs/far/summary.json").read_text())
    assert summary["state"] == "finished"
    local_args = [f"data.shards={server.root}/part-{{000..005}}.tar", f"data.val_shards={server.root}/part-006.tar"]
    train(*args[:1], *local_args, *args[6:9], "name=near", *args[10:])
    local_summary = json.loads((tmp_path / "outputs/near/summary.json").read_text())
    assert local_summary["final"]["train/loss"] == summary["final"]["train/loss"]


def test_a_full_disk_is_not_tried_again() -> None:
    tried = []

    def write(url: str) -> None:
        tried.append(url)
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        ThreadPool(1) as pool,
        pytest.raises(DataError, match=r"^a\.tar cannot be copied .*No space left"),
    ):
        stores.run_with_retries(pool, write, ["a.tar"], Event())
    assert tried == ["a.tar"]
