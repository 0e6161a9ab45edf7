import math

import pytest

from clipx.config.validate import ConfigError, check_call
from clipx.duration import Every, parse
from clipx.errors import UserError
from clipx.sched import constant, warmup_constant_cooldown, warmup_cosine, warmup_linear


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


def test_a_floor_is_where_the_decay_ends() -> None:
    multiplier, plain = (warmup_cosine(1000, 100, 0.5, floor) for floor in (0.1, 0))
    assert multiplier(100) == 1 and multiplier(550) == pytest.approx(0.55)
    assert all(multiplier(step) == pytest.approx(0.1 + 0.9 * plain(step)) for step in range(100, 1000))


def test_the_linear_schedule_is_a_line_after_the_warm_up() -> None:
    multiplier = warmup_linear(1000, warmup=100, floor=0.2)
    assert multiplier(0) == pytest.approx(1 / 100) and multiplier(100) == 1
    assert multiplier(550) == pytest.approx(0.6) and multiplier(1000) == pytest.approx(0.2)


def test_the_constant_schedule_has_no_warm_up_unless_it_is_set() -> None:
    assert [constant(50)(step) for step in (0, 20, 49)] == [1, 1, 1]
    assert [constant(50, warmup=4)(step) for step in (0, 3, 49)] == [0.25, 1, 1]


@pytest.mark.parametrize(("cooldown", "start"), [("20%", 800), (100, 900), ("100", 900)])
def test_a_cooldown_takes_the_last_steps(cooldown: str | int, start: int) -> None:
    falls = {shape: warmup_constant_cooldown(1000, 100, 0.5, cooldown, shape) for shape in ("sqrt", "linear")}
    middle = (start + 1000) // 2
    for fall in falls.values():
        assert fall(0) == pytest.approx(1 / 100) and all(fall(step) == 1 for step in range(99, start + 1))
        assert 0 < fall(999) < fall(start + 1) < 1
    assert falls["linear"](middle) == pytest.approx(0.5) and falls["sqrt"](middle) == pytest.approx(1 - math.sqrt(0.5))
    assert warmup_constant_cooldown(1000, 100, 0.5, cooldown, floor=0.1)(1000) == pytest.approx(0.1)


def test_a_cooldown_that_begins_in_the_warm_up_or_has_another_unit_is_refused() -> None:
    with pytest.raises(
        UserError, match="^sched.cooldown=700 is too long: a run of 1,000 steps with a warm-up of 400 has "
    ):
        warmup_constant_cooldown(1000, warmup=400, warmup_cap=1, cooldown=700)
    with pytest.raises(
        ConfigError, match=r"^sched.cooldown='2ep': should be steps \(500\) or a share of the run \(20%\)$"
    ):
        check_call(warmup_constant_cooldown, {"cooldown": "2ep"}, "sched.", partial=True)


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
