"""Which captions of a picture are drawn, and which of their words."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import picture, write_tar
from torch.utils._pytree import tree_leaves

from clipx.data.draw_captions import CaptionDraw
from clipx.data.images import TrainCrop
from clipx.data.loader import load_chunks, train_ranges
from clipx.data.mix import Chain
from clipx.data.plan import MixPlan, Plan, digest
from clipx.data.readers import Chunk, TrainReader, signed_hash
from clipx.data.sample import Data, Source
from clipx.data.shards import open_shards
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer
from clipx.training.batch import split_micro_batches

VIEWS = range(6000)
CAPTIONS = ["a red cat", "the second of them", "a third one with more words", "four"]


def numbers(draw: CaptionDraw, captions: int = 4) -> Counter[tuple[int | None, ...]]:
    return Counter(tuple(one.number for one in draw(CAPTIONS[:captions], 0, view)) for view in VIEWS)


def test_random_is_what_earlier_versions_drew() -> None:
    for view in VIEWS[:50]:
        (drawn,) = CaptionDraw()(CAPTIONS, 3, "caption", 0, view, 7)
        assert drawn.text == drawn.whole == CAPTIONS[digest(3, "caption", 0, view, 7) % 4]


@pytest.mark.parametrize(
    ("weights", "captions", "shares"),
    [([2, 1, 1], 3, [0.5, 0.25, 0.25]), ([3, 1], 4, [0.5, 1 / 6, 1 / 6, 1 / 6]), ([2, 1, 1], 2, [2 / 3, 1 / 3])],
)
def test_weighted_captions_come_in_proportion(weights: list[float], captions: int, shares: list[float]) -> None:
    found = numbers(CaptionDraw("weighted", weights), captions)
    assert [found[number,] / len(VIEWS) for number in range(captions)] == pytest.approx(shares, abs=0.025)


@pytest.mark.parametrize(("choice", "weights"), [("random", None), ("weighted", [5, 1])])
def test_several_captions_are_distinct_and_all_pairs_come(choice: str, weights: list[float] | None) -> None:
    found = numbers(CaptionDraw(choice, weights, count=2))
    assert set(found) == set(itertools.permutations(range(4), 2))
    if choice == "random":
        assert max(found.values()) < 1.4 * min(found.values())
    else:
        assert sum(count for pair, count in found.items() if pair[0] == 0) / len(VIEWS) == pytest.approx(
            5 / 8, abs=0.03
        )


def test_too_few_captions_are_repeated_in_turn() -> None:
    assert numbers(CaptionDraw("first", count=5), 2) == {(0, 1, 0, 1, 0): len(VIEWS)}
    assert set(numbers(CaptionDraw(count=3), 2)) == {(0, 1, 0), (1, 0, 1)}


def test_joined_captions_are_all_there_in_every_order() -> None:
    drawn = [CaptionDraw("join")(CAPTIONS[:3], 0, view)[0] for view in VIEWS[:200]]
    assert {one.text for one in drawn} == {", ".join(order) for order in itertools.permutations(CAPTIONS[:3])}
    assert {one.whole for one in drawn} == {", ".join(CAPTIONS[:3])}
    assert CaptionDraw("join")(["alone"], 0)[0] == ("alone", "alone", 0)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.99])
def test_words_are_dropped_with_their_probability_and_never_all(probability: float) -> None:
    caption = "one two three four five six seven eight nine ten"
    draw = CaptionDraw(word_dropout=probability)
    drawn = [draw([caption], 0, view)[0] for view in VIEWS[:2000]]
    kept = [one.text.split() for one in drawn]
    assert all(words and words == [word for word in caption.split() if word in words] for words in kept)
    assert {one.whole for one in drawn} == {caption}
    assert all((one.number is None) == (one.text != caption) for one in drawn)
    expected = 10 * (1 - probability) + probability**10
    assert sum(map(len, kept)) / len(kept) == pytest.approx(expected, abs=0.1)
    assert len({words[0] for words in kept if len(words) == 1}) > 5 or probability < 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption": "weighted"}, "caption_weights=null with caption=weighted: give one for each caption"),
        ({"caption_weights": [2, 1]}, r"caption_weights=\[2,1\] with caption=random: .* add that, or leave them out"),
        ({"caption": "weighted", "caption_weights": []}, r"caption_weights=\[\]: expected numbers above 0"),
        ({"caption": "join", "captions_per_picture": 2}, "captions_per_picture=2 with caption=join"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(source: Source, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data(source, None, **options)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Pictures with one to three captions; one is bad."""
    members = []
    for number in range(20):
        file = picture(number, "png", (20, 20)) if number != 3 else b"\x89PNG broken"
        captions = "\n".join(f"thing {number} said in line {line}" for line in range(1 + number % 3))
        members += [(f"{number:02}.png", file), (f"{number:02}.txt", captions.encode())]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "dataset_type.txt").write_text("retrieval")
    return open_shards(str(write_tar(tmp_path / "shards" / "x.tar", members).parent), val=0).train


