import math

import pytest

from clipx.duration import Every, parse
from clipx.sched import warmup_cosine


def test_warm_up_is_linear_and_the_rest_is_half_a_cosine() -> None:
    multiplier = warmup_cosine(1000, warmup=100, warmup_cap=0.5)
    assert multiplier(0) == pytest.approx(1 / 100)
    assert multiplier(99) == multiplier(100) == 1
    assert multiplier(550) == pytest.approx(0.5)
    assert multiplier(999) == pytest.approx(0.5 * (1 + math.cos(math.pi * 899 / 900)))


def test_a_warm_up_takes_no_more_than_its_share_of_a_short_run() -> None:
    multiplier = warmup_cosine(50, warmup=2000, warmup_cap=0.1)
    assert multiplier(4) == 1 and multiplier(3) < 1


def test_a_run_of_one_step_has_a_learning_rate() -> None:
    assert warmup_cosine(1)(0) == 1


@pytest.mark.parametrize(("duration", "steps"), [(500, 500), ("500", 500), ("2ep", 50), ("10%", 100), ("0.5ep", 12)])
def test_durations_in_steps_epochs_and_shares(duration: str | int, steps: int) -> None:
    every = Every(duration, steps=1000, epoch=25)
    assert [step for step in range(1, 3 * steps) if every.due(step)] == [steps, 2 * steps]
    assert every.over(steps) and every.over(steps + 1) and not every.over(steps - 1)


def test_minutes_go_by_the_clock() -> None:
    every = Every("15min", steps=10, epoch=1)
    assert not every.passed() and not every.due(1)
    every.start -= 15 * 60
    assert every.passed() and not every.passed() and not every.over(1)


def test_never_is_never() -> None:
    every = Every(None, steps=10, epoch=1)
    assert not any(every.due(step) or every.over(step) or every.passed() for step in range(1, 100))


@pytest.mark.parametrize("wrong", ["3parsecs", 0, "0ep", -5, "1.5", "ep", ""])
def test_what_is_no_duration_is_refused(wrong: str | int) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse(wrong)
