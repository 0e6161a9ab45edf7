import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from clipx.data.plan import MixPlan, Plan, permutation, shares


@pytest.mark.parametrize("sizes", [[7, 1, 12, 5], [5], [100, 3], [1] * 30])
@pytest.mark.parametrize("window", [4, 25, 1000])
def test_every_sample_occurs_exactly_once_in_every_epoch(sizes: list[int], window: int) -> None:
    plan, total = Plan(sizes, seed=3, window=window), sum(sizes)
    for epoch in range(3):
        places = [plan[position] for position in range(epoch * total, (epoch + 1) * total)]
        assert sorted(place.sample for place in places) == list(range(total))
        assert {place.epoch for place in places} == {epoch}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = Plan([50, 50], seed, window=1000)
        return [plan[position].sample for position in range(100 * epoch, 100 * epoch + 100)]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4 and tuple(range(100)) not in map(tuple, orders)


def test_a_position_needs_nothing_but_itself() -> None:
    plan = Plan([30, 70], seed=1, window=16)
    expected = [plan[position] for position in range(300)]
    shuffled = np.random.default_rng(0).permutation(300)
    fresh = Plan([30, 70], seed=1, window=16)
    assert [fresh[int(p)] for p in shuffled] == [expected[p] for p in shuffled]
    assert [pickle.loads(pickle.dumps(plan))[position] for position in range(20)] == expected[:20]


def test_a_window_draws_on_few_shards() -> None:
    plan = Plan([10] * 100, seed=0, window=50)
    for start in range(0, 1000, 50):
        assert len({plan[position].sample // 10 for position in range(start, start + 50)}) == 5


def test_the_stream_is_the_same_today_as_when_it_was_written() -> None:
    assert permutation(10, 0, "window", 0, 0).tolist() == [6, 0, 1, 5, 2, 4, 8, 9, 3, 7]
    plan = Plan([5, 3, 9], seed=42, window=8)
    order = [plan[position].sample for position in range(17)]
    assert order == [9, 12, 10, 13, 15, 8, 11, 14, 4, 2, 16, 1, 6, 5, 0, 3, 7]


def test_substitutes_come_from_the_same_window_and_differ() -> None:
    plan = Plan([1000], seed=0, window=100)
    window = {plan[position].sample for position in range(200, 300)}
    substitutes = [plan.substitute(250, attempt).sample for attempt in range(1, 65)]
    assert set(substitutes) <= window and len(set(substitutes)) > 40
    assert substitutes == [plan.substitute(250, attempt).sample for attempt in range(1, 65)]


def test_windows_list_what_will_be_read_and_from_which_position() -> None:
    plan = Plan([10] * 100, seed=0, window=50)
    windows = list(itertools.islice(plan.windows(1230), 40))
    assert [window.start for window in windows[:3]] == [1200, 1250, 1300]
    for window in windows:
        read = {plan[position].sample // 10 for position in range(window.start, window.start + 50)}
        assert read == set(window.shards)
    assert list(Plan([3, 0, 4], 0, 5).windows(0).__next__().shards).count(1) == 0


WEIGHTS = [1, 2, 0.3]
SIZES = [[50, 30], [200], [7, 6]]


def test_a_mix_has_exact_proportions_in_every_block_and_each_source_once_an_epoch() -> None:
    plan = MixPlan(SIZES, WEIGHTS, seed=4, window=64)
    places = [plan[position] for position in range(3000)]
    assert plan.shares == [303, 606, 91]
    for start in range(0, 3000, 1000):
        counts = Counter(place.source for place in places[start : start + 1000])
        assert [counts[source] for source in range(3)] == plan.shares
    for source, first, size in ((0, 0, 80), (1, 80, 200), (2, 280, 13)):
        positions = [place for place in places if place.source == source]
        for epoch in range(len(positions) // size):
            part = positions[epoch * size : (epoch + 1) * size]
            assert {place.epoch for place in part} == {epoch}
            assert sorted(place.sample for place in part) == list(range(first, first + size))


def test_a_position_of_a_mix_needs_nothing_but_itself() -> None:
    plan = MixPlan(SIZES, WEIGHTS, seed=4, window=64)
    copy = pickle.loads(pickle.dumps(plan))
    for position in (2999, 17, 1000, 999):
        assert copy[position] == plan[position]
        assert copy.substitute(position, 3).source == plan[position].source
    assert MixPlan(SIZES, WEIGHTS, seed=5, window=64)[17] != plan[17]


def test_the_windows_of_a_mix_cover_what_it_reads() -> None:
    plan = MixPlan(SIZES, WEIGHTS, seed=4, window=64)
    owner = np.repeat(np.arange(5), np.concatenate(SIZES))
    for begin in (0, 777):
        announced: set[int] = set()
        windows = plan.windows(begin)
        upcoming = next(windows)
        for position in range(begin, begin + 1500):
            while upcoming.start <= position:
                announced |= set(upcoming.shards)
                upcoming = next(windows)
            assert int(owner[plan[position].sample]) in announced


def test_shares_are_exact_and_never_nothing() -> None:
    assert shares([1, 1, 1]) == [334, 333, 333] and shares([5]) == [1000]
    with pytest.raises(ValueError, match="at least a thousandth"):
        shares([1, 10_000])
