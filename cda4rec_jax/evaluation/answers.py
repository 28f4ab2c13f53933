"""What planners answer: every planner chooses for every request, and gets what then really happens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from cda4rec_jax.array_typing import Array, PlanLogits, PlanMask, PlanRanks, PlanValues
from cda4rec_jax.evaluation.accuracy import METRICS
from cda4rec_jax.messages import Context
from cda4rec_jax.pipeline.decisions import Requests
from cda4rec_jax.pipeline.full_ranking import in_batches
from cda4rec_jax.pipeline.planners import PlugIn, context_cells, cross_fitted_quality, possible_plans
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.planner import STANDARD, PlanCosts, PlanSpace, choose, local_repair, realised_utility, repair
from cda4rec_jax.planner.utility import FAILURE_TIMEOUT_MS

BLOCK_USERS = 256  # whose contexts are planned at once, so that memory is bounded
Logits = Callable[[Context, PlanCosts, PlanMask], PlanLogits]  # the ``logits`` of a planner
PLUG_IN, ORACLE, HINDSIGHT = "plug-in", "context-oracle", "hindsight"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of ``q`` planners to ``n`` users in ``draws`` contexts each. NumPy arrays."""

    names: tuple[str, ...]
    choices: UInt8[np.ndarray, "q draws n"]  # wanted plan, after repair
    latency_ms: Float[np.ndarray, "q draws n"]
    per_user: dict[str, Float[np.ndarray, "q n"]]  # means over a user's contexts, by name of the quantity
    space: PlanSpace = STANDARD  # that was chosen from

    @property
    def fixed_names(self) -> tuple[str, ...]:
        """Names of the fixed plans, which come first."""
        return fixed_names(self.space)

    def of(self, name: str, quantity: str) -> Float[np.ndarray, "n"]:
        """One quantity of one planner for every user."""
        return self.per_user[quantity][self.names.index(name)]


def fixed_name(plan_name: str) -> str:
    """Name of the planner that always wants this plan."""
    return f"fixed {plan_name}"


def fixed_names(space: PlanSpace = STANDARD) -> tuple[str, ...]:
    """Names of the planners that always want one plan of the space."""
    return tuple(fixed_name(name) for name in space.names)


def answer(
    records: PlanRecords, planners: Mapping[str, Logits], plug_in_means: Float[np.ndarray, "p"], *, seed: int = 0
) -> Answers:
    """Answers of every fixed plan with repair, of ``planners``, of plug-in, of the context oracle, and in hindsight.

    ``planners`` maps names to the ``logits`` of planners. They see contexts, masks and predicted costs; what they get is
    realised: where the link fails, a local plan answers after a timeout. Plug-in takes ``plug_in_means`` for the quality of each
    plan; the cross-fitted context oracle estimates it on one half of these users and is scored on the other; ``seed`` draws the
    halves. The hindsight optimum knows what will be realised, so nothing can exceed it.
    """
    num_users, space = len(records.users), records.requests.predicted.space
    oracle = oracle_quality(records, seed)
    means, logits = jnp.asarray(plug_in_means, jnp.float32)[None], tuple(planners.values())
    blocks = []
    for index in in_batches(num_users, min(BLOCK_USERS, num_users)):
        requests = jax.tree.map(lambda leaf, index=index: leaf[:, index], records.requests)
        found = _play(requests, records.quality[index], records.ranks[index], (means, oracle[index]), planners=logits)
        size = len(np.unique(index))
        blocks.append(jax.tree.map(lambda leaf, size=size: np.asarray(leaf)[..., :size], found))
    choices, latency_ms, per_user = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *blocks)
    names = (*fixed_names(space), *planners, PLUG_IN, ORACLE, HINDSIGHT)
    return Answers(names=names, choices=choices, latency_ms=latency_ms, per_user=per_user, space=space)


def oracle_quality(records: PlanRecords, seed: int = 0) -> Float[np.ndarray, "n p"]:
    """What the cross-fitted context oracle believes of each user's request; ``seed`` draws the halves of the users."""
    first = jax.tree.map(lambda leaf: leaf[0], records.requests.context)
    folds = np.random.default_rng(seed).permutation(len(records.users)) % 2
    return cross_fitted_quality(
        records.quality, possible_plans(first, records.requests.predicted.space), context_cells(first), folds
    )


