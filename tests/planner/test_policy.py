import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel, Link
from cda4rec_jax.planner import (
    NUM_PLANS,
    PLANS,
    ContextConfig,
    FixedPlan,
    PayloadSizes,
    Policy,
    PolicyConfig,
    RandomPlanner,
    RulesPlanner,
    allowed,
    choice_weights,
    context_features,
    deployment_profile,
    entropy,
    expected_utility,
    explain_decision,
    fixed_planners,
    masked_softmax,
    plan_costs,
    plan_index,
    sample_contexts,
    utility,
)
from cda4rec_jax.planner.policy import MAX_MULTIPLY_ADDS

EXPOSURE = jnp.asarray([0.0, 0.1, 0.3, 0.8])
SIZES = PayloadSizes()
PROFILE = deployment_profile()
SIZE = 500


@jax.jit
def predicted(context):
    return plan_costs(PROFILE, context, EXPOSURE, SIZES)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(PolicyConfig(), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def contexts(facts, scales):
    few = jax.tree.map(lambda x: x[:SIZE], facts)
    return jax.jit(sample_contexts, static_argnames="config")(few, jnp.arange(SIZE), scales, 0, config=ContextConfig())


@pytest.fixture(scope="module")
def mask(contexts):
    return jax.jit(allowed)(contexts)


def test_a_decision_costs_at_most_15000_multiply_adds():
    tower = 26 * 64 + 64 * 64 + 64 * 32
    assert PolicyConfig().multiply_adds() == tower + 32 * NUM_PLANS <= MAX_MULTIPLY_ADDS == 15_000


def test_the_counted_multiply_adds_are_those_of_the_towers(policy):
    kernels = [leaf.size for leaf in jax.tree.leaves(nnx.state(policy.context_tower, nnx.Param)) if leaf.ndim == 2]
    assert sum(kernels) + policy.plan_vectors().size == PolicyConfig().multiply_adds()


def test_a_policy_that_is_too_large_is_refused():
    with pytest.raises(UserError, match="multiply-adds"):
        Policy(PolicyConfig(hidden=200), rngs=nnx.Rngs(0))


def test_logits_are_learned_quality_minus_known_cost_over_tau(policy, contexts, mask):
    costs = predicted(contexts)
    quality = policy.quality(context_features(contexts))
    expected = utility(quality, costs, contexts) / policy.tau()
    got = policy.logits(contexts, costs, mask)
    np.testing.assert_allclose(np.asarray(got)[mask], np.asarray(expected)[mask], rtol=1e-4)
    assert (np.asarray(got)[~np.asarray(mask)] == -np.inf).all()


def test_learned_quality_does_not_depend_on_the_weights(policy, contexts):
    free = dataclasses.replace(contexts, utility_per_exposure=jnp.zeros((SIZE,)))
    np.testing.assert_array_equal(policy.quality(context_features(free)), policy.quality(context_features(contexts)))


def test_a_higher_price_of_exposure_never_raises_the_exposure_chosen(policy, contexts, mask):
    costs = predicted(contexts)

    def exposure(price: float):
        priced = dataclasses.replace(contexts, utility_per_exposure=jnp.full((SIZE,), price))
        chosen = jnp.argmax(policy.logits(priced, costs, mask), axis=1)
        return jnp.take_along_axis(costs.exposure, chosen[:, None], axis=1)

    cheap, dear = exposure(0.01), exposure(1.0)
    assert bool((dear <= cheap).all()) and float(dear.mean()) < float(cheap.mean())


def test_gradients_reach_the_towers_and_nothing_else(policy, contexts, mask):
    costs = predicted(contexts)
    graph, params, scale = nnx.split(policy, nnx.Param, ...)
    # A fresh policy is plug-in: its last context layer is 0, and lets no gradient through to the plan tower.
    params = jax.tree.map(lambda leaf: leaf + 0.01, params)

    @jax.jit
    def loss(params, scale, utilities):
        logits = nnx.merge(graph, params, scale).logits(contexts, costs, mask)
        return -expected_utility(choice_weights(logits, mask), utilities, mask).mean()

    utilities = jax.random.uniform(jax.random.key(0), mask.shape)
    by_params, by_utilities = jax.grad(loss, (0, 2))(params, scale, utilities)
    leaves = jax.tree.leaves(by_params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    assert all(bool((leaf != 0).any()) for leaf in leaves)
    assert not bool(by_utilities.any())
    assert len(jax.tree.leaves(scale)) == 2  # quality_scale and mean_quality: kept, saved, never trained


def test_a_policy_learns_which_plan_is_best_for_whom(contexts):
    everything, free = jnp.ones((SIZE, NUM_PLANS), bool), jax.tree.map(jnp.zeros_like, predicted(contexts))
    best = jnp.where(contexts.history_length > 25, plan_index("fresh-full-500-device"), plan_index("local-skip-skip"))
    utilities = (jnp.arange(NUM_PLANS)[None, :] == best[:, None]).astype(jnp.float32)
    graph, params, rest = nnx.split(Policy(PolicyConfig(quality_scale=1.0), rngs=nnx.Rngs(0)), nnx.Param, ...)
    optimizer = optax.adam(0.01)

    def loss(params):
        pi = masked_softmax(nnx.merge(graph, params, rest).logits(contexts, free, everything), everything)
        return -jnp.mean(expected_utility(pi, utilities, everything) + 0.1 * entropy(pi))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=150)[0][0]

    chosen = jnp.argmax(nnx.merge(graph, train(params), rest).logits(contexts, free, everything), axis=1)
    assert float((chosen == best).mean()) > 0.9


def test_random_choices_do_not_depend_on_the_batch_and_spread_over_the_allowed_plans(contexts, mask):
    costs = predicted(contexts)
    whole = jnp.argmax(jax.jit(RandomPlanner().logits)(contexts, costs, mask), axis=1)
    half = jax.tree.map(lambda x: x[::2], (contexts, costs, mask))
    np.testing.assert_array_equal(jnp.argmax(RandomPlanner().logits(*half), axis=1), whole[::2])
    free = np.flatnonzero(np.asarray(mask).all(axis=1))
    chosen = np.bincount(np.asarray(whole)[free], minlength=NUM_PLANS)
    spread = ((chosen - len(free) / NUM_PLANS) ** 2).sum() / (len(free) / NUM_PLANS)
    assert spread < 61.1  # chi-squared with 31 degrees of freedom: P = .001


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"link": Link.WIFI, "cache_age_events": 4.0}, "fresh-full-500-device"),
        ({"link": Link.LTE, "consent": EgressLevel.RECENT, "cache_age_events": 4.0}, "fresh-recent-100-device"),
        ({"link": Link.THREE_G, "cache_age_events": 1.0, "cache_level": EgressLevel.FULL}, "reuse-20-device"),
        ({"link": Link.EDGE}, "local-reuse-device"),
        ({"link": Link.LTE, "cache_age_events": 4.0, "tier": 0, "history_length": 80.0}, "fresh-full-100-skip"),
        ({"consent": EgressLevel.NOTHING, "cache_level": EgressLevel.NOTHING}, "local-skip-device"),
    ],
)
def test_rules_by_hand(make_context, fields, expected):
    context = make_context(1, **fields)
    chosen = jnp.argmax(RulesPlanner().logits(context, predicted(context), allowed(context)), axis=1)
    assert PLANS[int(chosen[0])].name == expected