def reader_of(source: Source, draw: CaptionDraw, mixed: bool = False) -> TrainReader:
    plan = MixPlan([source.sizes] * 2, [1, 2], 0, 64) if mixed else Plan(source.sizes, 0, 64)
    train = Chain([source, source]) if mixed else source
    crop = TrainCrop(Preprocessing(16), (0.9, 1.0), "fast")
    return TrainReader(train, plan, crop, SimpleTokenizer(), draw, identify=True, augments=[None, None])


def chunks_of(reader: TrainReader, count: int, batch: int = 8, workers: int = 0, start: int = 0) -> list[Chunk]:
    ranges = train_ranges(start, batch, micro_batch_size=3)
    return list(itertools.islice(load_chunks(reader, ranges, workers, pin=False), count))


def same(one: Chunk, other: Chunk) -> bool:
    pairs = zip(tree_leaves(vars(one)), tree_leaves(vars(other)), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


DRAWS = [
    CaptionDraw(count=2),
    CaptionDraw("weighted", [2, 1], 0.3, count=3),
    CaptionDraw("join", word_dropout=0.2),
]


@pytest.mark.parametrize("draw", DRAWS, ids=["two", "weighted", "join"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_chunk_holds_all_captions_of_each_picture_in_order(source: Source, draw: CaptionDraw, mixed: bool) -> None:
    reader = reader_of(source, draw, mixed)
    for chunk in chunks_of(reader, 6):
        assert chunk.owners.tolist() == [row for row in range(len(chunk)) for _ in range(draw.count)]
        assert len(chunk.captions) == len(chunk.tokens.lengths) == len(chunk) * draw.count
        assert chunk.ids.shape == (len(chunk), 1 + draw.count)
        for row, sample in enumerate(chunk.samples.tolist()):
            whole = reader.source.read(sample)
            hashes = {signed_hash(caption) for caption in (*whole.captions, ", ".join(whole.captions))}
            assert chunk.ids[row, 0] == signed_hash(whole.picture) and set(chunk.ids[row, 1:].tolist()) <= hashes
            assert len(set(chunk.ids[row, 1:].tolist())) == min(draw.count, len(whole.captions))
            words = " ".join(whole.captions).replace(",", "").split()
            own = chunk.captions[row * draw.count :][: draw.count]
            assert all(word.strip(",") in words for caption in own for word in caption.split())


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("mixed", [False, True])
def test_workers_and_a_later_start_draw_the_same(source: Source, workers: int, mixed: bool) -> None:
    reader = reader_of(source, DRAWS[1], mixed)
    expected = chunks_of(reader, 9)
    assert all(map(same, expected, chunks_of(reader, 9, workers=workers)))
    assert all(map(same, expected[3:], chunks_of(reader, 6, start=8)))


def test_micro_batches_hold_the_captions_of_their_pictures(source: Source) -> None:
    chunks = chunks_of(reader_of(source, DRAWS[0]), 3)
    parts = split_micro_batches(chunks, 3)
    assert [(len(part), len(part.captions.order), len(part.ids)) for part in parts] == [(3, 6, 3), (3, 6, 3), (2, 4, 2)]
