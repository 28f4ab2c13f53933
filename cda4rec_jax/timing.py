"""The one method by which things are timed against each other, for kernels and commands alike.

It stands below everything, on the standard library and NumPy alone, so that the benchmark of a kernel and the commands ``cda4rec bench``
measure in the same way. A round lets the two sides of every comparison take turns on rotating inputs; the ratio of a comparison is the
median of the rounds' ratios; a null, one contestant against itself, tells whether the machine was quiet enough to believe any of it.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cda4rec_jax.errors import UserError

LEAST_ROUNDS = 3  # below which a percentile says nothing


def usable_cores() -> int:
    """The processors that this process may use: as many threads as JAX computes with on a CPU, which peers are given too."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class TimingConfig:
    """How much to measure, and what to believe."""

    rounds: int = 15
    block_seconds: float = 0.2  # a turn repeats calls for about so long
    agreement: float = 0.1  # warm when two turns in a row differ by at most this share
    warm_up_turns: int = 10  # at most
    null_bounds: tuple[float, float] = (0.95, 1.05)
    attempts: int = 3  # of all rounds, until every null lies within its bounds

    def __post_init__(self):
        if self.rounds < LEAST_ROUNDS:
            raise UserError(f"a benchmark of {self.rounds} rounds says nothing: expected at least {LEAST_ROUNDS}")
        if not 0 < self.block_seconds < math.inf:
            raise UserError(f"a turn of {1e3 * self.block_seconds:g} ms measures nothing: expected a time above 0")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Something that is timed.

    ``call(number)`` does the work of that number, on the inputs of that number (so that inputs rotate), waits until every output is
    there, and returns how much work it was, in a unit that all contestants share (tokens, rows, calls). ``before`` is called before each
    turn, and not timed.
    """

    name: str
    call: Callable[[int], float]
    before: Callable[[], object] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and 10th to 90th percentile over the rounds."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value for each round."""
        p10, median, p90 = (float(value) for value in np.percentile(values, (10, 50, 90)))
        return cls(median=median, p10=p10, p90=p90)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How many times as fast as ``other`` the contestant ``name`` was, in turns that followed each other."""

    name: str
    other: str
    ratio: Spread


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What ``measure`` found."""

    rounds: int
    attempts: int  # of all rounds, of which the last one counts
    rates: Mapping[str, Spread]  # work in a second, by contestant
    warm: Mapping[str, bool]  # False where two turns never agreed before the rounds began
    comparisons: tuple[Comparison, ...]
    nulls: Mapping[str, float]  # ratio of a contestant to itself
    null_bounds: tuple[float, float]

    @property
    def accepted(self) -> bool:
        """True where every null lies within its bounds; otherwise the machine was too busy, and the ratios are loose."""
        return all(_within(null, self.null_bounds) for null in self.nulls.values())

    def ratio(self, name: str, other: str) -> Spread:
        """The comparison of these two. Raises KeyError where they were not compared."""
        found = [comparison.ratio for comparison in self.comparisons if (comparison.name, comparison.other) == (name, other)]
        if not found:
            raise KeyError((name, other))
        return found[0]


def measure(
    contestants: Sequence[Contestant],
    pairs: Sequence[tuple[str, str]],
    config: TimingConfig = TimingConfig(),
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measurement:
    """Warm up, then let the two sides of every pair take turns: A, B, A, C, A, A, A, B, ...

    Args:
        contestants: in the order in which they warm up.
        pairs: (faster, slower) by name; each first name also competes with itself, as the null.
        clock: seconds.
        progress: hears how many rounds are done of the attempt at hand.

    Raises:
        KeyError: a pair names no contestant.
    """
    turns = {contestant.name: _Turns(contestant, clock) for contestant in contestants}
    unknown = {name for pair in pairs for name in pair} - turns.keys()
    if unknown:
        raise KeyError(f"no contestant is called {sorted(unknown)}")
    warm = {name: turn.warm_up(config) for name, turn in turns.items()}
    schedule = [*pairs, *((name, name) for name in dict.fromkeys(first for first, _ in pairs))]
    attempt = 0
    while True:
        attempt += 1
        found = _rounds(turns, schedule, config.rounds, progress)
        measurement = _summary(found, schedule[len(pairs) :], config, attempt, warm)
        if measurement.accepted or attempt >= config.attempts:
            return measurement


class _Turns:
    """The turns of one contestant: as many calls as fill a turn, on inputs that go on rotating."""

    def __init__(self, contestant: Contestant, clock: Callable[[], float]):
        self._contestant, self._clock = contestant, clock
        self._calls, self._number = 1, 0

    def rate(self) -> float:
        """Work in a second, over one turn."""
        self._contestant.before()
        start = self._clock()
        work = sum(self._contestant.call(self._number + call) for call in range(self._calls))
        seconds = self._clock() - start
        self._number += self._calls
        return work / seconds

    def warm_up(self, config: TimingConfig) -> bool:
        """Take turns until two agree; True if they did."""
        self._contestant.before()
        self._contestant.call(self._number)
        start = self._clock()
        self._contestant.call(self._number + 1)
        self._calls = max(1, math.ceil(config.block_seconds / max(self._clock() - start, 1e-9)))
        self._number += 2
        rates = [self.rate()]
        for _ in range(config.warm_up_turns - 1):
            rates.append(self.rate())
            if abs(rates[-1] / rates[-2] - 1.0) <= config.agreement:
                return True
        return False


def _rounds(
    turns: Mapping[str, _Turns], schedule: Sequence[tuple[str, str]], rounds: int, progress: Callable[[int, int], None]
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    found: dict[tuple[str, str], list[tuple[float, float]]] = {pair: [] for pair in schedule}
    progress(0, rounds)
    for done in range(1, rounds + 1):
        for first, second in schedule:
            rate = turns[first].rate()
            found[first, second].append((rate, turns[second].rate()))
        progress(done, rounds)
    return found


def _summary(
    found: Mapping[tuple[str, str], list[tuple[float, float]]],
    nulls: Sequence[tuple[str, str]],
    config: TimingConfig,
    attempts: int,
    warm: Mapping[str, bool],
) -> Measurement:
    rates: dict[str, list[float]] = {}
    for pair, values in found.items():
        for name, column in zip(pair, zip(*values, strict=True), strict=True):
            rates.setdefault(name, []).extend(column)
    ratios = {pair: Spread.of([first / second for first, second in values]) for pair, values in found.items()}
    return Measurement(
        rounds=config.rounds,
        attempts=attempts,
        rates={name: Spread.of(values) for name, values in rates.items()},
        warm={name: warm[name] for name in rates},
        comparisons=tuple(Comparison(name=a, other=b, ratio=ratio) for (a, b), ratio in ratios.items() if (a, b) not in nulls),
        nulls={pair[0]: ratios[pair].median for pair in nulls},
        null_bounds=config.null_bounds,
    )


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]
