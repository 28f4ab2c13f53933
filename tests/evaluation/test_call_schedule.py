"""A budget of calls made into a planner, on simulated requests before validation events."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.data.splits import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.call_schedule import (
    HORIZON,
    CallSchedule,
    ScheduleFitting,
    Sequences,
    fit_schedule,
    validation_sequences,
)
from cda4rec_jax.evaluation.conditions import plan_ranks
from cda4rec_jax.evaluation.replay import play
from cda4rec_jax.evaluation.schedulers import Followed, Priced, unpriced
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.planner import DirectPolicy
from cda4rec_jax.planner.budgets import Budget, Limited
from cda4rec_jax.planner.scheduling import OLDEST, freshness_values
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained

FITTING = ScheduleFitting(users=60, sequences=120, unseen=3, counted=4)


def budget(calls: float) -> Budget:
    return Budget(limited=Limited.CALLS, limit=calls)


@pytest.fixture(scope="module")
def trained(tiny_run: Path) -> TrainedSystem:
    return load_trained(tiny_run)


@pytest.fixture(scope="module")
def sequences(trained: TrainedSystem) -> Sequences:
    return validation_sequences(trained, trained.world(), FITTING)


@pytest.fixture(scope="module")
def fitted(sequences: Sequences) -> dict[float, CallSchedule]:
    return {calls: fit_schedule(sequences, budget(calls)) for calls in (0.0, 2.0, 4.0, 10.0)}


def test_a_budget_is_kept_and_a_smaller_one_costs_more(sequences: Sequences, fitted: dict[float, CallSchedule]) -> None:
    prices = [fitted[calls].price for calls in (0.0, 2.0, 4.0, 10.0)]
    assert prices[0] == HORIZON and prices[1] > prices[2] > prices[3] == 0.0
    spent = [fitted[calls].calls_per_day for calls in (0.0, 2.0, 4.0, 10.0)]
    assert spent[0] == 0.0 and spent[1] <= 2.0 and spent[2] <= 4.0 and spent[3] > 4.0
    for calls in (2.0, 4.0):  # and no price that is surely lower keeps it
        lower = sequences.outcome(Followed(planner=sequences.priced(0.98 * fitted[calls].price)))["calls"] * 10
        assert lower > calls
    outcomes = fitted[2.0].outcomes
    assert outcomes["never"]["calls"] == 0.0 and outcomes["always"]["calls"] > 0.7
    assert outcomes == {**fitted[4.0].outcomes, "scheduled": outcomes["scheduled"]}


def test_the_planner_does_what_the_priced_scheduler_of_a_replay_does(
    trained: TrainedSystem, sequences: Sequences, fitted: dict[float, CallSchedule]
) -> None:
    policy, means = sequences.policy, sequences.means

    def worth(context: Any, costs: Any, mask: Any) -> Any:
        return policy.logits(context, costs, mask) * policy.tau()

    by_quality = unpriced(worth)
    for calls in (2.0, 4.0):
        found = fitted[calls]
        played = [
            play(sequences.records, sequences.world, scheduler, trained.config.max_cache_age)
            for scheduler in (
                Followed(planner=found.planner),
                Priced(worth=by_quality, price=found.price, freshness=freshness_values(means, found.price)),
            )
        ]
        np.testing.assert_array_equal(played[0].plans, played[1].plans)
        assert played[0].values["calls"][FITTING.unseen :].mean() == pytest.approx(found.outcomes["scheduled"]["calls"])


def test_it_is_fitted_on_validation_events_by_devices_that_stay(trained: TrainedSystem, sequences: Sequences) -> None:
    records, contexts = sequences.records, sequences.records.contexts
    assert records.num_steps == 7 and records.num_users == 60 and records.num_rows == 120
    positions = trained.corpus.target_positions(Split.VALIDATION)
    lengths = contexts.history_length[:, :60]
    assert (lengths == lengths[:1]).all() and set(lengths[0].astype(int)) <= set(positions)
    for name in ("consent", "tier", "free_memory_mb"):
        values = getattr(contexts, name)
        assert (values == values[:1]).all() and len(np.unique(values[0])) > 1
    assert (contexts.consent[0, :60] != contexts.consent[0, 60:]).any()
    assert (contexts.link[:, :60] != contexts.link[:1, :60]).any() and (contexts.link[:, :60] != contexts.link[:, 60:]).any()


def test_ranks_are_those_of_each_cache_and_of_the_oldest_that_a_past_allows(trained: TrainedSystem, sequences: Sequences) -> None:
    users = np.sort(np.random.default_rng([0, 47]).permutation(trained.corpus.interactions.num_users)[:60])
    positions = trained.corpus.target_positions(Split.VALIDATION)[users]
    ranks = sequences.records.ranks[:, :, :, -1]
    long_enough = np.flatnonzero(positions > 6)
    direct = plan_ranks(trained, users[long_enough], positions[long_enough], age_events=6, level=EgressLevel.RECENT)
    np.testing.assert_array_equal(ranks[EgressLevel.RECENT - 1, 5, long_enough], direct)
    short = np.flatnonzero(positions <= OLDEST - 1)
    assert len(short), "no user whose past is too short: the test sees nothing"
    for user in short:
        np.testing.assert_array_equal(ranks[:, OLDEST - 1, user], ranks[:, positions[user] - 2, user])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Budget(limited=Limited.P95_MS, limit=250.0), "p95_ms=250 is none: .* cda4rec evaluate --budget p95_ms=250"),
        (budget(11.0), "calls=11 limits nothing where a user has 10 requests a day"),
    ],
)
def test_a_budget_that_no_schedule_is_made_for_is_refused(sequences: Sequences, asked: Budget, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_schedule(sequences, asked)


def test_fitting_on_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="users=0, at least 1; unseen=-1, at least 0 expected"):
        ScheduleFitting(users=0, unseen=-1)


def test_a_planner_of_a_users_own_is_refused_with_what_to_do(tiny_run: Path) -> None:
    trained = load_trained(tiny_run)
    trained.system.policy = DirectPolicy(trained.config.policy, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"own, DirectPolicy, .* train-planner --planner cda4rec_jax.planner:Policy"):
        validation_sequences(trained, trained.world())
