"""A budget of cloud calls made into a planner: the price of a call that keeps it, and what a fresh cache is worth at that price.

Everything is estimated on validation events. What a cache of each level and age is worth is the mean over users (``QualityByAge``). What a
planner spends depends on the caches that its own choices leave, so the price is found on sequences of requests: each user's validation
event is asked for many times in a row, in situations drawn anew. The first requests, which find the cache that the sequence begins with,
do not count: who may call once a day would otherwise seem to keep a budget by never having had to call yet.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from cda4rec_jax.data.splits import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.conditions import cache_plans, can_be_stale, plan_ranks
from cda4rec_jax.evaluation.replay import ReplayRecords, Scheduler, play, record_sequence
from cda4rec_jax.evaluation.schedulers import Followed, Schedule, calibrated_price
from cda4rec_jax.pipeline.decisions import PlanningWorld
from cda4rec_jax.pipeline.system import with_planner
from cda4rec_jax.planner import Policy, plan_quality
from cda4rec_jax.planner.budgets import Budget, Limited
from cda4rec_jax.planner.scheduling import CACHE_LEVELS, DISCOUNT, OLDEST, CallScheduler, QualityByAge, freshness_values
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import TrainedSystem
from cda4rec_jax.runs.planner_runs import load_for_planner_run, write_planner_run

TARGET = f"{CallScheduler.__module__}:{CallScheduler.__name__}"
HORIZON = 1.0 / (1.0 - DISCOUNT)  # requests; quality is at most 1 in each, so that no call is worth a price above it
SEARCH_STEPS = 16
MAX_DRAWS = 20
COUNTED = ("calls", "hit_rate@10", "ndcg@10", "latency_ms", "exposure", "utility")
RANKS, PRICE = "ranks by age of the cache", "price of a call"  # the stages that a caller hears of

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ScheduleFitting:
    """On what a price is found.

    Raises:
        UserError: a number that is too small.
    """

    users: int = 2000  # at most so many
    sequences: int = 4000  # at least so many over all users, but at most MAX_DRAWS of each
    unseen: int = 10  # requests at the beginning of a sequence that do not count
    counted: int = 10  # requests that do
    seed: int = 0

    def __post_init__(self):
        least = {"users": 1, "sequences": 1, "unseen": 0, "counted": 1, "seed": 0}
        if bad := [f"{name}={getattr(self, name)}, at least {low}" for name, low in least.items() if getattr(self, name) < low]:
            raise UserError(f"fitting a schedule of calls was told {'; '.join(bad)} expected")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Simulated requests before validation events, and what is known of plans on them: any budget can be fitted to these."""

    policy: Policy
    world: PlanningWorld
    records: ReplayRecords
    means: QualityByAge
    max_cache_age: int
    unseen: int

    def priced(self, price: float) -> CallScheduler:
        """The planner that asks this price of a call."""
        return CallScheduler.of(self.policy, price, freshness_values(self.means, price))

    def timed(self, *, calls: bool) -> Schedule:
        """Always or never calling, by the plans that are best on average."""
        every = np.full((self.records.num_steps, self.records.num_rows), calls)
        return Schedule(calls=every, calling_plan=self.means.best(calls=True), other_plan=self.means.best(calls=False))

    def outcome(self, scheduler: Scheduler) -> dict[str, float]:
        """Means over the requests that count; ``calls`` is the share of them that call."""
        played = play(self.records, self.world, scheduler, self.max_cache_age)
        return {name: float(played.values[name][self.unseen :].mean(dtype=np.float64)) for name in COUNTED}