@partial(jax.jit, static_argnames="planners")
def _play(
    requests: Requests,
    quality: PlanValues,
    ranks: PlanRanks,
    estimates: tuple[Float[Array, "#n p"], ...],
    *,
    planners: tuple[Logits, ...],
) -> tuple[Array, Array, dict[str, Array]]:
    """Choices and latency [q, draws, n], and means over contexts [q, n]; one planner more for each of the quality ``estimates``."""
    (draws, num_users), space = requests.failed.shape, requests.predicted.space
    flat = jax.tree.map(lambda leaf: leaf.reshape(draws * num_users, *leaf.shape[2:]), requests)
    quality, ranks = (jnp.tile(values, (draws, 1)) for values in (quality, ranks))
    plug_ins = [
        PlugIn(quality=jnp.tile(jnp.broadcast_to(values, (num_users, space.num_plans)), (draws, 1))) for values in estimates
    ]
    context, mask = flat.context, flat.mask
    gained = _gained(flat, quality)

    fixed = jax.vmap(lambda plan: repair(jnp.broadcast_to(plan, flat.failed.shape), mask, space))(jnp.arange(space.num_plans))
    scores = [logits(context, flat.predicted, mask) for logits in (*planners, *(plug_in.logits for plug_in in plug_ins))]
    scores.append(jnp.where(mask, gained, -jnp.inf))
    choices = jnp.concatenate([fixed, jnp.stack([choose(score, mask, space) for score in scores])])

    quantities = happened(flat, quality, ranks, choices)

    def by_draw(values: Array) -> Array:
        return values.reshape(-1, draws, num_users)

    means = {name: by_draw(values).mean(axis=1) for name, values in quantities.items()}
    return by_draw(choices).astype(jnp.uint8), by_draw(quantities["latency_ms"]), means


def happened(
    requests: Requests, quality: PlanValues, ranks: PlanRanks, choices: Int[Array, "q b"]
) -> dict[str, Float[Array, "q b"]]:
    """What ``q`` choices of a plan for each of ``b`` requests really bring, by name of the quantity; jittable."""

    def chosen(values: PlanValues | PlanRanks) -> Array:
        return jnp.take_along_axis(values, choices.T, axis=1).T

    space = requests.predicted.space
    answering = jnp.where(_link_fails(requests), local_repair(requests.mask, space), jnp.arange(space.num_plans)[None, :])
    answered_ranks = chosen(jnp.take_along_axis(ranks, answering, axis=1))
    uplink_bytes = chosen(requests.realised.uplink_bytes)
    return {
        "utility": chosen(_gained(requests, quality)),
        "latency_ms": chosen(happened_latency_ms(requests)),
        "energy_mj": chosen(requests.realised.energy_mj),
        "exposure": chosen(requests.realised.exposure),
        "uplink_bytes": uplink_bytes,
        "downlink_bytes": chosen(requests.realised.downlink_bytes),
        "cloud_calls": (uplink_bytes > 0).astype(jnp.float32),
        **{name: metric(answered_ranks) for name, metric in METRICS.items()},
    }


def _gained(requests: Requests, quality: PlanValues) -> PlanValues:
    """Realised utility of every plan, [b, p]."""
    return realised_utility(quality, requests.realised, requests.context, failed=requests.failed, mask=requests.mask)


def _link_fails(requests: Requests) -> Array:
    """True at [b, p] where the plan's link fails in this request."""
    return requests.failed[:, None] & jnp.asarray(requests.realised.space.table.uses_link)[None, :]


def happened_latency_ms(requests: Requests) -> PlanValues:
    """Latency of every plan [b, p] as ``realised_utility`` counts it: a failed link costs a timeout and then a local answer."""
    latency_ms = jnp.asarray(requests.realised.latency_ms)
    local_ms = jnp.take_along_axis(latency_ms, local_repair(requests.mask, requests.realised.space), axis=1)
    return jnp.where(_link_fails(requests), FAILURE_TIMEOUT_MS + local_ms, latency_ms)
