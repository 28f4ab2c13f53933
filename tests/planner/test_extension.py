"""Planners from elsewhere: what they add, what is refused, and what a run remembers of them."""

import sys

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import DeviceTier, EgressLevel, Placement
from cda4rec_jax.planner import (
    STANDARD,
    ContextConfig,
    DirectPolicy,
    FixedPlan,
    LearnedPlanner,
    OwnPlanner,
    PayloadSizes,
    PlanSpace,
    Policy,
    PolicyConfig,
    RandomPlanner,
    RulesPlanner,
    allowed,
    choose,
    cloud_plan,
    deployment_profile,
    explain_decision,
    fresh_plan,
    local_repair,
    masked_softmax,
    permitted,
    plan_costs,
    realised_utility,
    repair,
    reuse_plan,
    sample_contexts,
    utility,
)
from tests.planner.own_planner import OWN_PLANS, Defiant, Priced, candidates_sent

HERE = "tests.planner.own_planner"
CONFIG = PolicyConfig()
EXPOSURE = jnp.asarray([0.0, 0.1, 0.3, 0.8])


@pytest.fixture(scope="module")
def space() -> PlanSpace:
    return OwnPlanner.find(f"{HERE}:Priced", CONFIG).space


def costs_of(context, space):
    return plan_costs(deployment_profile(), context, EXPOSURE, PayloadSizes(), None, space)


def test_own_plans_stand_after_the_standard_ones_under_names_of_their_own(space):
    assert space.plans == (*STANDARD.plans, *OWN_PLANS)
    assert space.names[32:] == ("fresh-recent-50-device", "reuse-300-skip", "cloud-full-50-skip")
    assert space.last_resort == STANDARD.last_resort and space.term_names == ("candidates_sent",)
    np.testing.assert_array_equal(space.features[:32], STANDARD.features)
    assert len(np.unique(space.features, axis=0)) == space.num_plans
    assert space.max_candidates == STANDARD.max_candidates


def test_a_space_is_a_value():
    first, again = (PlanSpace(plans=(*STANDARD.plans, *OWN_PLANS[:count])) for count in (2, 2))
    assert first == again and hash(first) == hash(again) and first != STANDARD
    assert PlanSpace(cost_terms=(candidates_sent,)) != STANDARD


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([fresh_plan(EgressLevel.RECENT, 100, Placement.SKIP)], "several plans have the name fresh-recent-100-skip"),
        ([fresh_plan(EgressLevel.RECENT, 10, Placement.SKIP)], "num_candidates must be a whole number from 20 to 500"),
        ([fresh_plan(EgressLevel.NOTHING, 50, Placement.SKIP)], "level must be PROFILE, RECENT or FULL"),
        ([fresh_plan(EgressLevel.FULL, 50, Placement.CLOUD)], "structured CLOUD needs level FULL and ranking CLOUD"),
        ([fresh_plan(EgressLevel.FULL, 50, Placement.REUSE)], "structured must be DEVICE, CLOUD or SKIP"),
        ([cloud_plan(EgressLevel.RECENT, 50, Placement.CLOUD)], "structured CLOUD needs level FULL"),
        (
            [cloud_plan(EgressLevel.RECENT, 50, Placement.DEVICE)],
            "ranking CLOUD needs semantic CLOUD, and structured CLOUD or SKIP",
        ),
        ([fresh_plan(EgressLevel.FULL, k, Placement.SKIP) for k in range(101, 400)], "331 plans are more than 255"),
    ],
)
def test_plans_that_cannot_be_run_or_told_apart_are_refused(plans, message):
    with pytest.raises(UserError, match=message):
        PlanSpace(plans=(*STANDARD.plans, *plans))


def test_a_space_without_the_standard_plans_is_refused():
    with pytest.raises(UserError, match="the first 32 plans are not the standard ones"):
        PlanSpace(plans=OWN_PLANS)