@dataclass(frozen=True, kw_only=True)
class CallSchedule:
    """A planner that keeps a budget of calls.

    Attributes:
        planner: to serve with.
        budget: of calls, per user and day.
        price: of a call, in units of quality.
        outcomes: means over the simulated requests by who schedules ("scheduled", "always", "never"), by quantity.
        num_users, num_requests: on how many they were taken.
    """

    planner: CallScheduler
    budget: Budget
    price: float
    outcomes: dict[str, dict[str, float]]
    num_users: int
    num_requests: int

    @property
    def calls_per_day(self) -> float:
        """What the scheduled planner spends."""
        return self.outcomes["scheduled"]["calls"] * self.budget.requests_per_day

    def to_json(self) -> dict[str, Any]:
        """All but the weights, as plain values."""
        told = {name: value for name, value in vars(self).items() if name not in ("planner", "budget")}
        return {"budget": asdict(self.budget), **told, "calls_per_day": self.calls_per_day}

    def lines(self) -> list[str]:
        """What was found, in words."""
        per_day, lines = self.budget.requests_per_day, []
        for name, label in (("scheduled", "scheduled"), ("always", "always calling"), ("never", "never calling")):
            found = self.outcomes[name]
            lines.append(
                f"{label}: {per_day * found['calls']:.2f} calls ({found['calls']:.1%} of the requests), hit_rate@10 "
                f"{found['hit_rate@10']:.4f}, ndcg@10 {found['ndcg@10']:.4f}"
            )
        limit = "" if self.price else ", which this planner keeps without a price"
        return [
            f"{self.budget.name} ({self.budget.limited.unit}, of {per_day:g} requests){limit}: a call costs {self.price:.4f} of quality",
            f"expected a user and day, by {self.num_requests:,} simulated requests before validation events of {self.num_users:,} users:",
            *lines,
        ]


