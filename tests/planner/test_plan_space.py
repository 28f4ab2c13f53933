import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel, Link, Placement
from cda4rec_jax.planner import (
    NUM_PLANS,
    PLANS,
    STANDARD,
    PlanSpace,
    allowed,
    cloud_plan,
    fresh_plan,
    local_repair,
    plan_index,
    repair,
)


def allowed_names(context) -> set[str]:
    return {PLANS[i].name for i in np.flatnonzero(np.asarray(allowed(context))[0])}


def repaired(name: str, context) -> str:
    return PLANS[int(repair(jnp.asarray([plan_index(name)]), allowed(context))[0])].name


def test_there_are_32_plans_with_unique_names_in_the_declared_order():
    names = [plan.name for plan in PLANS]
    assert len(set(names)) == NUM_PLANS == 32
    assert names[:3] == ["fresh-profile-20-device", "fresh-profile-20-skip", "fresh-profile-100-device"]
    assert names[18] == "reuse-20-device"
    assert names[24:] == [
        "local-reuse-device",
        "local-reuse-skip",
        "local-skip-device",
        "local-skip-skip",
        "cloud-profile-skip",
        "cloud-recent-skip",
        "cloud-full-skip",
        "cloud-full-cloud",
    ]


def test_features_tell_every_plan_apart_and_lie_between_0_and_1():
    features = STANDARD.features
    assert len(np.unique(features, axis=0)) == NUM_PLANS
    assert features.min() >= 0 and features.max() <= 1


def test_an_unknown_plan_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"'fresh-100'.*reuse-100-device"):
        plan_index("fresh-100")


def test_everything_is_allowed_with_full_consent_a_cache_a_link_and_memory(make_context):
    assert len(allowed_names(make_context(1))) == NUM_PLANS


def test_consent_masks_fresh_and_cloud_plans_above_it(make_context):
    names = allowed_names(make_context(1, consent=EgressLevel.RECENT))
    assert "fresh-recent-100-device" in names and "cloud-recent-skip" in names
    assert not any("full" in name for name in names)


def test_a_cache_made_above_consent_may_be_used_on_the_device_only(make_context):
    names = allowed_names(make_context(1, consent=EgressLevel.PROFILE, cache_level=EgressLevel.FULL))
    assert not any(name.startswith("reuse") for name in names)
    assert "local-reuse-device" in names


def test_without_consent_nothing_uses_the_link(make_context):
    names = allowed_names(make_context(1, consent=EgressLevel.NOTHING))
    assert names == {"local-reuse-device", "local-reuse-skip", "local-skip-device", "local-skip-skip"}


def test_without_a_cache_nothing_is_reused(make_context):
    names = allowed_names(make_context(1, cache_level=EgressLevel.NOTHING))
    assert not any("reuse" in name for name in names)


def test_offline_leaves_local_plans(make_context):
    assert all(name.startswith("local") for name in allowed_names(make_context(1, link=Link.OFFLINE)))


def test_memory_masks_structured_modelling_on_the_device_and_500_candidates(make_context):
    names = allowed_names(make_context(1, free_memory_mb=100.0))
    assert not any(name.endswith("device") for name in names)
    assert "fresh-full-500-skip" in names
    assert not any("500" in name for name in allowed_names(make_context(1, free_memory_mb=63.0)))
    both = allowed_names(make_context(1, free_memory_mb=200.0))
    assert "fresh-full-100-device" in both and "fresh-full-500-device" not in both


def test_many_candidates_that_the_cloud_ranks_need_no_memory_on_the_device():
    own = (cloud_plan(EgressLevel.FULL, 500, Placement.SKIP), fresh_plan(EgressLevel.FULL, 400, Placement.SKIP))
    assert PlanSpace(plans=(*PLANS, *own)).table.memory_mb[NUM_PLANS:].tolist() == [0.0, 64.0]


def test_the_last_resort_is_allowed_whatever_the_context_says(make_context):
    context = make_context(1, consent=0, cache_level=0, link=Link.OFFLINE, free_memory_mb=float("nan"))
    assert allowed_names(context) == {"local-skip-skip"}


@pytest.mark.parametrize(
    ("wanted", "fields", "expected"),
    [
        ("fresh-full-100-device", {}, "fresh-full-100-device"),
        ("fresh-full-100-device", {"consent": EgressLevel.PROFILE}, "fresh-profile-100-device"),
        ("fresh-full-500-device", {"free_memory_mb": 200.0}, "fresh-full-100-device"),
        ("fresh-full-500-device", {"free_memory_mb": 100.0}, "fresh-full-500-skip"),
        ("fresh-full-100-device", {"link": Link.OFFLINE}, "local-reuse-device"),
        ("fresh-full-100-device", {"link": Link.OFFLINE, "cache_level": 0}, "local-skip-device"),
        ("fresh-full-100-device", {"link": Link.OFFLINE, "cache_level": 0, "free_memory_mb": 9.0}, "local-skip-skip"),
        ("cloud-full-cloud", {"consent": EgressLevel.RECENT}, "cloud-recent-skip"),
        ("cloud-full-cloud", {"link": Link.OFFLINE}, "local-reuse-device"),
        ("reuse-500-device", {"free_memory_mb": 200.0}, "reuse-100-device"),
        ("reuse-100-skip", {"cache_level": 0}, "local-skip-skip"),
        ("local-reuse-device", {"cache_level": 0}, "local-skip-device"),
    ],
)
def test_repair_lowers_the_level_then_reuses_then_stays_local(make_context, wanted, fields, expected):
    assert repaired(wanted, make_context(1, **fields)) == expected


def test_reuse_comes_between_fresh_and_local():
    order = [PLANS[i].name for i in STANDARD.repair_order[plan_index("fresh-recent-100-device")]]
    assert order.index("fresh-profile-20-skip") < order.index("reuse-100-device") < order.index("local-reuse-device")
    assert not any(name.startswith(("cloud", "fresh-full")) or "500" in name for name in order)


def test_no_repair_adds_structured_modelling_or_uses_a_link_that_was_not_wanted():
    for wanted in PLANS:
        for index in STANDARD.repair_order[plan_index(wanted.name)]:
            other = PLANS[index]
            assert wanted.uses_link or not other.uses_link
            assert wanted.structured is not Placement.SKIP or other.structured is Placement.SKIP


def test_the_local_repair_of_each_plan_uses_no_link_and_keeps_structured_modelling_where_it_can(make_context):
    answers = np.asarray(local_repair(allowed(make_context(1))))[0]
    assert not any(PLANS[i].uses_link for i in answers)
    assert PLANS[answers[plan_index("fresh-full-500-device")]].name == "local-reuse-device"
    assert PLANS[answers[plan_index("fresh-full-500-skip")]].name == "local-reuse-skip"
    assert PLANS[answers[plan_index("local-skip-device")]].name == "local-skip-device"
