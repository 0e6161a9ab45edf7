import pickle

import numpy as np
import pytest

from clipx.data.plan import Plan, permutation


@pytest.mark.parametrize("sizes", [[7, 1, 12, 5], [5], [100, 3], [1] * 30])
@pytest.mark.parametrize("window", [4, 25, 1000])
def test_every_sample_stands_exactly_once_in_every_epoch(sizes: list[int], window: int) -> None:
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
    straight = [plan[position] for position in range(300)]
    shuffled = np.random.default_rng(0).permutation(300)
    fresh = Plan([30, 70], seed=1, window=16)
    assert [fresh[int(p)] for p in shuffled] == [straight[p] for p in shuffled]
    assert [pickle.loads(pickle.dumps(plan))[position] for position in range(20)] == straight[:20]


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
    found = [plan.substitute(250, attempt).sample for attempt in range(1, 65)]
    assert set(found) <= window and len(set(found)) > 40
    assert found == [plan.substitute(250, attempt).sample for attempt in range(1, 65)]
