"""Schedulers of cloud calls in a replay: at fixed times, or where a planner finds a call worth its price (``planner/scheduling.py``)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array, PlanLogits, PlanMask
from cda4rec_jax.evaluation.replay import ReplayRecords
from cda4rec_jax.messages import Context, EgressLevel
from cda4rec_jax.pipeline.decisions import Requests
from cda4rec_jax.planner import LearnedPlanner, PlanCosts, choose, plan_quality, repair
from cda4rec_jax.planner.scheduling import QualityByAge, worth_to_later_requests

SEARCH_STEPS = 14
MAX_PRICE = 1.0  # no answer is worth more
Worth = Callable[[Context, PlanCosts, PlanMask], PlanLogits]  # what each plan is worth to this request alone, in units of quality


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One plan where the schedule says so and another elsewhere, both repaired where they are not allowed."""

    calls: Bool[np.ndarray, "steps rows"]
    calling_plan: int
    other_plan: int

    def choose(self, requests: Requests, step: int) -> Int[Array, "b"]:
        """The scheduled plan of each request."""
        wanted = jnp.where(jnp.asarray(self.calls[step]), self.calling_plan, self.other_plan)
        return repair(wanted, requests.mask, requests.predicted.space)


def evenly_spaced(steps: int, rate: float, phases: Float[np.ndarray, "rows"]) -> Bool[np.ndarray, "steps rows"]:
    """A call every ``1 / rate`` requests: t is one where floor(rate (t + 1) + phase) exceeds floor(rate t + phase)."""
    counted = np.floor(rate * np.arange(steps + 1)[:, None] + phases[None, :] + 1e-9)
    return np.diff(counted, axis=0) > 0


@dataclass(frozen=True, kw_only=True)
class Priced:
    """argmax_p [worth_p - price (p uses the link) + freshness of the cache that p leaves].

    With ``freshness`` of zeros it looks at this request alone. ``freshness_values`` adds what a renewed cache is worth to later ones.
    """

    worth: Worth
    price: float
    freshness: Float[np.ndarray, "consents levels ages"]

    def choose(self, requests: Requests, step: int) -> Int[Array, "b"]:
        """The best plan of each request."""
        del step
        return _best_plans(requests, jnp.asarray(self.price), jnp.asarray(self.freshness), worth=self.worth)


@partial(jax.jit, static_argnames="worth")
def _best_plans(requests: Requests, price: Array, freshness: Float[Array, "consents levels ages"], *, worth: Worth) -> Array:
    context, space = requests.context, requests.predicted.space
    values = worth(context, requests.predicted, requests.mask) - price * jnp.asarray(space.table.uses_link)[None, :]
    values = values + worth_to_later_requests(context, freshness, space)
    return choose(values, requests.mask, space)


@dataclass(frozen=True, kw_only=True, eq=False)
class Followed:
    """What a planner chooses, as it serves."""

    planner: LearnedPlanner

    def choose(self, requests: Requests, step: int) -> Int[Array, "b"]:
        """Its choices."""
        del step
        graph, state = nnx.split(self.planner)
        return _choices(state, requests, graph=graph)


@partial(jax.jit, static_argnames="graph")
def _choices(state: Any, requests: Requests, *, graph: nnx.GraphDef) -> Array:
    logits = nnx.merge(graph, state).logits(requests.context, requests.predicted, requests.mask)
    return choose(logits, requests.mask, requests.predicted.space)


def unpriced(worth: Worth) -> Worth:
    """The same where time, energy and exposure cost nothing, as where calls alone are scarce."""

    def only_quality(context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        free = jnp.zeros_like(context.utility_per_ms)
        return worth(replace(context, utility_per_ms=free, utility_per_mj=free, utility_per_exposure=free), costs, mask)

    return only_quality


def quality_by_age(records: ReplayRecords) -> QualityByAge:
    """Means over the users of ``records``."""

    def quality_under(level: EgressLevel, age: int) -> Float[np.ndarray, "requests p"]:
        ranks = records.ranks[level - 1, age - 1, :, age - 1 :]
        return np.asarray(plan_quality(ranks.reshape(-1, ranks.shape[-1])))

    return QualityByAge.estimated(quality_under, records.ranks.shape[1], records.space)


def no_freshness(means: QualityByAge) -> Float[np.ndarray, "consents levels ages"]:
    """Zeros of the shape of ``freshness_values``: of planners that look at one request alone."""
    return np.zeros((len(EgressLevel), *means.quality.shape[:2]))


def calibrated_price(
    calls_at: Callable[[float], float], calls: float, low: float = -MAX_PRICE, high: float = MAX_PRICE, steps: int = SEARCH_STEPS
) -> float:
    """The lowest price at which ``calls_at(price)``, the share of requests that call, is at most ``calls``; to 1e-4 by default.

    A negative price is a reward, which brings a planner that calls too rarely to the budget. Between ``low`` and ``high``, by ``steps``
    bisections; ``high`` is taken to keep the budget.
    """
    for _ in range(steps):
        middle = (low + high) / 2
        if calls_at(middle) > calls:
            low = middle
        else:
            high = middle
    return high