def test_every_plan_is_a_fixed_planner(make_context):
    context = make_context(1)
    for name, planner in fixed_planners().items():
        chosen = jnp.argmax(planner.logits(context, predicted(context), allowed(context)), axis=1)
        assert PLANS[int(chosen[0])].name == name


def test_a_decision_is_explained_by_terms_that_sum_to_its_logit(policy, contexts, mask):
    costs = predicted(contexts)
    quality = policy.quality(context_features(contexts))
    logits = policy.logits(contexts, costs, mask)
    decision = explain_decision(logits, quality, costs, contexts, tau=float(policy.tau()), row=11)
    ordered = np.sort(np.asarray(logits)[11])[::-1]
    assert decision.tau is not None and decision.chosen.utility is not None
    assert decision.chosen.plan_index == int(np.argmax(logits[11]))
    assert decision.chosen.utility / decision.tau == pytest.approx(float(ordered[0]), rel=1e-4)
    assert decision.runner_up is not None and decision.runner_up.utility is not None and decision.margin is not None
    assert decision.runner_up.utility / decision.tau == pytest.approx(float(ordered[1]), rel=1e-4)
    assert decision.margin >= 0 and decision.chosen.time <= 0
    assert decision.chosen.name == PLANS[decision.chosen.plan_index].name


def test_a_planner_without_alternatives_has_no_runner_up(make_context):
    context = make_context(1)
    costs = predicted(context)
    logits = FixedPlan(3).logits(context, costs, allowed(context))
    decision = explain_decision(logits, jnp.zeros((1, NUM_PLANS)), costs, context, tau=1.0)
    assert decision.runner_up is None and decision.margin is None and decision.chosen.plan_index == 3
