"""When to call the cloud: schedules, prices of a call, and what a fresh embedding is worth to later requests.

A call is a plan that uses the link. Prices are in units of quality, 1 / log2(1 + rank).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array, PlanLogits, PlanMask, PlanValues
from cda4rec_jax.evaluation.replay import CACHE_LEVELS, ReplayRecords
from cda4rec_jax.messages import Context, EgressLevel
from cda4rec_jax.pipeline.decisions import Requests
from cda4rec_jax.planner import STANDARD, PlanCosts, PlanSpace, choose, plan_quality, repair

DISCOUNT = 0.9  # of the next request's worth: a horizon of ten requests
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
    fresh_level, uses_link = jnp.asarray(space.table.level)[None, :], jnp.asarray(space.table.uses_link)[None, :]
    oldest = freshness.shape[2] - 1
    older = jnp.minimum(context.cache_age_events.astype(jnp.int32) + 1, oldest) * (context.cache_level > 0)
    level = jnp.where(fresh_level > 0, fresh_level, context.cache_level[:, None])
    age = jnp.where(fresh_level > 0, min(1, oldest), older[:, None])
    later = freshness[context.consent[:, None], level, age]
    values = worth(context, requests.predicted, requests.mask) - price * uses_link + later
    return choose(values, requests.mask, space)


def unpriced(worth: Worth) -> Worth:
    """The same where time, energy and exposure cost nothing, as where calls alone are scarce."""

    def only_quality(context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        free = jnp.zeros_like(context.utility_per_ms)
        return worth(replace(context, utility_per_ms=free, utility_per_mj=free, utility_per_exposure=free), costs, mask)

    return only_quality


@dataclass(frozen=True, kw_only=True, eq=False)
class QualityByAge:
    """Mean quality of every plan by level and age of the cache that a request finds: all that is worth knowing of staleness alone.

    Row (0, 0) of ``quality`` is that of requests without a cache, where plans that reuse it are worth 0.
    """

    quality: Float[np.ndarray, "levels ages p"]
    space: PlanSpace = STANDARD

    @classmethod
    def of(cls, records: ReplayRecords) -> "QualityByAge":
        """Means over the users of ``records``."""
        space = records.space
        reuses = space.table.semantic_reuse
        everywhere = _quality(records.ranks[0, 0]).mean(axis=0, dtype=np.float64)
        reference = int(np.where(space.table.semantic_cloud, everywhere, -np.inf).argmax())
        ages = records.ranks.shape[1]
        quality = np.broadcast_to(np.where(reuses, 0.0, everywhere), (len(EgressLevel), ages + 1, space.num_plans)).copy()
        for level in CACHE_LEVELS:
            for age in range(1, ages + 1):
                # Old caches are found late, and late requests may be harder: so the gap to a fresh plan on the same ones is averaged.
                here = _quality(records.ranks[level - 1, age - 1, :, age - 1 :])
                gap = (here - here[:, reference, None]).mean(axis=0, dtype=np.float64)
                quality[level, age, reuses] = (everywhere[reference] + gap)[reuses]
        return cls(quality=quality, space=space)

    def worth(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanValues:
        """Mean quality under the cache of each request; -inf where ``mask`` is False."""
        del costs
        age = jnp.minimum(context.cache_age_events.astype(jnp.int32), self.quality.shape[1] - 1)
        return jnp.where(mask, jnp.asarray(self.quality, jnp.float32)[context.cache_level, age], -jnp.inf)

    def over(self, cache_level: Int[np.ndarray, "*n"], cache_age_events: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "p"]:
        """Mean quality of every plan over those of the given caches that are there: all that a plug-in planner knows."""
        there = cache_level > 0
        return self.quality[cache_level[there], cache_age_events[there].astype(int)].mean(axis=0)

    def best(self, *, calls: bool) -> int:
        """The plan of highest mean quality among fresh plans (``calls``) or among plans without the link, at a cache 1 event old."""
        table = self.space.table
        which = table.semantic_cloud if calls else ~table.uses_link
        return int(np.where(which, self.quality[EgressLevel.FULL, 1], -np.inf).argmax())


def _quality(ranks: Int[np.ndarray, "n steps p"]) -> Float[np.ndarray, "requests p"]:
    """Quality of every plan, with the requests of all users in one axis."""
    return np.asarray(plan_quality(ranks.reshape(-1, ranks.shape[-1])))


def freshness_values(means: QualityByAge, price: float, discount: float = DISCOUNT) -> Float[np.ndarray, "consents levels ages"]:
    """Discounted V(c, l, a): what it is worth now that the next request finds a cache of level l and age a, with consent c.

    V solves, by value iteration over mean qualities q,

        V(c, l, a) = max_p [q_p(l, a) - price (p uses the link) + gamma V(c, cache that p leaves)]

    over plans of a level within c that find the cache they need (level 0, age 0: none). A plan that makes a fresh embedding leaves one
    that is 1 event old; any other leaves it 1 event older, and at the last age it stays there. Links that are down, memory and failures
    are left out: they are alike for all caches.
    """
    table, quality = means.space.table, means.quality
    num_levels, num_ages, _ = quality.shape
    level, age = np.meshgrid(np.arange(num_levels), np.arange(num_ages), indexing="ij")
    older = np.where(level > 0, np.minimum(age + 1, num_ages - 1), 0)
    next_level = np.where(table.level > 0, table.level, level[..., None])
    next_age = np.where(table.level > 0, min(1, num_ages - 1), older[..., None])
    egress = np.where(table.semantic_reuse & table.uses_link, level[..., None], table.level)
    possible = ~table.semantic_reuse | (level[..., None] > 0)
    consent = np.arange(num_levels)[:, None, None, None]
    reward = np.where(possible & (egress <= consent), quality - price * table.uses_link, -np.inf)
    values = np.zeros((num_levels, num_levels, num_ages))
    while True:
        better = (reward + discount * values[:, next_level, next_age]).max(axis=-1)
        if np.abs(better - values).max() < 1e-7:
            return discount * better
        values = better


def no_freshness(means: QualityByAge) -> Float[np.ndarray, "consents levels ages"]:
    """Zeros of the shape of ``freshness_values``: of planners that look at one request alone."""
    return np.zeros((len(EgressLevel), *means.quality.shape[:2]))


def calibrated_price(calls_at: Callable[[float], float], calls: float) -> float:
    """The lowest price, to 1e-4, at which ``calls_at(price)``, the share of requests that call, is at most ``calls``.

    A negative price is a reward, which brings a planner that calls too rarely to the budget.
    """
    low, high = -MAX_PRICE, MAX_PRICE
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        if calls_at(middle) > calls:
            low = middle
        else:
            high = middle
    return high
