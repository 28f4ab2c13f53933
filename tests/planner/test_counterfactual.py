"""The nearest change that flips a decision, against closed forms, and the rules that forbid plans."""

import math
from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, Link
from cda4rec_jax.planner import PLANS, ContextConfig, WeightScales, allowed, plan_index
from cda4rec_jax.planner.counterfactual import (
    OTHER_RULE,
    RULES,
    Alternative,
    Continuous,
    Enumerated,
    context_axes,
    forbidding_rules,
    in_figures,
    nearest_flips,
)

QUALITY = (0.30, 0.24, 0.05)
BASE_MS = (40.0, 20.0, 10.0)  # before the round trip, which plan 2 does not wait for


def linear(context: Context) -> jnp.ndarray:
    """The best of three plans: U_p = quality_p - w_t (base_p + round trip, but for plan 2); plan 0 takes 200 MB, plan 1 a consent."""
    waits = jnp.asarray([1.0, 1.0, 0.0])
    latency_ms = jnp.asarray(BASE_MS)[None, :] + waits[None, :] * context.round_trip_ms[:, None]
    utility = jnp.asarray(QUALITY)[None, :] - context.utility_per_ms[:, None] * latency_ms
    fits = context.free_memory_mb[:, None] >= jnp.asarray([200.0, 0.0, 0.0])[None, :]
    agreed = context.consent[:, None] >= jnp.asarray([0, 1, 0])[None, :]
    return jnp.argmax(jnp.where(fits & agreed, utility, -jnp.inf), axis=1)


@pytest.fixture(scope="module")
def request_context(make_context: Callable[..., Context]) -> Context:
    """At 1e-3 a millisecond and 50 ms, plan 0 has .21, plan 1 has .17, plan 2 has .04."""
    return make_context(1, utility_per_ms=1e-3, round_trip_ms=50.0, free_memory_mb=1000.0)


AXES = (
    Continuous(field="round_trip_ms", low=1.0, high=4000.0),
    Continuous(field="utility_per_ms", low=1e-6, high=1.0),
    Continuous(field="free_memory_mb", low=16.0, high=16_384.0),
    Continuous(field="uplink_kbps", low=10.0, high=1e6),
)


def test_continuous_flips_lie_where_the_closed_form_says(request_context: Context) -> None:
    flips = {flip.axis: flip for flip in nearest_flips(linear, request_context, AXES, ())}
    # Plan 0 and plan 1 wait for the same link, so the round trip decides between plan 0 and plan 2: .30 - w (40 + r) = .05 - w 10.
    assert (flips["round_trip_ms"].to, flips["round_trip_ms"].plan_index) == (pytest.approx(220.0, rel=1e-5), 2)
    # Plan 1 passes plan 0 at w = .06 / 20, plan 2 passes plan 0 at w = .25 / 80 only.
    assert (flips["utility_per_ms"].to, flips["utility_per_ms"].plan_index) == (pytest.approx(0.003, rel=1e-5), 1)
    assert (flips["free_memory_mb"].to, flips["free_memory_mb"].plan_index) == (pytest.approx(200.0, rel=1e-5), 1)
    assert flips["free_memory_mb"].ratio == pytest.approx(0.2, rel=1e-5)
    assert (flips["uplink_kbps"].to, flips["uplink_kbps"].distance) == (None, math.inf)


def test_flips_come_by_relative_size_and_those_without_one_last(request_context: Context) -> None:
    flips = nearest_flips(linear, request_context, AXES, ())
    assert [flip.axis for flip in flips] == ["utility_per_ms", "round_trip_ms", "free_memory_mb", "uplink_kbps"]
    assert [flip.distance for flip in flips] == pytest.approx(
        [math.log2(3.0), math.log2(4.4), math.log2(5.0), math.inf], rel=1e-4
    )


def test_the_nearer_of_two_flips_is_told(request_context: Context) -> None:
    def island(context: Context) -> jnp.ndarray:
        inside = (context.round_trip_ms > 20.0) & (context.round_trip_ms < 60.0)
        return jnp.where(inside, 0, 1)

    (flip,) = nearest_flips(island, request_context, AXES[:1], ())
    assert flip.to == pytest.approx(60.0, rel=1e-5)  # 50 -> 60 is nearer than 50 -> 20


def test_a_price_of_zero_is_tried_from_the_low_end_of_its_range(request_context: Context) -> None:
    free = replace(request_context, utility_per_ms=jnp.zeros((1,)))
    (flip,) = nearest_flips(linear, free, AXES[1:2], ())
    assert flip.to == pytest.approx(0.003, rel=1e-5)
    assert flip.ratio == math.inf


