"""The arithmetic of the one method of timing, on a clock that tests turn."""

import dataclasses
from collections.abc import Callable

import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.timing import Contestant, Spread, TimingConfig, measure


class Clock:
    """Stands still unless somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, seconds: Callable[[int], float], work: float = 1.0) -> Contestant:
        """A contestant whose call of a number takes so many seconds."""

        def call(number: int) -> float:
            self.now += seconds(number)
            return work

        return Contestant(name=name, call=call)


ONE_CALL = TimingConfig(rounds=5, block_seconds=1e-6)


def test_the_ratio_is_that_of_work_in_a_second() -> None:
    clock = Clock()
    contestants = [clock.worker("fast", lambda number: 0.5, work=10.0), clock.worker("slow", lambda number: 2.0, work=8.0)]
    found = measure(contestants, [("fast", "slow")], ONE_CALL, clock=clock)
    assert found.ratio("fast", "slow") == Spread(median=5.0, p10=5.0, p90=5.0)  # 20 a second against 4
    assert found.rates["fast"].median == 20.0 and found.rates["slow"].median == 4.0
    assert found.nulls == {"fast": 1.0} and found.accepted and found.attempts == 1
    assert found.warm == {"fast": True, "slow": True}
    with pytest.raises(KeyError):
        found.ratio("slow", "fast")


def test_median_and_percentiles_are_over_the_ratios_of_rounds() -> None:
    clock = Clock()
    # Two calls size the turns and two warm up; in round r the slow one then takes 1 + r seconds.
    contestants = [clock.worker("fast", lambda number: 1.0), clock.worker("slow", lambda number: max(1.0, number - 3.0))]
    found = measure(contestants, [("fast", "slow")], ONE_CALL, clock=clock)
    ratio = found.ratio("fast", "slow")
    assert (ratio.median, ratio.p10, ratio.p90) == (3.0, pytest.approx(1.4), pytest.approx(4.6))


def test_the_two_sides_of_a_pair_take_turns_and_inputs_rotate() -> None:
    clock, order = Clock(), []

    def recorded(name: str) -> Contestant:
        def call(number: int) -> float:
            order.append((name, number))
            clock.now += 1.0
            return 1.0

        return Contestant(name=name, call=call)

    measure([recorded("a"), recorded("b"), recorded("c")], [("a", "b"), ("a", "c")], ONE_CALL, clock=clock)
    rounds = order[12:]  # four calls of each before
    assert [name for name, _ in rounds] == ["a", "b", "a", "c", "a", "a"] * 5
    for name in "abc":
        numbers = [number for one, number in order if one == name]
        assert numbers == list(range(len(numbers)))


def test_what_is_done_before_a_turn_is_not_timed() -> None:
    clock, turns = Clock(), []

    def before() -> None:
        turns.append(clock.now)
        clock.now += 100.0

    contestants = [
        dataclasses.replace(clock.worker("a", lambda number: 1.0), before=before),
        clock.worker("b", lambda number: 2.0),
    ]
    found = measure(contestants, [("a", "b")], ONE_CALL, clock=clock)
    assert found.ratio("a", "b").median == 2.0 and len(turns) == 1 + 2 + 3 * 5


def test_a_turn_repeats_calls_until_it_is_long_enough() -> None:
    clock, calls = Clock(), []
    config = TimingConfig(rounds=3, block_seconds=1.0)
    contestants = [clock.worker("a", lambda number: calls.append(number) or 0.25), clock.worker("b", lambda number: 4.0)]
    found = measure(contestants, [("a", "b")], config, clock=clock)
    assert len(calls) == 2 + 4 * (2 + 9), "4 calls a turn: 2 turns to warm up, 3 turns in each of 3 rounds"
    assert found.rates["a"].median == 4.0


def test_rounds_with_a_null_outside_of_the_bounds_are_repeated_and_then_accepted() -> None:
    clock = Clock()
    # The 4 calls before the rounds and 15 of a first attempt; of three turns in a round the last, which is the null's, is slow at first.
    contestants = [
        clock.worker("a", lambda number: 1.2 if 4 <= number < 19 and number % 3 == 0 else 1.0),
        clock.worker("b", lambda number: 2.0),
    ]
    found = measure(contestants, [("a", "b")], ONE_CALL, clock=clock)
    assert found.attempts == 2 and found.accepted and found.nulls == {"a": 1.0}


def test_a_null_that_stays_outside_is_said_after_the_last_attempt() -> None:
    clock = Clock()
    contestants = [
        clock.worker("a", lambda number: 1.2 if number >= 4 and number % 3 == 0 else 1.0),
        clock.worker("b", lambda number: 2.0),
    ]
    found = measure(contestants, [("a", "b")], ONE_CALL, clock=clock)
    assert found.attempts == ONE_CALL.attempts and not found.accepted
    assert found.nulls["a"] == pytest.approx(1.2)
    assert found.ratio("a", "b").median == 2.0


def test_what_never_gets_steady_is_named() -> None:
    clock = Clock()
    contestants = [clock.worker("a", lambda number: 1.0), clock.worker("b", lambda number: 2.0**-number)]
    found = measure(contestants, [("a", "b")], TimingConfig(rounds=3, block_seconds=1e-9), clock=clock)
    assert found.warm == {"a": True, "b": False}


def test_too_few_rounds_and_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="2 rounds says nothing: expected at least 3"):
        TimingConfig(rounds=2)
    for seconds in (0.0, float("nan")):
        with pytest.raises(UserError, match="measures nothing: expected a time above 0"):
            TimingConfig(block_seconds=seconds)
    with pytest.raises(KeyError, match="nobody"):
        measure([Clock().worker("a", lambda number: 1.0)], [("a", "nobody")], ONE_CALL)
