"""A served planner decides as the planner does, and never for a forbidden plan, whatever it is told."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.planner import (
    PLANS,
    ContextConfig,
    PayloadSizes,
    Policy,
    PolicyConfig,
    RulesPlanner,
    allowed,
    deployment_profile,
    masked_softmax,
    plan_costs,
    sample_contexts,
)
from cda4rec_jax.planner.plan_space import STANDARD
from cda4rec_jax.planner.policy import choose
from cda4rec_jax.planner.serving import BLOCK, CONTEXT_FIELDS, ENUM_SIZES, ServedPlanner, pack, unpack

PROFILE, SIZES, EXPOSURE = deployment_profile(), PayloadSizes(), jnp.asarray([0.0, 0.1, 0.3, 0.8])
NUM_FUZZED = 120_000


def served(planner) -> ServedPlanner:
    return ServedPlanner(planner, PROFILE, EXPOSURE, SIZES)


def drawn_policy(seed: int = 0) -> Policy:
    """A policy that depends on its context: a fresh one does not."""
    policy = Policy(PolicyConfig(), rngs=nnx.Rngs(seed))
    last = policy.context_tower.layers[-1]
    last.kernel[...] = jax.random.normal(jax.random.key(seed), last.kernel.shape)
    return policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return drawn_policy()


@pytest.fixture(scope="module")
def served_policy(policy) -> ServedPlanner:
    return served(policy)


@pytest.fixture(scope="module")
def packed(facts, scales) -> np.ndarray:
    context = jax.jit(lambda: sample_contexts(facts, jnp.arange(4000), scales, 0, ContextConfig()))()
    return np.asarray(pack(context))


@pytest.fixture(scope="module")
def expected(policy, packed) -> tuple[np.ndarray, np.ndarray]:
    """Logits and mask of the planner itself."""

    @jax.jit
    def answer(rows):
        context = unpack(rows)
        mask = allowed(context)
        return policy.logits(context, plan_costs(PROFILE, context, EXPOSURE, SIZES), mask), mask

    logits, mask = answer(packed)
    return np.asarray(logits), np.asarray(mask)


def extreme_requests(count: int, seed: int = 0) -> np.ndarray:
    """Requests of zeros, tiny, usual and huge numbers in every field, and of every combination of enums."""
    draws = np.random.default_rng(seed)
    usual = draws.lognormal(0.0, 3.0, (count, len(CONTEXT_FIELDS)))
    extremes = np.asarray([0.0, 1e-38, 1.0, 191.9, 192.0, 256.0, 1e6, np.finfo(np.float32).max, np.inf, np.nan])
    rows = np.where(draws.random(usual.shape) < 0.3, draws.choice(extremes, usual.shape), usual)
    for name, size in ENUM_SIZES.items():
        rows[:, CONTEXT_FIELDS.index(name)] = draws.integers(0, size, count)
    return rows.astype(np.float32)


def test_unpacking_gives_back_what_was_packed(make_context):
    context = make_context(3, link=4, consent=2, tier=0, round_trip_ms=33.5)
    again = unpack(pack(context))
    for name in CONTEXT_FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(context, name))
        assert getattr(again, name).dtype == getattr(context, name).dtype


def test_many_served_decisions_are_those_of_the_planner(served_policy, packed, expected):
    logits, _ = expected
    np.testing.assert_allclose(served_policy.scores(packed), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(served_policy.choices(packed), logits.argmax(axis=1))


def test_one_served_decision_is_that_of_the_planner(served_policy, packed, expected):
    for row in range(0, 4000, 100):
        decision = served_policy(packed[row])
        np.testing.assert_allclose(decision.scores, expected[0][row], rtol=1e-4, atol=1e-4)
        assert decision.plan_index == expected[0][row].argmax()


@pytest.mark.parametrize("count", [0, 1, 65, BLOCK + 1])
def test_any_number_of_requests_is_decided_row_by_row(served_policy, packed, count):
    rows = np.resize(packed, (count, packed.shape[1]))
    np.testing.assert_array_equal(served_policy.choices(rows), np.resize(served_policy.choices(packed), count))


def test_one_decision_is_compiled_to_one_kernel(served_policy, packed):
    text = served_policy._one.lower(packed[0]).compile().as_text()
    entry = [line for line in text[text.index("ENTRY") :].splitlines()[1:] if "=" in line and " parameter(" not in line]
    assert len(entry) == 1 and 'xla_cpu_small_call="true"' in entry[0]


def test_training_on_does_not_change_what_is_served(packed):
    policy = drawn_policy()
    planner = served(policy)
    before = planner(packed[0]).scores
    policy.mean_quality[...] = policy.mean_quality[...] + jnp.arange(len(PLANS))
    np.testing.assert_array_equal(planner(packed[1]).scores, served(drawn_policy())(packed[1]).scores)
    np.testing.assert_array_equal(planner(packed[0]).scores, before)


@pytest.mark.parametrize("kind", ["policy", "rules", "corrupted policy"])
def test_forbidden_plans_are_never_served_in_120000_extreme_contexts(kind, policy, served_policy):
    if kind == "corrupted policy":
        broken = drawn_policy()
        kernel = broken.context_tower.layers[-1].kernel
        kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
        planner = served(broken)
    else:
        planner = served_policy if kind == "policy" else served(RulesPlanner())
    requests = extreme_requests(NUM_FUZZED)
    mask = np.asarray(jax.jit(lambda rows: allowed(unpack(rows)))(requests))
    choices = planner.choices(requests)
    assert mask[np.arange(NUM_FUZZED), choices].all()
    assert len(np.unique(choices)) >= (1 if kind == "corrupted policy" else 8)
    if kind == "corrupted policy":
        assert (choices == STANDARD.last_resort).all()
    for row in range(0, NUM_FUZZED, NUM_FUZZED // 50):
        decision = planner(requests[row])
        assert mask[row, decision.plan_index]
        assert (decision.scores[~mask[row]] == -np.inf).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
def test_whatever_the_logits_a_forbidden_plan_has_probability_0_and_is_not_chosen(value, expected):
    logits, mask = expected[0][:200].copy(), expected[1][:200]
    logits[:, ::3] = value
    probabilities = np.asarray(masked_softmax(logits, mask))
    assert (probabilities[~mask] == 0.0).all()
    assert mask[np.arange(200), np.asarray(choose(logits, mask))].all()


def test_without_a_usable_score_nothing_leaves(make_context):
    context = make_context(2)
    mask = allowed(replace(context))
    for value in (jnp.nan, -jnp.inf):
        np.testing.assert_array_equal(choose(jnp.full(mask.shape, value), mask), [STANDARD.last_resort] * 2)
    assert not PLANS[STANDARD.last_resort].uses_link