def test_costs_lie_on_the_line_between_the_counts_that_are_known_and_those_of_standard_plans_stay(space, make_context):
    context = make_context(2)
    own, standard = costs_of(context, space), costs_of(context, STANDARD)
    for name in ("latency_ms", "energy_mj", "exposure", "uplink_bytes", "downlink_bytes"):
        np.testing.assert_array_equal(np.asarray(getattr(own, name))[:, :32], getattr(standard, name))
    for field in ("latency_ms", "energy_mj", "downlink_bytes"):
        values = np.asarray(getattr(own, field))[0]
        for name, low, high, share in (("fresh-recent-50-device", 20, 100, 3 / 8), ("reuse-300-skip", 100, 500, 1 / 2)):
            below, above = (values[space.index(name.replace(name.split("-")[-2], str(count)))] for count in (low, high))
            assert values[space.index(name)] == pytest.approx((1 - share) * below + share * above, rel=1e-5)


def test_own_plans_are_masked_and_repaired_as_their_kind_is(space, make_context):
    context = make_context(1, consent=EgressLevel.PROFILE, cache_level=EgressLevel.PROFILE)
    mask = allowed(context, space)
    wanted = jnp.asarray([space.index(plan.name) for plan in OWN_PLANS])
    assert np.asarray(mask)[0, np.asarray(wanted)].tolist() == [False, True, False]
    answers = [space.names[i] for i in repair(wanted, jnp.broadcast_to(mask, (3, space.num_plans)), space)]
    assert answers == ["fresh-profile-20-device", "reuse-300-skip", "reuse-20-skip"]
    local = np.asarray(local_repair(mask, space))[0]
    assert [space.names[i] for i in local[32:]] == ["local-reuse-device", "local-reuse-skip", "local-reuse-skip"]


def test_an_own_cost_is_subtracted_once_wherever_utility_is(space, make_context):
    context = make_context(2, tier=DeviceTier.LOW)
    costs = costs_of(context, space)
    plain = costs_of(context, PlanSpace(plans=space.plans))
    quality, mask = jnp.full((2, space.num_plans), 0.5), allowed(context, space)
    price = 2e-3 * space.table.candidates * space.table.uses_link
    worked, failed = jnp.zeros(2, bool), jnp.ones(2, bool)
    for function in (
        utility,
        lambda *given: realised_utility(*given, failed=worked, mask=mask),
        lambda *given: realised_utility(*given, failed=failed, mask=mask),
    ):
        difference = np.asarray(function(quality, plain, context) - function(quality, costs, context))
        np.testing.assert_allclose(difference, np.broadcast_to(price, difference.shape), atol=1e-5)


@pytest.fixture(scope="module")
def planners(space) -> dict:
    made = {
        "policy": Priced(CONFIG, space=space, rngs=nnx.Rngs(0)),
        "direct": DirectPolicy(CONFIG, space=space, rngs=nnx.Rngs(1)),
    }
    made["defiant"] = Defiant(CONFIG, space=space, rngs=nnx.Rngs(2))
    fixed = {plan.name: FixedPlan(space.index(plan.name)) for plan in OWN_PLANS}
    return made | {"rules": RulesPlanner(), "random": RandomPlanner()} | fixed


def test_forbidden_plans_stay_at_probability_0_with_own_plans_among_them(space, planners, facts, scales):
    @jax.jit
    def decide(draw):
        context = sample_contexts(facts, jnp.arange(4000), scales, draw, ContextConfig())
        mask, costs = allowed(context, space), costs_of(context, space)
        logits = {name: planner.logits(context, costs, mask) for name, planner in planners.items()}
        chosen = {name: choose(each, mask, space) for name, each in logits.items()}
        sure = {name: masked_softmax(each, mask) for name, each in logits.items() if name != "defiant"}
        return mask, sure, chosen

    for draw in range(3):
        mask, chances, chosen = decide(draw)
        assert np.asarray(mask)[:, 32:].any(axis=0).all() and not np.asarray(mask)[:, 32:].all()
        for name, values in chances.items():
            assert (np.asarray(values)[~np.asarray(mask)] == 0.0).all(), name
            np.testing.assert_allclose(np.asarray(values).sum(axis=1), 1.0, atol=1e-5)
        for name, indices in chosen.items():
            assert np.take_along_axis(np.asarray(mask), np.asarray(indices)[:, None], axis=1).all(), name