def test_alternatives_are_all_tried_and_the_nearest_that_flips_is_told(request_context: Context) -> None:
    at_plan_1 = replace(request_context, free_memory_mb=jnp.full((1,), 100.0))
    steps = [
        Alternative(label=level.name.lower(), changes={"consent": float(level)}, distance=3.0 - level)
        for level in (EgressLevel.NOTHING, EgressLevel.PROFILE, EgressLevel.RECENT)
    ]
    lengths = Alternative(label="60", changes={"history_length": 60.0}, distance=1.0, ratio=2.0)
    axes = (
        Enumerated(name="consent", now="full", alternatives=tuple(steps)),
        Enumerated(name="history_length", now="30", alternatives=(lengths,)),
    )
    consent, length = nearest_flips(linear, at_plan_1, (), axes)
    assert (consent.to, consent.plan_index, consent.distance) == ("nothing", 2, 3.0)
    assert (length.axis, length.to, length.plan_index) == ("history_length", None, None)


def test_axes_hold_what_can_be_different_about_a_request(make_context: Callable[..., Context], scales: WeightScales) -> None:
    context = make_context(1, history_length=6.0, cache_age_events=2.0)
    continuous, enumerated = context_axes(context, scales, ContextConfig(), max_cache_age=20)
    assert {axis.field for axis in continuous} >= {"round_trip_ms", "uplink_kbps", "downlink_kbps", "free_memory_mb"}
    states = {axis.name: axis for axis in enumerated}
    assert states["link"].now == "lte"
    assert [each.label for each in states["link"].alternatives] == ["wifi", "3g", "edge", "offline"]
    assert states["link"].alternatives[0].changes["round_trip_ms"] == 15.0
    assert [each.label for each in states["cache_age_events"].alternatives] == ["1", "3", "4", "5"]  # below 6 events
    assert states["cache_level"].alternatives[0].changes == {"cache_level": 0, "cache_age_events": 0}
    assert states["history_length"].alternatives[0].label == "3"  # a cache of 2 events stays possible
    offline = replace(context, link=jnp.full((1,), int(Link.OFFLINE)))
    assert "round_trip_ms" not in {axis.field for axis in context_axes(offline, scales, ContextConfig(), max_cache_age=20)[0]}


def test_each_forbidden_plan_is_told_its_rules(make_context: Callable[..., Context]) -> None:
    context = make_context(4, cache_level=0.0, cache_age_events=0.0)
    context = replace(
        context,
        consent=jnp.asarray([3, 1, 3, 3]),
        link=jnp.asarray([1, 1, 4, 1]),
        free_memory_mb=jnp.asarray([1e4, 1e4, 1e4, 100.0]),
    )
    rules = {rule: np.asarray(found) for rule, found in forbidding_rules(context, allowed).items()}

    def told(row: int, plan: str) -> set[str]:
        return {rule for rule, found in rules.items() if found[row, plan_index(plan)]}

    assert told(0, "reuse-20-skip") == {"no kept embedding"}
    assert told(0, "fresh-full-500-device") == set()
    assert told(1, "fresh-recent-20-skip") == {"consent"}
    assert told(2, "fresh-profile-20-skip") == {"link down"}
    assert told(2, "reuse-20-skip") == {"link down", "no kept embedding"}
    assert told(3, "fresh-profile-20-device") == {"memory"}
    assert told(3, "local-skip-skip") == set()


def test_rules_explain_every_forbidden_plan_and_no_allowed_one(make_context: Callable[..., Context]) -> None:
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(4), np.arange(5), [32.0, 100.0, 200.0, 1000.0]), -1).reshape(-1, 4)
    context = replace(
        make_context(len(grid)),
        consent=jnp.asarray(grid[:, 0], jnp.int32),
        cache_level=jnp.asarray(grid[:, 1], jnp.int32),
        link=jnp.asarray(grid[:, 2], jnp.int32),
        free_memory_mb=jnp.asarray(grid[:, 3], jnp.float32),
    )
    rules = forbidding_rules(context, allowed)
    explained = np.any([np.asarray(rules[rule]) for rule in RULES], axis=0)
    np.testing.assert_array_equal(explained, ~np.asarray(allowed(context)))
    assert not np.asarray(rules[OTHER_RULE]).any()


def test_a_rule_of_someone_else_is_called_another(make_context: Callable[..., Context]) -> None:
    def only_on_high(context: Context) -> jnp.ndarray:
        return allowed(context) & ((context.tier == DeviceTier.HIGH)[:, None] | (jnp.arange(len(PLANS)) != 0)[None, :])

    rules = forbidding_rules(make_context(1), only_on_high)
    assert [rule for rule, found in rules.items() if np.asarray(found)[0, 0]] == [OTHER_RULE]


@pytest.mark.parametrize(
    ("value", "told"), [(40000.0, "40,000"), (1e6, "1,000,000"), (3811.4, "3,811"), (15.0, "15"), (3.743e-6, "3.743e-06")]
)
def test_large_numbers_are_told_without_an_exponent(value: float, told: str) -> None:
    assert in_figures(value, 4) == told
