"""When to call the cloud: a price of a call, and what a fresh embedding is worth to later requests.

A call is a plan that uses the link. Prices are in units of quality, 1 / log2(1 + rank).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from cda4rec_jax.array_typing import Array, ContextFeatures, PlanLogits, PlanMask, PlanValues
from cda4rec_jax.messages import Context, EgressLevel
from cda4rec_jax.planner.contexts import context_features
from cda4rec_jax.planner.costs import PlanCosts
from cda4rec_jax.planner.plan_space import STANDARD, PlanSpace
from cda4rec_jax.planner.policy import LearnedPlanner, Policy, PolicyConfig, PolicyScale

DISCOUNT = 0.9  # of the next request's worth: a horizon of ten requests
CACHE_LEVELS = tuple(EgressLevel)[1:]  # that an embedding may have been made at
OLDEST = 10  # events; a ``CallScheduler`` takes an older cache for one of this age
MIN_REQUESTS = 20  # fewer say nothing of an age: it is then worth what the age before it is


@dataclass(frozen=True, kw_only=True, eq=False)
class QualityByAge:
    """Mean quality of every plan by level and age of the cache that a request finds: all that is worth knowing of staleness alone.

    Row (0, 0) of ``quality`` is that of requests without a cache, where plans that reuse it are worth 0.
    """

    quality: Float[np.ndarray, "levels ages p"]
    space: PlanSpace = STANDARD

    @classmethod
    def estimated(
        cls, quality_under: Callable[[EgressLevel, int], Float[np.ndarray, "n p"]], oldest: int, space: PlanSpace = STANDARD
    ) -> "QualityByAge":
        """Means over requests.

        Args:
            quality_under: quality of every plan, (level, age) -> [n, p], over the requests that may find such a cache; those of age 1
                are all requests.
            oldest: age up to which there are such requests.
            space: the plans that there are.
        """
        reuses = space.table.semantic_reuse
        everywhere = quality_under(CACHE_LEVELS[0], 1).mean(axis=0, dtype=np.float64)
        reference = int(np.where(space.table.semantic_cloud, everywhere, -np.inf).argmax())
        quality = np.broadcast_to(np.where(reuses, 0.0, everywhere), (len(EgressLevel), oldest + 1, space.num_plans)).copy()
        for level in CACHE_LEVELS:
            for age in range(1, oldest + 1):
                here = quality_under(level, age)
                if age > 1 and len(here) < MIN_REQUESTS:
                    quality[level, age] = quality[level, age - 1]
                    continue
                # Old caches are found late, and late requests may be harder: so the gap to a fresh plan on the same ones is averaged.
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


def worth_to_later_requests(context: Context, freshness: Float[Array, "consents levels ages"], space: PlanSpace) -> PlanValues:
    """By ``freshness_values``, what the cache that each plan leaves is worth above the one that is there, an event later, [b, p].

    A cache past the last age has the last age. Of a choice only differences count, and so a plan that renews nothing gets 0.
    """
    fresh_level, oldest = jnp.asarray(space.table.level)[None, :], freshness.shape[2] - 1
    older = jnp.minimum(context.cache_age_events.astype(jnp.int32) + 1, oldest) * (context.cache_level > 0)
    level = jnp.where(fresh_level > 0, fresh_level, context.cache_level[:, None])
    age = jnp.where(fresh_level > 0, min(1, oldest), older[:, None])
    values, consent = jnp.asarray(freshness), context.consent  # NumPy where weights were loaded
    return values[consent[:, None], level, age] - values[consent, context.cache_level, older][:, None]


class CallScheduler(LearnedPlanner):
    """logit_p = quality_p(context) - price (p uses the link) + what the cache that p leaves adds to later requests.

    Quality is that of a trained ``Policy``; price and worth are set from data and never trained (``evaluation/call_schedule.py``). Time,
    energy and exposure play no part: it is for who wants the most quality from a number of calls.
    """

    prices_count: ClassVar[bool] = False

    def __init__(self, config: PolicyConfig, *, space: PlanSpace = STANDARD, rngs: nnx.Rngs):
        self.policy = Policy(config, space=space, rngs=rngs)
        self.price = PolicyScale(jnp.zeros(()))
        self.freshness = PolicyScale(jnp.zeros((len(EgressLevel), len(EgressLevel), OLDEST + 1)))

    @classmethod
    def of(cls, policy: Policy, price: float, freshness: Float[np.ndarray, "consents levels ages"]) -> "CallScheduler":
        """A scheduler by the quality of ``policy``. Ages that ``freshness`` lacks are worth what its last one is.

        Raises:
            ValueError: more ages than 0 to ``OLDEST``.
        """
        missing = OLDEST + 1 - freshness.shape[2]
        if missing < 0:
            raise ValueError(f"freshness has {freshness.shape[2]} ages, expected at most {OLDEST + 1}")
        planner = cls(policy.config, space=policy.space, rngs=nnx.Rngs(0))
        planner.policy = policy
        planner.price[...] = jnp.asarray(price, jnp.float32)
        planner.freshness[...] = jnp.asarray(np.pad(freshness, ((0, 0), (0, 0), (0, missing)), mode="edge"), jnp.float32)
        return planner

    def quality(self, features: ContextFeatures) -> PlanValues:
        """That of the policy."""
        return self.policy.quality(features)

    def tau(self) -> Float[Array, ""]:
        """1: the logit is in units of quality."""
        return jnp.ones(())

    def standardise(self, quality_gap: Float[Array, ""], mean_quality: Float[Array, "p"]) -> None:
        """Tells the policy."""
        self.policy.standardise(quality_gap, mean_quality)

    def further_terms(self, context: Context, costs: PlanCosts) -> dict[str, PlanValues]:
        """The price of a call, and the worth of a fresh cache to later requests."""
        later = worth_to_later_requests(context, self.freshness[...], costs.space)
        price = jnp.where(jnp.asarray(costs.space.table.uses_link), -self.price[...], 0.0)
        return {"price_of_a_call": jnp.broadcast_to(price, later.shape), "worth_to_later_requests": later}

    def logits(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        """The sum of its terms [b, p]; -inf where ``mask`` is False. Of ``costs`` only the plans count."""
        scores = self.quality(context_features(context))
        for term in self.further_terms(context, costs).values():
            scores = scores + term
        return jnp.where(mask, scores, -jnp.inf)
