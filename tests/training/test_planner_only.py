"""Training a planner alone: that it learns what there is to learn, from frozen outcomes, and becomes a run of its own."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.data.splits import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation import evaluate_run
from cda4rec_jax.pipeline.decisions import PlanningWorld
from cda4rec_jax.planner import (
    NUM_PLANS,
    ContextConfig,
    DirectPolicy,
    Objective,
    PayloadSizes,
    Policy,
    PolicyConfig,
    UserFacts,
    WeightScales,
    deployment_profile,
    plan_index,
    sample_contexts,
)
from cda4rec_jax.planner.budgets import Budget
from cda4rec_jax.runs.artifacts import load_trained
from cda4rec_jax.runtime.recommend import Recommender
from cda4rec_jax.training import PlannerExamples, PlannerTraining, new_planner, planner_examples, train_planner, train_planner_run
from cda4rec_jax.training.planner_only import enough_users
from tests.planner.own_planner import Unmasked

USERS, CACHES = 240, 2
CONFIG = PlannerTraining(steps=60, users_per_step=64, learning_rate=0.01, average_decay=0.9)


@pytest.fixture(scope="module")
def world() -> PlanningWorld:
    return PlanningWorld(
        profile=deployment_profile(),
        exposure_by_level=jnp.asarray([0.0, 0.4, 0.6, 0.9]),
        sizes=PayloadSizes(),
        scales=WeightScales.of(quality_gap=0.2, latency_gap_ms=100.0, energy_gap_mj=300.0, exposure_gap=0.8),
    )


@pytest.fixture(scope="module")
def examples(world: PlanningWorld) -> PlannerExamples:
    """Users of long histories are better off with the device's own model, the others with a small request to the cloud."""
    random = np.random.default_rng(0)
    length, zero = np.where(np.arange(USERS) % 2, 100.0, 6.0).astype(np.float32), np.zeros(USERS, np.float32)
    rest = dict.fromkeys(("category_entropy", "rare_share", "session_count", "hours_since_last", "has_timestamps"), zero)
    facts = UserFacts(history_length=length, max_cache_age=zero + 5, **rest)
    events = np.arange(USERS, dtype=np.int32)
    draw = jax.jit(lambda number: sample_contexts(facts, events, world.scales, number, ContextConfig()))
    contexts = [draw(number) for number in range(CACHES)]
    quality = np.full((CACHES, USERS, NUM_PLANS), 0.3, np.float32)
    is_long = length > 50
    quality[:, is_long, plan_index("local-skip-device")] = 0.6
    quality[:, ~is_long, plan_index("fresh-profile-20-skip")] = 0.8
    quality += random.normal(0, 0.1, (CACHES, USERS, 1)).astype(np.float32)
    return PlannerExamples(
        users=events,
        event_ids=events,
        selects=np.arange(USERS) % 3 == 0,
        context=jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *contexts),
        quality=quality,
    )


@pytest.mark.parametrize("objective", list(Objective))
def test_every_objective_learns_for_whom_a_plan_is_worth_its_price(examples, world, objective):
    trained = train_planner(examples, world, replace(CONFIG, objective=objective))
    assert trained.minus_plug_in.low > 0 and trained.minus_best_fixed.low > 0
    assert trained.minus_plug_in.num_users == examples.selects.sum()
    utilities = {row["step"]: row["utility"] for row in trained.curve}
    assert utilities[trained.best_step] == max(utilities.values()) == pytest.approx(trained.utility["policy"], abs=1e-6)
    assert utilities[0] == pytest.approx(trained.utility["plug-in"], abs=1e-6)  # it starts as plug-in


def test_training_gives_the_same_again_and_leaves_the_planner_that_it_starts_from_as_it_was(examples, world):
    short, start = replace(CONFIG, steps=4), new_planner(examples, world, CONFIG)
    before = jax.tree.map(np.asarray, nnx.state(start))
    one, other = (train_planner(examples, world, short, start) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one.policy), nnx.state(other.policy))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(start))


def test_a_planner_that_predicts_no_quality_learns_from_utility_alone(examples, world):
    direct = DirectPolicy(PolicyConfig(quality_scale=0.2), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"DirectPolicy tells no quality.*exact or gumbel"):
        train_planner(examples, world, replace(CONFIG, objective=Objective.REGRESSION), direct)
    trained = train_planner(examples, world, CONFIG, direct)
    assert trained.curve[-1]["utility"] > trained.curve[0]["utility"]


