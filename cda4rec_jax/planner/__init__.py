"""The planner: which agent does which sub-task of a request.

- ``plan_space``: the 32 plans, their features, what a context allows, repair.
- ``contexts``: what is known before a request, its distribution, its features.
- ``cost_profiles``: what sub-tasks cost, in a modelled deployment or as measured.
- ``costs``: time, energy, exposure and bytes of every plan.
- ``utility``: quality minus the price of costs; the scales of the prices.
- ``policy``: the learned planners. ``simple``: fixed, rules, random.
- ``relaxation``: masked probabilities and how training differentiates a choice.
- ``explain``: the terms of a decision.
"""

from cda4rec_jax.planner.contexts import (
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
from cda4rec_jax.planner.explain import Decision, PlanTerms, explain_decision
from cda4rec_jax.planner.plan_space import NUM_PLANS, PLANS, allowed, local_repair, plan_features, plan_index, repair
from cda4rec_jax.planner.policy import DirectPolicy, Planner, Policy, PolicyConfig
from cda4rec_jax.planner.relaxation import Objective, choice_weights, entropy, expected_utility, masked_softmax
from cda4rec_jax.planner.simple import FixedPlan, RandomPlanner, RulesPlanner, fixed_planners
from cda4rec_jax.planner.utility import WeightScales, plan_quality, realised_utility, utility

__all__ = [
    "NUM_PLANS",
    "PLANS",
    "ContextConfig",
    "CostProfile",
    "Decision",
    "DirectPolicy",
    "FixedPlan",
    "MeasuredTimes",
    "Objective",
    "PayloadSizes",
    "PlanCosts",
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
    "choice_weights",
    "context_features",
    "deployment_profile",
    "entropy",
    "expected_utility",
    "explain_decision",
    "fixed_planners",
    "local_repair",
    "masked_softmax",
    "measured_profile",
    "plan_bytes",
    "plan_costs",
    "plan_features",
    "plan_index",
    "plan_quality",
    "predicted_transfer",
    "realised_utility",
    "repair",
    "sample_contexts",
    "subtask_ms",
    "typical_contexts",
    "user_facts",
    "utility",
]
