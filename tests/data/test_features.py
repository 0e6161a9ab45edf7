"""Views of samples, and the file of a frozen tower's features that takes the place of pictures."""

import errno
import itertools
import os
import pickle
import re
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture, write_tar

from clipx.data.dummy import Dummy
from clipx.data.features import FeatureFile, open_features
from clipx.data.folder import Folder
from clipx.data.images import TrainCrop
from clipx.data.loader import load_chunks, train_ranges
from clipx.data.mix import Chain
from clipx.data.plan import MixPlan, Plan
from clipx.data.readers import Chunk, TrainReader
from clipx.data.sample import BadSample, Sample, Source, Subset, captions_of
from clipx.data.shards import open_shards
from clipx.data.tar.headers import DataError
from clipx.errors import UserError
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer

TOKENIZER = SimpleTokenizer()
SAMPLES, WIDTH, VIEWS = 27, 8, 2
ABOUT = {"tower": "image", "key": "a1"}


@pytest.fixture
def source(make_shards: Callable[..., Path]) -> Source:
    return open_shards(str(make_shards(9, 4, 14)), val=0).train


def reader_of(source: Source, views: int | None = VIEWS, plan: Plan | MixPlan | None = None, **options) -> TrainReader:
    plan = plan or Plan(source.sizes, 0, 64)
    crop = TrainCrop(Preprocessing(16), (0.5, 1.0), "fast")
    return TrainReader(source, plan, crop, TOKENIZER, views=views, **options)


def chunks_of(reader: TrainReader, count: int, batch: int = 8, workers: int = 0) -> list[Chunk]:
    return list(itertools.islice(load_chunks(reader, train_ranges(0, batch), workers, pin=False), count))


@pytest.fixture
def features(tmp_path: Path) -> FeatureFile:
    return open_features(tmp_path / "features" / "image-a1", VIEWS * SAMPLES, WIDTH, ABOUT)


def feature(row: int) -> np.ndarray:
    return np.full((1, WIDTH), row + 1, np.float16)


def fill(file: FeatureFile, rows: range) -> None:
    for row in rows:
        file.write(np.array([row]), feature(row))


def test_rows_that_a_file_does_not_have_are_not_written(features: FeatureFile) -> None:
    rows = np.array([-1, 3, features.rows, 4])
    features.write(rows, np.concatenate([feature(row) for row in rows]))
    assert features.count() == 2 and features.read(4)[0] == 5


@pytest.mark.parametrize("caption_views", [VIEWS, None])
def test_crops_repeat_after_the_views_and_captions_after_theirs(source: Source, caption_views: int | None) -> None:
    epochs = chunks_of(reader_of(source, caption_views=caption_views), 5, SAMPLES)

    def by_sample(chunk: Chunk) -> tuple[list[str], torch.Tensor]:
        order = chunk.samples.argsort()
        return [chunk.captions[row] for row in order], chunk.images[order]

    (captions, images), (others, other_images), (again, same_images), *_ = map(by_sample, epochs)
    assert (captions == again) is (caption_views == VIEWS) and torch.equal(images, same_images)
    assert captions != others and not torch.equal(images, other_images)
    assert epochs[0].samples.tolist() != epochs[2].samples.tolist()  # the order is new in each epoch


def test_the_first_views_are_those_of_a_run_without_views(source: Source) -> None:
    free, bound = (chunks_of(reader_of(source, views, caption_views=views), 3, SAMPLES) for views in (None, VIEWS))
    assert all(
        torch.equal(a.images, b.images) and a.captions == b.captions for a, b in zip(free[:2], bound[:2], strict=True)
    )
    assert free[2].captions != bound[2].captions and free[2].samples.tolist() == bound[2].samples.tolist()


def test_the_views_of_a_mix_follow_the_epochs_of_each_source() -> None:
    parts = [Dummy(6, 16, 0), Dummy(20, 16, 1)]
    plan = MixPlan([part.sizes for part in parts], [1, 1], 0, 64)
    reader = reader_of(Chain(parts), plan=plan)
    places = {reader.place(position) for position in range(200)}
    seen = {(place.epoch % VIEWS, place.sample) for place in places}
    rows = {reader.row(place) for place in places}
    assert len(rows) == len(seen) == 2 * 26 and max(rows) < VIEWS * plan.samples


