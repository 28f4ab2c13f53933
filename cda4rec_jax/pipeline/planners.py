"""Planners that are computed from outcomes instead of learned: plug-in means, and the cross-fitted context oracle."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array, PlanLogits, PlanMask
from cda4rec_jax.messages import Context, EgressLevel
from cda4rec_jax.planner import STANDARD, PlanCosts, PlanSpace
from cda4rec_jax.planner.utility import cost_in_utility

# Upper edges of the cells of the context oracle; the last cell of each is open.
LENGTH_EDGES = (5, 10, 20, 50, 100, 200)
AGE_EDGES = (0, 1, 2, 4, 8)  # of the cache, in events; 0 is no cache
NUM_LENGTHS = len(LENGTH_EDGES) + 1
CELLS_PER_LENGTH = (len(AGE_EDGES) + 1) * len(EgressLevel)

PRIOR_REQUESTS = 50.0  # requests that a cell needs before its own mean weighs as much as that of its length


@dataclass(frozen=True, kw_only=True)
class PlugIn:
    """argmax_p [quality_p - w . c_p(context)]: it knows what plans are worth on average, and what they cost here.

    With one row of ``quality`` that is the plug-in planner, which learns nothing of the context but its costs. With a row for
    each request (``cross_fitted_quality``) it is the context oracle.
    """

    quality: Float[Array, "#b p"]

    def logits(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        """Expected utility [b, p]; -inf where ``mask`` is False."""
        return jnp.where(mask, self.quality - cost_in_utility(costs, context), -jnp.inf)


def possible_plans(context: Context, space: PlanSpace = STANDARD) -> PlanMask:
    """Plans whose outcome means something in this context, [b, p]: those that reuse a cached embedding need one.

    Consent, link and memory are left out: they forbid a plan, and its outcome is the same without them. So means over these
    requests are means over what a mask would leave, with less noise.
    """
    has_cache = np.asarray(context.cache_level) > EgressLevel.NOTHING
    return ~space.table.semantic_reuse[None, :] | has_cache[:, None]


def mean_quality(quality: Float[Array, "n p"], counted: Bool[Array, "n p"]) -> Float[np.ndarray, "p"]:
    """Mean quality of each plan over the requests that count for it; 0 for a plan without any."""
    return _means(quality, counted, np.zeros(len(quality), np.int64), np.zeros((1, quality.shape[1])), 0.0)[0]


def context_cells(context: Context) -> Int[np.ndarray, "b"]:
    """Cell of each request: history length x age of the cache x consent, with the length as the slowest part."""
    length = np.searchsorted(LENGTH_EDGES, np.asarray(context.history_length))
    age = np.searchsorted(AGE_EDGES, np.asarray(context.cache_age_events))
    return (length * (len(AGE_EDGES) + 1) + age) * len(EgressLevel) + np.asarray(context.consent)


def cross_fitted_quality(
    quality: Float[Array, "n p"], counted: Bool[Array, "n p"], cells: Int[Array, "n"], folds: Int[Array, "n"]
) -> Float[np.ndarray, "n p"]:
    """Quality of every plan that each request's cell has on the *other* fold of users.

    Cell means are shrunk towards the mean of their history length, and these towards the mean of all (``PRIOR_REQUESTS``), since
    the argmax over plans falls for noise.

    Args:
        quality: realised quality of every plan.
        counted: ``possible_plans`` of the requests.
        cells: ``context_cells`` of the requests.
        folds: 0 or 1, by user.
    """
    found = np.zeros(quality.shape, np.float32)
    for fold in (0, 1):
        rows = folds == fold
        overall = mean_quality(quality[rows], counted[rows])
        prior = np.broadcast_to(overall, (NUM_LENGTHS, len(overall)))
        by_length = _means(quality[rows], counted[rows], cells[rows] // CELLS_PER_LENGTH, prior, PRIOR_REQUESTS)
        prior = np.repeat(by_length, CELLS_PER_LENGTH, axis=0)
        by_cell = _means(quality[rows], counted[rows], cells[rows], prior, PRIOR_REQUESTS)
        found[~rows] = by_cell[cells[~rows]]
    return found


def _means(
    values: Float[Array, "n p"], counted: Bool[Array, "n p"], groups: Int[Array, "n"], prior: Float[Array, "g p"], weight: float
) -> Float[np.ndarray, "g p"]:
    """Mean of each group, with ``weight`` further requests at the ``prior``; 0 where there is nothing at all."""
    total, count = weight * np.asarray(prior, np.float64), np.full(prior.shape, weight)
    np.add.at(total, groups, np.where(counted, values, 0.0))
    np.add.at(count, groups, counted.astype(np.float64))
    return np.where(count > 0, total / np.maximum(count, 1e-9), 0.0)
