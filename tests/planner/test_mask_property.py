import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cda4rec_jax.messages import Context, EgressLevel, Link
from cda4rec_jax.planner import (
    PLANS,
    ContextConfig,
    DirectPolicy,
    FixedPlan,
    Objective,
    PayloadSizes,
    Policy,
    PolicyConfig,
    RandomPlanner,
    RulesPlanner,
    allowed,
    choice_weights,
    deployment_profile,
    masked_softmax,
    plan_costs,
    plan_index,
    sample_contexts,
)

PLANNERS = {
    "policy": Policy(PolicyConfig(), rngs=nnx.Rngs(0)),
    "direct": DirectPolicy(PolicyConfig(), rngs=nnx.Rngs(1)),
    "rules": RulesPlanner(),
    "random": RandomPlanner(),
    "fixed": FixedPlan(plan_index("fresh-full-500-device")),
}
POSITIVE = st.floats(0, 1e6, width=32)
CONTEXTS = st.fixed_dictionaries(
    {
        "history_length": st.integers(0, 10_000),
        "cache_age_events": st.integers(0, 1000),
        "category_entropy": st.floats(0, 5, width=32),
        "rare_share": st.floats(0, 1, width=32),
        "session_count": POSITIVE,
        "hours_since_last": POSITIVE,
        "has_timestamps": st.sampled_from([0.0, 1.0]),
        "free_memory_mb": POSITIVE,
        "round_trip_ms": POSITIVE,
        "uplink_kbps": POSITIVE,
        "downlink_kbps": POSITIVE,
        "utility_per_ms": st.floats(0, 10, width=32),
        "utility_per_mj": st.floats(0, 10, width=32),
        "utility_per_exposure": st.floats(0, 10, width=32),
        "cache_level": st.integers(0, 3),
        "tier": st.integers(0, 2),
        "link": st.integers(0, 4),
        "consent": st.integers(0, 3),
    }
)
ENUMS = ("cache_level", "tier", "link", "consent")


@jax.jit
def decide(context, key):
    costs = plan_costs(deployment_profile(), context, jnp.asarray([0.0, 0.1, 0.3, 0.8]), PayloadSizes())
    mask = allowed(context)
    weights, chosen = {}, {}
    for name, planner in PLANNERS.items():
        logits = planner.logits(context, costs, mask)
        weights[f"{name} softmax"] = masked_softmax(logits, mask)
        weights[f"{name} gumbel"] = choice_weights(logits, mask, Objective.GUMBEL, key=key)
        chosen[name] = jnp.argmax(logits, axis=1)
    return mask, weights, chosen


def forbidden_by_hand(fields: dict, plan) -> bool:
    """The rules again, written for one plan and one context."""
    cache_level, consent = EgressLevel(fields["cache_level"]), EgressLevel(fields["consent"])
    memory_mb = 192 * (plan.structured == "device") + 64 * (plan.num_candidates == 500)
    return (
        plan.egress_level(cache_level) > consent
        or (plan.semantic == "reuse" and cache_level == EgressLevel.NOTHING)
        or (plan.uses_link and fields["link"] == Link.OFFLINE)
        or memory_mb > fields["free_memory_mb"]
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(fields=CONTEXTS, seed=st.integers(0, 1000))
def test_forbidden_plans_have_probability_exactly_0_under_every_planner(fields, seed):
    values = {name: jnp.asarray([value], jnp.int32 if name in ENUMS else jnp.float32) for name, value in fields.items()}
    mask, weights, chosen = decide(Context(**values), jax.random.key(seed))
    expected = [not forbidden_by_hand(fields, plan) for plan in PLANS]
    np.testing.assert_array_equal(mask[0], expected)
    assert mask[0].any()
    for name, row in weights.items():
        assert (np.asarray(row)[~np.asarray(mask)] == 0.0).all(), name
        assert float(row.sum()) == pytest.approx(1.0, abs=1e-5), name
    for name, index in chosen.items():
        assert bool(mask[0, int(index[0])]), name


def test_forbidden_plans_are_never_chosen_in_40000_drawn_contexts(facts, scales):
    ids = jnp.arange(4000)

    @jax.jit
    def violations(draw):
        context = sample_contexts(facts, ids, scales, draw, ContextConfig())
        mask, weights, chosen = decide(context, jax.random.key(draw))
        wrong = sum(jnp.sum(jnp.where(mask, 0.0, jnp.abs(row))) for row in weights.values())
        return wrong + sum(jnp.sum(~jnp.take_along_axis(mask, index[:, None], axis=1)) for index in chosen.values())

    assert all(float(violations(draw)) == 0.0 for draw in range(10))
