"""The schedulers of ``replay``: which there are, and what each earns on users from whom nothing of it was estimated."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.call_schedule import Report, ScheduleFitting, fit_schedule, validation_sequences
from cda4rec_jax.evaluation.replay import ReplayRecords, Scheduler, play
from cda4rec_jax.evaluation.schedulers import (
    Followed,
    Priced,
    Schedule,
    Worth,
    calibrated_price,
    evenly_spaced,
    no_freshness,
    quality_by_age,
    unpriced,
)
from cda4rec_jax.pipeline.decisions import PlanningWorld
from cda4rec_jax.pipeline.planners import PlugIn
from cda4rec_jax.planner import RulesPlanner
from cda4rec_jax.planner.budgets import REQUESTS_PER_DAY, Budget, Limited
from cda4rec_jax.planner.scheduling import CallScheduler, freshness_values
from cda4rec_jax.runs.artifacts import TrainedSystem

BUDGET = 0.3  # of the calls of the planner that always calls: the share at which schedulers are compared
SHARES = (0.1, 0.2, BUDGET, 0.4, 0.5, 0.7)
ALWAYS, NEVER, THIRD, RULES = "always-cloud", "never", "every third request", "rules"
SPACED, RANDOM, PLUG_IN, POLICY = "evenly spaced", "random", "plug-in", "policy"
GAIN, BY_AGE = "largest predicted gain", "mean gain by age"
FRESH = " + freshness"
TIMED = (SPACED, RANDOM)
PRICED = (PLUG_IN, POLICY, POLICY + FRESH, GAIN, GAIN + FRESH, BY_AGE + FRESH)
COMMAND = "train-planner --budget"
COMPARED = (*PRICED, COMMAND)
QUANTITIES = ("hit_rate@10", "ndcg@10", "calls", "latency_ms", "exposure", "utility")
LAST = "hit_rate@10 of the last"

Key = tuple[str, float | None]  # scheduler, and the share of calls that it was brought to


def as_commanded(
    run: TrainedSystem, shares: tuple[float, ...], users: int | None, progress: Report
) -> dict[float, CallScheduler]:
    """The planners that ``train-planner --budget`` makes of a run, by share of the calls of always calling: of its validation events alone.

    Args:
        run: over its own data.
        shares: of the calls.
        users: at most so many; None takes what the command takes.
        progress: hears (stage, done, total).
    """
    config = ScheduleFitting() if users is None else ScheduleFitting(users=users, sequences=2 * users)
    sequences = validation_sequences(run, run.world(), config, progress)
    all_calls = sequences.outcome(sequences.timed(calls=True))["calls"] * REQUESTS_PER_DAY
    budgets = {share: Budget(limited=Limited.CALLS, limit=share * all_calls) for share in shares}
    return {share: fit_schedule(sequences, budget, progress).planner for share, budget in budgets.items()}


def cross_fitted(
    trained: TrainedSystem,
    world: PlanningWorld,
    records: ReplayRecords,
    shares: tuple[float, ...],
    commanded: Mapping[float, CallScheduler],
) -> dict[Key, dict[str, np.ndarray]]:
    """Quantities of every user by scheduler and share: everything that is estimated comes from the other half of the users.

    But for ``as_commanded``, which saw none of these requests.
    """
    folds = np.random.default_rng(0).permutation(records.num_users) % 2
    worths = _worths(trained)
    merged: dict[Key, dict[str, np.ndarray]] = {}
    for fold in (0, 1):
        own, other = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        run = partial(play, world=world, max_cache_age=trained.config.max_cache_age)
        schedulers = _Schedulers(records.of(other), run, worths)
        measured = records.of(own)
        followed = {(COMMAND, share): Followed(planner=planner) for share, planner in commanded.items()}
        for key, scheduler in (schedulers.all(measured, shares) | followed).items():
            played = run(measured, scheduler=scheduler)
            columns = {name: played.per_user(name) for name in QUANTITIES}
            columns[LAST] = played.per_user("hit_rate@10", slice(-1, None))
            place = merged.setdefault(key, {name: np.zeros(records.num_users) for name in columns})
            for name, values in columns.items():
                place[name][own] = values
    return merged


def _worths(trained: TrainedSystem) -> dict[str, Worth]:
    """What planners expect of plans, in units of quality."""
    policy = trained.system.policy
    policy = policy.policy if isinstance(policy, CallScheduler) else policy  # of a run that is scheduled already
    assert policy is not None
    tau = policy.tau()
    if tau is None:
        raise UserError(
            f"{trained.run.path} has a planner, {type(policy).__name__}, whose logits are not in units of quality (it has no tau), and "
            "calls are priced in these: name a run with another planner"
        )

    def worth(context: Any, costs: Any, mask: Any) -> Any:
        return policy.logits(context, costs, mask) * tau

    return {POLICY: worth, GAIN: unpriced(worth), RULES: RulesPlanner().logits}


class _Schedulers:
    """All schedulers, from the replay of users on whom nothing is measured."""

    def __init__(self, calibration: ReplayRecords, run: Any, worths: dict[str, Worth]):
        self._means = quality_by_age(calibration)
        self._calling, self._local = self._means.best(calls=True), self._means.best(calls=False)
        # Plug-in knows one mean for each plan: that of plans which reuse a cache is over the caches that calls at the budget leave.
        self._run = partial(run, calibration)
        spaced = self._run(scheduler=self._spaced(calibration, BUDGET))
        known = self._means.over(spaced.cache_level, spaced.cache_age_events)[None, :]

        def plug_in(context: Any, costs: Any, mask: Any) -> Any:
            return PlugIn(quality=jnp.asarray(known, jnp.float32)).logits(context, costs, mask)

        self._worths = worths | {PLUG_IN: plug_in, BY_AGE: self._means.worth}
        always = self._timed(np.ones((calibration.num_steps, calibration.num_rows)))
        self._all_calls = float(self._run(scheduler=always).values["calls"].mean())

    def all(self, measured: ReplayRecords, shares: tuple[float, ...]) -> dict[Key, Scheduler]:
        """By name and share of always-cloud's calls; None for those that cannot be brought to one."""
        steps = measured.num_steps
        found: dict[Key, Scheduler] = {
            (ALWAYS, None): self._timed(np.ones((steps, measured.num_rows))),
            (NEVER, None): self._timed(np.zeros((steps, measured.num_rows))),
            (THIRD, None): self._timed(evenly_spaced(steps, 1 / 3, np.zeros(measured.num_rows))),
            (RULES, None): Priced(worth=self._worths[RULES], price=0.0, freshness=no_freshness(self._means)),
        }
        for share in shares:
            found[SPACED, share] = self._spaced(measured, share)
            found[RANDOM, share] = self._timed(np.random.default_rng(0).random((steps, measured.num_rows)) < share)
            for name in PRICED:
                price = calibrated_price(partial(self._calls_at, name), share * self._all_calls)
                found[name, share] = self._priced(name, price)
        return found

    def _calls_at(self, name: str, price: float) -> float:
        return float(self._run(scheduler=self._priced(name, price)).values["calls"].mean())

    def _timed(self, calls: np.ndarray) -> Schedule:
        return Schedule(calls=calls.astype(bool), calling_plan=self._calling, other_plan=self._local)

    def _spaced(self, records: ReplayRecords, share: float) -> Schedule:
        phases = np.random.default_rng(1).random(records.num_rows)
        return self._timed(evenly_spaced(records.num_steps, share, phases))

    def _priced(self, name: str, price: float) -> Priced:
        fresh = name.endswith(FRESH)
        freshness = freshness_values(self._means, price) if fresh else no_freshness(self._means)
        return Priced(worth=self._worths[name.removesuffix(FRESH)], price=price, freshness=freshness)