def validation_sequences(
    trained: TrainedSystem,
    world: PlanningWorld,
    config: ScheduleFitting | None = None,
    progress: Report = lambda stage, done, total: None,
) -> Sequences:
    """Simulated requests before the validation events of some users whose past is long enough for a cache.

    Args:
        trained: a system with ``Policy``, or with a ``CallScheduler``, whose policy is taken.
        world: costs, to tell what requests take.
        config: None takes the defaults.
        progress: hears (stage, done, total).

    Raises:
        UserError: another planner; no user with two events before the validation event; scores that are NaN.
    """
    config, policy = config or ScheduleFitting(), _policy(trained)
    every = trained.corpus.target_positions(Split.VALIDATION)
    with_cache = np.flatnonzero(can_be_stale(every, 1))
    if not len(with_cache):
        raise UserError(
            f"no user of {trained.run.path} has two events before the validation event, so that no device would have a cache: a schedule "
            "of calls needs longer histories"
        )
    users = np.sort(np.random.default_rng([config.seed, 47]).permutation(with_cache)[: config.users])
    positions, steps = every[users], config.unseen + config.counted
    ranks = _ranks_by_cache(trained, users, positions, partial(progress, RANKS))
    oldest = ranks.shape[1]

    def quality_under(level: int, age: int) -> np.ndarray:
        return np.asarray(plan_quality(ranks[level - 1, age - 1, can_be_stale(positions, age)]))

    means = QualityByAge.estimated(quality_under, oldest, trained.config.space)
    older = np.pad(ranks, ((0, 0), (0, max(0, steps - oldest)), (0, 0), (0, 0)), mode="edge")
    draws = min(MAX_DRAWS, -(-config.sequences // len(users)))
    records = record_sequence(trained, world, users, positions, older, steps=steps, draws=draws)
    return Sequences(
        policy=policy,
        world=world,
        records=records,
        means=means,
        max_cache_age=trained.config.max_cache_age,
        unseen=config.unseen,
    )


def _policy(trained: TrainedSystem) -> Policy:
    """The quality model of a run's planner."""
    planner = trained.system.policy
    policy = planner.policy if type(planner) is CallScheduler else planner
    if type(policy) is not Policy:
        raise UserError(
            f"{trained.run.path} has a planner of its own, {type(planner).__name__}, and a budget of calls is fitted to the quality that "
            "Policy has learned: train that first, with cda4rec train-planner --planner cda4rec_jax.planner:Policy"
        )
    return policy


def _ranks_by_cache(
    trained: TrainedSystem, users: Int[np.ndarray, "n"], positions: Int[np.ndarray, "n"], progress: Callable[[int, int], None]
) -> Int[np.ndarray, "levels ages n p"]:
    """Rank under every plan for every cache, of ages 1 to ``OLDEST``. Where a past is too short for an age, that of the oldest there is."""
    ages, plans = min(OLDEST, trained.config.max_cache_age), cache_plans(trained.config.space)
    every = plan_ranks(trained, users, positions, age_events=1)
    found = np.broadcast_to(every, (len(CACHE_LEVELS), ages, *every.shape)).copy()
    for place, level in enumerate(CACHE_LEVELS):
        for age in range(1, ages + 1):
            rows = np.flatnonzero(can_be_stale(positions, age))
            found[place, age - 1] = found[place, max(age - 2, 0)]
            if len(rows):
                ranks = plan_ranks(trained, users[rows], positions[rows], age_events=age, level=level, by_cache_alone=True)
                found[place, age - 1, rows[:, None], plans] = ranks
            progress(place * ages + age, len(CACHE_LEVELS) * ages)
    return found


def fit_schedule(sequences: Sequences, budget: Budget, progress: Report = lambda stage, done, total: None) -> CallSchedule:
    """The lowest price of a call that keeps a budget in the simulated requests, and the planner that asks it.

    A budget of 0 gets a price that no call is worth.

    Raises:
        UserError: a budget of something else than calls, or one that limits nothing.
    """
    check_budget(budget)
    allowed, tried = budget.limit / budget.requests_per_day, 0

    def calls_at(price: float) -> float:
        nonlocal tried
        tried += 1
        progress(PRICE, min(tried, 2 * SEARCH_STEPS), 2 * SEARCH_STEPS)
        return sequences.outcome(Followed(planner=sequences.priced(price)))["calls"]

    if allowed == 0:
        price = HORIZON
    elif calls_at(0.0) <= allowed:
        price = 0.0
    else:
        high = float(sequences.world.scales.quality_gap)
        while high < HORIZON and calls_at(high) > allowed:
            high *= 2.0
        price = calibrated_price(calls_at, allowed, 0.0, high, SEARCH_STEPS)
    progress(PRICE, 2 * SEARCH_STEPS, 2 * SEARCH_STEPS)
    planner = sequences.priced(price)
    schedulers = {
        "scheduled": Followed(planner=planner),
        **{name: sequences.timed(calls=name == "always") for name in ("always", "never")},
    }
    return CallSchedule(
        planner=planner,
        budget=budget,
        price=price,
        outcomes={name: sequences.outcome(scheduler) for name, scheduler in schedulers.items()},
        num_users=sequences.records.num_users,
        num_requests=(sequences.records.num_steps - sequences.unseen) * sequences.records.num_rows,
    )


def check_budget(budget: Budget) -> None:
    """Refuse what no schedule of calls is made for.

    Raises:
        UserError: a budget of something else than calls, or one that limits nothing.
    """
    if budget.limited is not Limited.CALLS:
        raise UserError(
            f"a planner can be made for a budget of calls alone, such as calls=3, and {budget.name} is none: what it costs to keep it is "
            f"told by cda4rec evaluate --budget {budget.name}"
        )
    if budget.limit > budget.requests_per_day:
        raise UserError(
            f"a budget of {budget.name} limits nothing where a user has {budget.requests_per_day:g} requests a day: name fewer calls, or "
            "say with --requests-per-day how many requests there are"
        )


def schedule_calls_run(
    path: Path | str,
    out: Path | str,
    budget: Budget,
    config: ScheduleFitting | None = None,
    *,
    profile: str = "deployment",
    overwrite: bool = False,
    progress: Report = lambda stage, done, total: None,
) -> tuple[RunDirectory, CallSchedule]:
    """Make a run of a finished one, with a planner that keeps a budget of cloud calls and calls where that gains most quality.

    The run at ``path`` stays as it is, and what ``out`` holds is replaced only when the price has been found.

    Args:
        path: the finished run.
        out: the new run; not that of ``path``.
        budget: of calls.
        config: None takes the defaults.
        profile: "deployment" or "measured", the costs that the new run tells; they do not decide.
        overwrite: replace the run that ``out`` holds.
        progress: hears (stage, done, total).

    Raises:
        UserError: as ``check_budget`` and ``validation_sequences`` do; no finished run, one without a planner, ``out`` is that run or
            holds another without ``overwrite``.
    """
    check_budget(budget)
    config, started = config or ScheduleFitting(), time.monotonic()
    trained, out = load_for_planner_run(path, out, overwrite)
    found = fit_schedule(validation_sequences(trained, trained.world(profile), config, progress), budget, progress)
    kept = ("planner_training",) if trained.run.has("planner_training.json") else ()  # of the policy that it goes by
    run = write_planner_run(
        trained,
        out,
        with_planner(trained.config, TARGET),
        found.planner,
        {"profile": profile, "budget": budget, "fitting": config},
        {
            **{name: trained.run.read_json(name) for name in kept},
            "call_schedule": {"run": str(trained.run.path), **found.to_json()},
        },
        training={"seconds": time.monotonic() - started},
        overwrite=overwrite,
    )
    return run, found