def test_what_a_planner_says_of_forbidden_plans_neither_selects_its_weights_nor_counts_as_its_gain(examples, world):
    start = (new_planner(examples, world, CONFIG, kind) for kind in (Policy, Unmasked))
    masked, unmasked = (train_planner(examples, world, replace(CONFIG, steps=20), planner) for planner in start)
    assert unmasked.utility == pytest.approx(masked.utility, abs=1e-6) and unmasked.best_step == masked.best_step
    assert [row["utility"] for row in unmasked.curve] == pytest.approx([row["utility"] for row in masked.curve], abs=1e-6)


class Undefined(DirectPolicy):
    """A share of nothing at all."""

    def logits(self, context, costs, mask):
        return super().logits(context, costs, mask) * (costs.exposure / costs.exposure)


def test_a_planner_that_says_no_number_is_refused(examples, world):
    broken = Undefined(PolicyConfig(), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"Undefined scores [\d,]+ of [\d,]+ allowed plans as NaN.*0 / 0"):
        train_planner(examples, world, CONFIG, broken)


def test_bad_settings_are_the_users_error():
    with pytest.raises(UserError, match=r"steps=0, at least 1; seed=-1, at least 0; learning_rate=0\.0, above 0 expected"):
        PlannerTraining(steps=0, seed=-1, learning_rate=0.0)


def test_further_caches_are_other_draws_of_the_same_events(tiny_run: Path):
    trained = load_trained(tiny_run)
    users, world = np.arange(40), trained.world()
    positions = trained.corpus.target_positions(Split.VALIDATION)[users]
    first, later = (
        trained.population.records(trained.weights, world, users, positions, draws=2, first_draw=draw) for draw in (0, 1)
    )
    one, other = first.requests.context, later.requests.context
    # Draw 1 is among both, with the cache and the consent of the draw that each began with.
    np.testing.assert_array_equal(one.round_trip_ms[1], other.round_trip_ms[0])
    for name in ("cache_age_events", "cache_level", "consent"):
        np.testing.assert_array_equal(getattr(one, name)[0], getattr(one, name)[1])
        assert (getattr(one, name)[0] != getattr(other, name)[0]).any()
    fresh, reuse = plan_index("fresh-profile-100-device"), plan_index("local-reuse-device")
    np.testing.assert_array_equal(first.ranks[:, fresh], later.ranks[:, fresh])
    assert (first.ranks[:, reuse] != later.ranks[:, reuse]).any()


def test_a_new_planner_becomes_a_run_that_evaluates_and_recommends_and_the_old_run_stays(tiny_run: Path, tmp_path: Path):
    config = PlannerTraining(steps=10, users_per_step=16, cache_draws=1)
    before = {file: file.read_bytes() for file in sorted(tiny_run.rglob("*")) if file.is_file()}
    told: list[str] = []
    run, found = train_planner_run(
        tiny_run, tmp_path / "run", config, profile="measured", progress=lambda stage, done, total: told.append(stage)
    )
    assert {file: file.read_bytes() for file in sorted(tiny_run.rglob("*")) if file.is_file()} == before
    assert set(told) == {"outcomes of all plans", "training the planner"}
    old, new = load_trained(tiny_run), load_trained(run.path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(old.system.device), nnx.state(new.system.device))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(new.system.policy), nnx.state(found.policy))
    assert [row["step"] for row in run.metrics()] == [row["step"] for row in found.curve[1:]]
    report = evaluate_run(run.path, users=60, draws=1, budgets=[Budget.parse("exposure=0.1")])
    assert {"policy", "policy, exposure=0.1", "plug-in"} <= {row.name for row in report.planners}
    (budget,) = report.budgets
    assert 0 < budget.on_validation <= 0.1 and 0 < budget.on_split <= 0.15  # 60 users are few
    assert any("exposure=0.1 (mean exposure)" in line for line in report.notes())
    with Recommender(new) as recommender:
        answer = recommender.recommend(new.corpus.interactions.user_ids[0], k=5)
    # It decides by the costs that it was trained with, which are not those of the old run.
    assert answer.to_json() and answer.planned_for == new.world().profile.name == "measured"
    assert old.world().profile.name == new.world("deployment").profile.name == "deployment (modelled)"
    with pytest.raises(UserError, match="already holds a run"):
        train_planner_run(tiny_run, run.path, config)
    with pytest.raises(UserError, match="is the run itself"):
        train_planner_run(tiny_run, tiny_run, config, overwrite=True)


def test_examples_need_users_to_train_and_to_select_on(tiny_run: Path):
    trained = load_trained(tiny_run)
    few = PlannerTraining(users=25)
    with pytest.raises(UserError, match="to select on"):
        planner_examples(trained, trained.world(), few)
    assert not enough_users(300, few) and not enough_users(25, CONFIG) and enough_users(300, CONFIG)