def test_rows_that_are_known_are_not_read(source: Source, features: FeatureFile, monkeypatch) -> None:
    known = range(5, VIEWS * SAMPLES)
    fill(features, known)
    reader = reader_of(source, features={"image": features})
    read: list[int] = []
    monkeypatch.setattr(type(source), "read", lambda self, sample: read.append(sample) or original(self, sample))
    chunks = chunks_of(reader, 4, SAMPLES)
    assert sorted(read) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # the first view, in epochs 0 and 2
    plain = chunks_of(reader_of(source), 4, SAMPLES)
    for chunk, whole in zip(chunks, plain, strict=True):
        stored = chunk.stored["image"]
        assert len(chunk) == SAMPLES and chunk.captions == whole.captions
        assert torch.equal(chunk.samples, whole.samples) and torch.equal(chunk.tokens.ids, whole.tokens.ids)
        assert stored.known.tolist() == [row in known for row in chunk.rows["image"].tolist()]
        assert torch.equal(chunk.images, whole.images[~stored.known])
        assert stored.features[:, 0].tolist() == [row + 1 for row in chunk.rows["image"][stored.known].tolist()]


original = open_shards.__globals__["Shards"].read


def test_nothing_is_read_where_both_towers_are_known(source: Source, features: FeatureFile, monkeypatch) -> None:
    fill(features, range(VIEWS * SAMPLES))
    monkeypatch.setattr(type(source), "row", None)
    chunk = chunks_of(reader_of(source, features={"image": features, "text": features}), 1, SAMPLES)[0]
    assert len(chunk) == SAMPLES and not len(chunk.images) and not len(chunk.tokens.lengths)
    assert chunk.stored["text"].known.all()


def test_captions_of_unknown_rows_alone_are_tokenized(source: Source, features: FeatureFile) -> None:
    fill(features, range(20))
    chunk = chunks_of(reader_of(source, features={"text": features}), 1, SAMPLES)[0]
    whole = chunks_of(reader_of(source), 1, SAMPLES)[0]
    unknown = (~chunk.stored["text"].known).nonzero()[:, 0].tolist()
    assert len(unknown) == 7 and chunk.captions == [whole.captions[row] for row in unknown]
    assert torch.equal(chunk.images, whole.images)


def test_ids_of_equal_rows_need_all_pictures_and_captions(source: Source, features: FeatureFile) -> None:
    fill(features, range(VIEWS * SAMPLES))
    files = {"image": features, "text": features}
    chunk = chunks_of(reader_of(source, features=files, identify=True), 1, SAMPLES)[0]
    assert torch.equal(chunk.ids, chunks_of(reader_of(source, identify=True), 1, SAMPLES)[0].ids)
    assert not len(chunk.images) and not chunk.captions


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_read_the_same_features(source: Source, features: FeatureFile, workers: int) -> None:
    fill(features, range(10, 30))
    reader = reader_of(source, features={"image": features})
    for here, there in zip(chunks_of(reader, 8), chunks_of(reader, 8, workers=workers), strict=True):
        assert torch.equal(here.images, there.images) and here.captions == there.captions
        assert all(map(torch.equal, here.stored["image"], there.stored["image"]))


def test_a_bad_sample_is_replaced_as_without_features(tmp_path: Path) -> None:
    members = []
    for number in range(SAMPLES):
        members.append((f"{number}.png", picture(number) if number != 3 else b"\x89PNG broken"))
        members.append((f"{number}.txt", f"thing {number}".encode()))
    write_tar(tmp_path / "spoilt" / "x.tar", members)
    source = open_shards(str(tmp_path / "spoilt"), val=0).train
    file = open_features(tmp_path / "image-a1", VIEWS * SAMPLES, WIDTH, ABOUT)
    fill(file, range(0, 3))
    fill(file, range(4, SAMPLES + 3))
    plain, chunks = (chunks_of(reader_of(source, **more), 4, SAMPLES) for more in ({}, {"features": {"image": file}}))
    for chunk, whole in zip(chunks, plain, strict=True):
        assert chunk.skipped == whole.skipped and len(chunk.skipped) == 1
        assert torch.equal(chunk.samples, whole.samples) and chunk.captions == whole.captions
        assert torch.equal(chunk.images, whole.images[~chunk.stored["image"].known])


