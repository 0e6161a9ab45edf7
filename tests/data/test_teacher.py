"""What workers make for a teacher: the crops and captions of the student, as the teacher takes them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture, write_tar
from test_features import chunks_of

from clipx.data.augment import Chain, Color, Flip
from clipx.data.draw_captions import CaptionDraw
from clipx.data.features import FeatureFile, open_features
from clipx.data.images import TrainCrop
from clipx.data.plan import Plan
from clipx.data.readers import TrainReader
from clipx.data.sample import Source
from clipx.data.shards import open_shards
from clipx.data.teacher import TeacherReader, most_captions
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer, Tokens

SAMPLES, VIEWS, WIDTH = 20, 2, 5
SMALL, LARGE = Preprocessing(16), Preprocessing(48, interpolation="bilinear")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """JPEG pictures with one to three captions; one is bad."""
    members = []
    for number in range(SAMPLES):
        file = picture(number, "jpeg", (400, 300)) if number != 3 else b"\xff\xd8 broken"
        captions = "\n".join(f"thing {number} {'again ' * line}" for line in range(1 + number % 3))
        members += [(f"{number:02}.jpg", file), (f"{number:02}.txt", captions.encode())]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "dataset_type.txt").write_text("retrieval")
    return open_shards(str(write_tar(tmp_path / "shards" / "x.tar", members).parent), val=0).train


def reader_of(
    source: Source,
    teacher: TeacherReader | None = None,
    preprocessing: Preprocessing = SMALL,
    context: int = 77,
) -> TrainReader:
    crop, plan = TrainCrop(preprocessing, (0.3, 1.0), "fast"), Plan(source.sizes, 0, 64)
    return TrainReader(source, plan, crop, SimpleTokenizer(context), views=VIEWS, teacher=teacher)


def test_a_teacher_sees_the_same_changes_of_a_crop(source: Source) -> None:
    readers = [reader_of(source, teacher_of()), reader_of(source, None, LARGE)]
    for reader in readers:
        reader.augments = [Chain(flip=Flip(), color=Color())]
    both, large = (chunks_of(reader, 4, SAMPLES) for reader in readers)
    assert all(torch.equal(one.teacher.images, other.images) for one, other in zip(both, large, strict=True))
    assert not torch.equal(both[0].images, chunks_of(reader_of(source), 1, SAMPLES)[0].images)


def teacher_of(files: Mapping[str, FeatureFile] | None = None) -> TeacherReader:
    return TeacherReader(TrainCrop(LARGE, (0.3, 1.0), "fast"), SimpleTokenizer(6), SAMPLES, files or {})


def tokens_of(tokens: Tokens) -> list[list[int]]:
    return [one.tolist() for one in tokens.ids.split(tokens.lengths.tolist())]


def files_of(tmp_path: Path) -> dict[str, FeatureFile]:
    rows = {"image": VIEWS * SAMPLES, "text": 2 * SAMPLES}  # third captions have no row
    return {name: open_features(tmp_path / f"teacher-{name}", rows[name], WIDTH, {"tower": name}) for name in rows}


def test_a_teacher_takes_what_a_student_with_its_inputs_would(source: Source) -> None:
    both = chunks_of(reader_of(source, teacher_of()), 5, SAMPLES)
    large = chunks_of(reader_of(source, None, LARGE, 6), 5, SAMPLES)
    small = chunks_of(reader_of(source), 5, SAMPLES)
    for chunk, like_teacher, like_student in zip(both, large, small, strict=True):
        assert torch.equal(chunk.teacher.images, like_teacher.images)
        assert tokens_of(chunk.teacher.tokens) == tokens_of(like_teacher.tokens)
        assert torch.equal(chunk.images, like_student.images) and chunk.captions == like_student.captions
        assert torch.equal(chunk.tokens.ids, like_student.tokens.ids) and chunk.skipped == like_student.skipped


def test_a_caption_has_the_same_row_whenever_it_is_drawn(source: Source) -> None:
    seen: dict[int, set[str]] = {}
    for chunk in chunks_of(reader_of(source, teacher_of()), 12, SAMPLES):
        for row, sample, caption in zip(
            chunk.teacher.rows["text"].tolist(), chunk.samples, chunk.captions, strict=True
        ):
            assert row % SAMPLES == sample
            seen.setdefault(row, set()).add(caption)
    assert all(len(captions) == 1 for captions in seen.values()) and len(seen) > SAMPLES + 10


def test_what_is_stored_is_neither_decoded_nor_tokenized(source: Source, tmp_path: Path) -> None:
    files, plain = files_of(tmp_path), chunks_of(reader_of(source, teacher_of()), 4, SAMPLES)
    for file in files.values():
        known = np.arange(0, file.rows, 2)
        file.write(known, np.repeat(known[:, None] + 1, WIDTH, 1).astype(np.float16))
    for chunk, whole in zip(chunks_of(reader_of(source, teacher_of(files)), 4, SAMPLES), plain, strict=True):
        for name in files:
            rows, stored = chunk.teacher.rows[name], chunk.teacher.stored[name]
            assert torch.equal(rows, whole.teacher.rows[name])
            assert torch.equal(stored.known, (rows % 2 == 0) & (rows < files[name].rows))
            assert torch.equal(stored.features[:, 0].long(), rows[stored.known] + 1)
        assert torch.equal(chunk.teacher.images, whole.teacher.images[~chunk.teacher.stored["image"].known])
        unknown = (~chunk.teacher.stored["text"].known).nonzero()[:, 0]
        all_tokens = tokens_of(whole.teacher.tokens)
        assert tokens_of(chunk.teacher.tokens) == [all_tokens[row] for row in unknown]
        assert torch.equal(chunk.images, whole.images)


def test_a_teacher_reads_several_captions_and_shortened_ones_without_a_row(source: Source) -> None:
    reader = reader_of(source, teacher_of())
    reader.captions = CaptionDraw(word_dropout=0.2, count=2)
    for chunk in chunks_of(reader, 4, SAMPLES):
        rows = chunk.teacher.rows["text"].unflatten(0, (-1, 2))
        assert len(rows) == len(chunk) and tokens_of(chunk.teacher.tokens) == tokens_of(
            SimpleTokenizer(6).flat(chunk.captions)
        )
        texts = zip(chunk.captions[::2], chunk.captions[1::2], strict=True)
        for sample, several, both in zip(chunk.samples.tolist(), rows.tolist(), texts, strict=True):
            captions = source.read(sample).captions
            for row, text in zip(several, both, strict=True):
                assert row == -1 - sample if row < 0 else captions[row // SAMPLES] == text
                assert row < 0 or row % SAMPLES == sample
        assert (rows < 0).any() and (rows >= 0).any()


def test_the_number_of_captions_is_that_of_the_samples(source: Source) -> None:
    assert most_captions(source) == 3


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_make_the_same(source: Source, tmp_path: Path, workers: int) -> None:
    reader = reader_of(source, teacher_of(files_of(tmp_path)))
    for here, there in zip(chunks_of(reader, 3), chunks_of(reader, 3, workers=workers), strict=True):
        assert torch.equal(here.teacher.images, there.teacher.images)
        assert all(map(torch.equal, here.teacher.tokens, there.teacher.tokens))
