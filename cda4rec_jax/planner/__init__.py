"""The planner: which agent does which sub-task of a request.

- ``plan_space``: the 32 standard plans and those of a user's own, their features, what a context allows, repair.
- ``contexts``: what is known before a request, its distribution, its features.
- ``cost_profiles``: what sub-tasks cost, in a modelled deployment or as measured.
- ``costs``: time, energy, exposure and bytes of every plan.
- ``utility``: quality minus the price of costs; the scales of the prices.
- ``policy``: the learned planners. ``simple``: fixed, rules, random. ``extension``: a planner from elsewhere.
- ``scheduling``: a planner that spends a number of cloud calls where they gain most.
- ``relaxation``: masked probabilities and how training differentiates a choice.
- ``explain``: the terms of a decision. ``counterfactual``: what would change it.
"""

from cda4rec_jax.planner.contexts import (
    NUM_CONTEXT_FEATURES,
    ContextConfig,
    UserFacts,
    context_features,
    sample_contexts,
    typical_contexts,
    user_facts,
)
from cda4rec_jax.planner.cost_profiles import CostProfile, MeasuredTimes, Workload, deployment_profile, measured_profile
from cda4rec_jax.planner.costs import (
    PayloadSizes,
    PlanCosts,
    TransferTimes,
    plan_bytes,
    plan_costs,
    predicted_transfer,
    subtask_ms,
)
from cda4rec_jax.planner.explain import Decision, PlanTerms, explain_decision, ranked_terms
from cda4rec_jax.planner.extension import OwnPlanner, blank_requests
from cda4rec_jax.planner.plan_space import (
    CACHED_CANDIDATES,
    NEIGHBOUR_EVENTS,
    NUM_PLANS,
    OWN_CANDIDATES,
    PLANS,
    RESIDENT_CANDIDATES,
    STANDARD,
    CostTerm,
    PlanSpace,
    allowed,
    cloud_plan,
    fresh_plan,
    local_repair,
    plan_index,
    repair,
    reuse_plan,
)
from cda4rec_jax.planner.policy import (
    DirectPolicy,
    LearnedPlanner,
    Planner,
    Policy,
    PolicyConfig,
    check_scores,
    choose,
    permitted,
)
from cda4rec_jax.planner.relaxation import Objective, choice_weights, entropy, expected_utility, masked_softmax
from cda4rec_jax.planner.simple import FixedPlan, RandomPlanner, RulesPlanner, fixed_planners
from cda4rec_jax.planner.utility import WeightScales, cost_in_utility, expected_regret, plan_quality, realised_utility, utility

__all__ = [
    "CACHED_CANDIDATES",
    "NEIGHBOUR_EVENTS",
    "NUM_CONTEXT_FEATURES",
    "NUM_PLANS",
    "OWN_CANDIDATES",
    "PLANS",
    "RESIDENT_CANDIDATES",
    "STANDARD",
    "ContextConfig",
    "CostProfile",
    "CostTerm",
    "Decision",
    "DirectPolicy",
    "FixedPlan",
    "LearnedPlanner",
    "MeasuredTimes",
    "Objective",
    "OwnPlanner",
    "PayloadSizes",
    "PlanCosts",
    "PlanSpace",
    "PlanTerms",
    "Planner",
    "Policy",
    "PolicyConfig",
    "RandomPlanner",
    "RulesPlanner",
    "TransferTimes",
    "UserFacts",
    "WeightScales",
    "Workload",
    "allowed",
    "blank_requests",
    "check_scores",
    "choice_weights",
    "choose",
    "cloud_plan",
    "context_features",
    "cost_in_utility",
    "deployment_profile",
    "entropy",
    "expected_regret",
    "expected_utility",
    "explain_decision",
    "fixed_planners",
    "fresh_plan",
    "local_repair",
    "masked_softmax",
    "measured_profile",
    "permitted",
    "plan_bytes",
    "plan_costs",
    "plan_index",
    "plan_quality",
    "predicted_transfer",
    "ranked_terms",
    "realised_utility",
    "repair",
    "reuse_plan",
    "sample_contexts",
    "subtask_ms",
    "typical_contexts",
    "user_facts",
    "utility",
]