def test_a_sample_that_changed_after_its_features_were_stored_is_an_error(source: Source, tmp_path: Path) -> None:
    file = open_features(tmp_path / "image-a1", VIEWS * SAMPLES, WIDTH, ABOUT)
    fill(file, range(VIEWS * SAMPLES))

    class Changed(Subset):
        def read_captions(self, sample: int) -> list[str]:
            raise BadSample("its caption is empty")

    changed = Changed(source, np.arange(SAMPLES))
    with pytest.raises(DataError, match="has changed since its features were stored in .*image-a1: its caption is"):
        chunks_of(reader_of(changed, features={"image": file}), 1)


def test_captions_are_read_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "captions.txt").write_text("a.png\tone\na.png\ttwo\n")  # there is no such picture
    assert captions_of(Folder(tmp_path), 0) == ["one", "two"]
    parts = Chain([source, Dummy(5, 16, 0)])
    for sample in (0, SAMPLES - 1, SAMPLES, SAMPLES + 4):
        assert captions_of(parts, sample) == parts.read(sample).captions
    held = Subset(parts, np.array([1, 28]), without=True)
    assert [captions_of(held, sample) for sample in (0, 1, 28)] == [held.read(s).captions for s in (0, 1, 28)]

    class Own:
        def read(self, sample: int) -> Sample:
            return Sample("a", b"", ["mine"])

    assert captions_of(Own(), 0) == ["mine"]


def test_features_are_kept_from_process_to_process(features: FeatureFile) -> None:
    assert features.read(3) is None and features.count() == 0
    features.write(np.array([3, 5]), np.concatenate([feature(3), feature(5)]))
    again = open_features(features.path, features.rows, features.width, ABOUT)
    assert (again.read(5) == feature(5)[0]).all() and again.read(4) is None and again.count() == 2
    copy = pickle.loads(pickle.dumps(features))
    assert (copy.read(3) == feature(3)[0]).all()
    assert features.path.stat().st_size == features.size


@pytest.mark.parametrize("row", [0, 2])
def test_a_row_that_was_written_in_part_is_missing(features: FeatureFile, row: int) -> None:
    fill(features, range(4))
    features.table[row, 3:] = 0
    assert features.read(row) is None and features.read(1) is not None
    fill(features, range(row, row + 1))
    assert (features.read(row) == feature(row)[0]).all()


def test_processes_that_race_create_one_file(tmp_path: Path) -> None:
    with ThreadPool(8) as pool:
        open_it = partial(open_features, tmp_path / "image-a1", 1000, WIDTH, ABOUT)
        files = pool.map(lambda _: open_it(), range(8))
    files[0].write(np.array([7]), feature(7))
    assert all((file.read(7) == feature(7)[0]).all() for file in files)
    assert {path.name for path in tmp_path.iterdir()} == {"image-a1", "lock"}


def test_a_file_that_is_cut_is_an_error(features: FeatureFile) -> None:
    os.truncate(features.path, features.size - 100)
    message = (
        f"{features.path} is damaged: it has {features.size - 100:,} bytes instead of {features.size:,}; delete it"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        open_features(features.path, features.rows, features.width, ABOUT)


@pytest.mark.parametrize("about", [{"tower": "image", "key": "b2"}, {"tower": "text", "key": "a1"}])
def test_a_file_of_other_features_is_an_error(features: FeatureFile, about: dict) -> None:
    message = f"{features.path} is damaged, or holds features of other weights or data; delete it"
    with pytest.raises(UserError, match=re.escape(message)):
        open_features(features.path, features.rows, features.width, about)


def test_a_full_disk_is_an_error_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError) as raised:
        open_features(tmp_path / "image-a1", 10**7, 768, ABOUT)
    start, end = f"feature_cache={tmp_path}: the features of frozen towers need 15.40 GB, and ", "feature_cache=null"
    assert str(raised.value).startswith(start) and end in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_space_is_allocated_when_the_file_is_created(features: FeatureFile) -> None:
    assert features.path.stat().st_blocks * 512 >= features.size


def test_a_directory_that_is_not_writable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="^feature_cache=.*taken cannot be used: .*feature_cache=null to compute"):
        open_features(tmp_path / "taken" / "image-a1", 10, WIDTH, ABOUT)