def test_a_decision_shows_the_own_cost_and_a_planner_without_quality_is_not_taken_apart(space, planners, make_context):
    context = make_context(1)
    costs, mask = costs_of(context, space), allowed(context, space)
    policy, own = planners["policy"], space.index("fresh-recent-50-device")
    quality = jnp.linspace(0, 1, space.num_plans)[None]
    logits = permitted(policy.logits(context, costs, mask), mask)
    told = explain_decision(logits, quality, costs, context, tau=0.1, chosen=own)
    assert told.chosen.name == "fresh-recent-50-device" and told.runner_up is not None
    assert told.chosen.own == {"candidates_sent": pytest.approx(-0.05)}
    assert told.chosen.utility == pytest.approx(float(utility(quality, costs, context)[0, own]), abs=1e-5)
    silent = explain_decision(planners["direct"].logits(context, costs, mask), None, costs, context, tau=None)
    assert silent.chosen.quality is silent.chosen.utility is silent.margin is silent.tau is None
    assert silent.runner_up is not None and silent.chosen.logit > silent.runner_up.logit
    assert silent.chosen.time < 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("own_planner", "names no class: expected package.module:Class"),
        ("../own_planner.py:Priced", "names no class: expected package.module:Class"),
        ("nowhere.planner:Priced", "there is no module 'nowhere'; start from the folder that holds it, or install its package"),
        (f"{HERE}:Prised", "has no Prised; did you mean Priced?"),
        (f"{HERE}:not_a_class", "it is no subclass of cda4rec_jax.planner.LearnedPlanner"),
        (f"{HERE}:NoLogits", r"it lacks logits\(self, context, costs, mask\)"),
        (f"{HERE}:OtherArguments", r"cannot be made as Class\(config, space=space, rngs=rngs\)"),
        (f"{HERE}:ListOfNames", "plans must be a tuple of cda4rec_jax.messages.Plan"),
        (f"{HERE}:Repeated", "several plans have the name fresh-recent-100-device"),
        (f"{HERE}:Impossible", "fresh-recent-1000-cloud: num_candidates must be a whole number from 20 to 500"),
        (f"{HERE}:Nameless", "write each as a function with a name of its own"),
        (f"{HERE}:OneNumber", r"cost term one_price has shape \(2,\), expected .* \(2, 32\)"),
        (f"{HERE}:StandardPlansOnly", r"logits gives \(2, 32\) for 2 requests, expected \(2, 35\)"),
        (f"{HERE}:OneTerm", r"loyalty gives \(2,\) for 2 requests, expected \(2, 32\)"),
        (f"{HERE}:Broken", "it fails on a batch of 2 requests and 32 plans with TypeError"),
    ],
)
def test_what_is_wrong_with_a_class_is_said(target, message):
    with pytest.raises(UserError, match=message):
        OwnPlanner.find(target, CONFIG)


def test_a_module_that_fails_is_told_from_one_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "failing_planner.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match="importing failing_planner failed with ModuleNotFoundError: No module named 'no_such_package'"
    ):
        OwnPlanner.find("failing_planner:Any", CONFIG)
    assert "failing_planner" not in sys.modules


def test_what_is_stored_of_a_planner_is_read_again_and_held_against_the_class(space):
    stored = OwnPlanner.find(f"{HERE}:Priced", CONFIG)
    again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(stored)), OwnPlanner)
    assert again == stored and again.load() is Priced and again.space is space
    other = OwnPlanner(
        target=stored.target, plans=(*stored.plans[:2], reuse_plan(60, Placement.SKIP)), cost_terms=stored.cost_terms
    )
    with pytest.raises(UserError, match=r"has the plans .*cloud-full-50-skip, and the run was trained with .*reuse-60-skip"):
        other.load()
    with pytest.raises(UserError, match=r"has the cost terms candidates_sent, and the run was trained with \(none\)"):
        OwnPlanner(target=stored.target, plans=stored.plans).load()


def test_our_policies_are_learned_planners_that_need_no_space():
    assert all(issubclass(kind, LearnedPlanner) for kind in (Policy, DirectPolicy))
    assert Policy(CONFIG, rngs=nnx.Rngs(0)).space is STANDARD
