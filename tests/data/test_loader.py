import itertools
import pickle
import subprocess
from collections.abc import Callable
from itertools import zip_longest
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from conftest import picture, write_tar
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

import clipx
from clipx.data import loader
from clipx.data.draw_captions import CaptionDraw
from clipx.data.images import TrainCrop, decode
from clipx.data.loader import group_steps, load_chunks, split_range, train_ranges
from clipx.data.plan import Plan
from clipx.data.readers import Chunk, EvalReader, TrainReader
from clipx.data.shards import open_shards
from clipx.data.tar.headers import DataError
from clipx.models.packed import unpad
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")

TOKENIZER = SimpleTokenizer()


def reader_of(root: Path, seed: int = 0, window: int = 64) -> TrainReader:
    source = open_shards(str(root), val=0).train
    return TrainReader(
        source, Plan(source.sizes, seed, window), TrainCrop(Preprocessing(16), (0.5, 1.0), "fast"), TOKENIZER
    )


def batches(
    reader: TrainReader, count: int, batch: int, workers: int = 0, start: int = 0, **shared: int
) -> list[Chunk]:
    return list(itertools.islice(load_chunks(reader, train_ranges(start, batch, **shared), workers, pin=False), count))


def same(a: Chunk, b: Chunk) -> bool:
    pairs = zip_longest(tree_leaves(vars(a)), tree_leaves(vars(b)))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards(9, 4, 14)


def test_the_batches_are_the_same_with_0_1_2_and_4_workers(shards: Path) -> None:
    reader = reader_of(shards)
    expected = batches(reader, 8, 8)
    for workers in (1, 2, 4):
        actual = batches(reader, 8, 8, workers)
        assert all(same(a, b) for a, b in zip(expected, actual, strict=True))
    assert len({chunk.images.sum().item() for chunk in expected}) > 1


def test_an_epoch_brings_every_sample_once_across_the_ends_of_batches(shards: Path) -> None:
    chunks = batches(reader_of(shards), 27, 8)  # 27 batches of 8 are 8 epochs of 27 samples
    ids = torch.cat([chunk.samples for chunk in chunks]).view(8, 27)
    assert all(sorted(epoch.tolist()) == list(range(27)) for epoch in ids)


def test_the_loader_resumes_from_a_position_alone(shards: Path) -> None:
    reader = reader_of(shards)
    uninterrupted = batches(reader, 6, 5)
    assert all(same(a, b) for a, b in zip(uninterrupted[3:], batches(reader, 3, 5, start=15), strict=True))


def test_ranks_share_a_global_batch(shards: Path) -> None:
    reader = reader_of(shards)
    expected = batches(reader, 3, 8)
    halves = [batches(reader, 3, 8, rank=rank, world=2) for rank in (0, 1)]
    for step, chunk in enumerate(expected):
        assert torch.equal(chunk.images, torch.cat([part[step].images for part in halves]))
        assert halves[1][step].position == 8 * step + 4


@pytest.mark.parametrize("sizes", [(5,), (2, 1, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("workers", [0, 4])
def test_few_samples_and_fewer_shards_than_workers_are_no_special_case(
    make_shards: Callable[..., Path], sizes: tuple[int, ...], workers: int
) -> None:
    total = sum(sizes)
    chunks = batches(reader_of(make_shards(*sizes)), total, 4 if total > 4 else 2, workers)
    assert sorted(torch.cat([chunk.samples for chunk in chunks]).tolist()[:total]) == list(range(total))


def test_captions_and_crops_change_from_epoch_to_epoch_and_with_the_seed(shards: Path) -> None:
    first, second = (batches(reader_of(shards, seed), 40, 27) for seed in (0, 1))

    def of_sample(chunks: list[Chunk], number: int) -> tuple[set[str], int]:
        rows = [(chunk, (chunk.samples == number).nonzero()[0, 0]) for chunk in chunks]
        crops = {chunk.images[row].numpy().tobytes() for chunk, row in rows}
        return {chunk.captions[row] for chunk, row in rows}, len(crops)

    captions, crops = of_sample(first, 11)
    assert captions == {"thing number 11", "the 11th thing of all"} and crops > 20
    assert [c.captions for c in first] != [c.captions for c in second]


def test_the_captions_of_a_chunk_are_packed(shards: Path) -> None:
    chunk = batches(reader_of(shards), 1, 16)[0]
    assert all(map(torch.equal, chunk.tokens, unpad(TOKENIZER(chunk.captions))))
    assert (chunk.tokens.ids[chunk.tokens.lengths.cumsum(0) - 1] == 49407).all() and len(chunk.tokens.lengths) == 16


def test_a_large_batch_comes_in_chunks_of_256() -> None:
    assert [len(piece) for piece in itertools.islice(train_ranges(0, 600), 6)] == [256, 256, 88] * 2
    assert list(split_range(range(0))) == []


def test_steps_gather_chunks(shards: Path) -> None:
    chunks = iter(batches(reader_of(shards), 4, 8))
    assert [[len(chunk) for chunk in step] for step in itertools.islice(group_steps(chunks, 16), 2)] == [[8, 8]] * 2


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """Forty samples: 3 does not decode, 8 has no caption, 20 has no picture."""
    members = []
    for number in range(40):
        members += [] if number == 20 else [(f"{number}.png", picture(number) if number != 3 else b"\x89PNG broken")]
        members += [] if number == 8 else [(f"{number}.txt", f"thing {number}".encode())]
    write_tar(tmp_path / "spoilt" / "x.tar", members)
    return tmp_path / "spoilt"


def test_a_bad_sample_is_replaced_and_reported(spoilt: Path) -> None:
    chunks = batches(reader_of(spoilt), 10, 4)
    assert all(len(chunk) == 4 for chunk in chunks)
    records = [record for chunk in chunks for record in chunk.skipped]
    assert {record.place for record in records} == {"x.tar/3", "x.tar/8", "x.tar/20"}
    reasons = {record.place: record.reason for record in records}
    assert "does not decode" in reasons["x.tar/3"] and "no caption" in reasons["x.tar/8"]
    assert "no picture" in reasons["x.tar/20"]
    assert not {3, 8, 20} & set(torch.cat([chunk.samples for chunk in chunks]).tolist())
    assert all(same(a, b) for a, b in zip(chunks, batches(reader_of(spoilt), 10, 4, workers=2), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples_ends_with_one_line(tmp_path: Path, workers: int) -> None:
    write_tar(tmp_path / "x.tar", [(f"{number}.png", b"broken") for number in range(8)])
    with pytest.raises(DataError, match="^64 samples in a row are bad, the last one is x.tar/.: ") as raised:
        batches(reader_of(tmp_path), 1, 4, workers)
    assert "\n" not in str(raised.value)


def test_evaluation_reads_all_captions_of_all_pictures_once(shards: Path, spoilt: Path) -> None:
    source = open_shards(str(shards), val=0).train
    chunks = list(load_chunks(EvalReader(source, Preprocessing(16), TOKENIZER), split_range(range(27)), 2, pin=False))
    assert sum(map(len, chunks)) == 27 and chunks[0].captions[:2] == ["thing number 0", "the 0th thing of all"]
    assert chunks[0].owners[:4].tolist() == [0, 0, 1, 1]
    bad = open_shards(str(spoilt), val=0).train
    chunk = next(load_chunks(EvalReader(bad, Preprocessing(16), TOKENIZER), split_range(range(40)), 0, pin=False))
    assert len(chunk) == 37 and len(chunk.skipped) == 3 and chunk.owners.tolist() == list(range(37))


def test_the_global_random_state_is_left_alone(shards: Path) -> None:
    before = torch.get_rng_state()
    batches(reader_of(shards), 2, 4, workers=1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_first_caption_always_where_asked(shards: Path) -> None:
    reader = reader_of(shards)
    reader.captions = CaptionDraw("first")
    assert all(caption.startswith("thing number") for chunk in batches(reader, 8, 27) for caption in chunk.captions)


def test_chunks_carry_the_ids_of_equal_rows(tmp_path: Path) -> None:
    rows = [(1, "a cat"), (2, "a dog"), (1, "a pet"), (3, "a cat")]
    write_tar(
        tmp_path / "x.tar",
        [
            (f"{number}.{kind}", data)
            for number, (shade, caption) in enumerate(rows)
            for kind, data in (("png", picture(shade)), ("txt", caption.encode()))
        ],
    )
    reader = reader_of(tmp_path)
    assert batches(reader, 1, 4)[0].ids is None
    reader.identify = True
    chunk = batches(reader, 1, 4)[0]
    ids = chunk.ids[chunk.samples.argsort()]
    alike = (ids[:, None] == ids).any(dim=-1)
    assert alike.tolist() == [
        [True, False, True, True],
        [False, True, False, False],
        [True, False, True, False],
        [True, False, False, True],
    ]


def test_a_worker_ends_only_when_its_run_says_so(shards: Path) -> None:
    chunks = load_chunks(reader_of(shards), train_ranges(0, 5), 1, pin=False)
    next(chunks)
    (worker,) = active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # a scheduler signals every process
    assert len(list(itertools.islice(chunks, 20))) == 20 and worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


class Transformed(Dataset):
    """A user's dataset: pictures through the transform, captions through the tokenizer."""

    def __init__(self):
        self.transform, self.tokenizer = clipx.get_image_transform(16), clipx.SimpleTokenizer()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(decode(picture(number))), self.tokenizer(f"thing {number}")[0]


def test_the_public_api_works_in_workers_that_are_spawned() -> None:
    data = Transformed()
    for step, (image, tokens) in enumerate(DataLoader(data, None, num_workers=1, multiprocessing_context="spawn")):
        assert torch.equal(image, data[step][0]) and torch.equal(tokens, data[step][1])
    model = clipx.CLIP(ImageEncoder(16, 16, 64, 1, 1, 32), TextEncoder(width=64, depth=1, heads=1, embed=32))
    for item in (model, *(getattr(clipx, name) for name in clipx.__all__)):
        pickle.loads(pickle.dumps(item))


@pytest.mark.long
def test_the_batches_are_the_same_from_workers_that_are_spawned(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(reader_of(shards), 2, 4)
    monkeypatch.setattr(loader, "get_all_start_methods", lambda: ["spawn"])
    assert all(same(a, b) for a, b in zip(expected, batches(reader_of(shards), 2, 4, workers=1), strict=True))
