"""Planners that learn nothing: a fixed plan with repair, rules, and chance."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Int

from cda4rec_jax.array_typing import Array, PlanLogits, PlanMask
from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, Link
from cda4rec_jax.planner.costs import PlanCosts
from cda4rec_jax.planner.plan_space import CANDIDATE_COUNTS, STANDARD, PlanSpace, plan_index, repair


def _choose(indices: Int[Array, "b"], mask: PlanMask) -> PlanLogits:
    return jnp.where(jnp.arange(mask.shape[1])[None, :] == indices[:, None], 0.0, -jnp.inf)


@dataclass(frozen=True)
class FixedPlan:
    """Always the same plan, or the first of its repair order that the context allows."""

    plan_index: int

    def logits(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        """0 at the one plan that is chosen, -inf elsewhere; [b, p]."""
        return _choose(repair(jnp.full(context.link.shape, self.plan_index), mask, costs.space), mask)


@dataclass(frozen=True, kw_only=True)
class RulesPlanner:
    """What an engineer would write without data, with the standard plans; repaired where it is not allowed.

    - No link, or EDGE: local, with the cached embedding.
    - A cache at most ``fresh_age_events`` old and made at the level of consent: reuse.
    - Otherwise a fresh embedding at the level of consent.
    - K = 500 on WiFi, 100 on LTE, 20 on slower links. Structured modelling on the device, except on a low tier whose history is
      longer than ``long_history``.
    """

    fresh_age_events: float = 1.0
    long_history: float = 50.0

    def logits(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        """0 at the one plan that is chosen, -inf elsewhere; [b, p]."""
        skip = ((context.tier == DeviceTier.LOW) & (context.history_length > self.long_history)).astype(jnp.int32)
        count = jnp.clip(len(CANDIDATE_COUNTS) - 1 - context.link, 0, len(CANDIDATE_COUNTS) - 1)
        level = jnp.maximum(context.consent, EgressLevel.PROFILE) - 1
        fresh = plan_index("fresh-profile-20-device") + 2 * (len(CANDIDATE_COUNTS) * level + count) + skip
        reuse = plan_index("reuse-20-device") + 2 * count + skip
        local = plan_index("local-reuse-device") + skip
        is_recent = (context.cache_age_events <= self.fresh_age_events) & (context.cache_level == context.consent)
        wanted = jnp.where(is_recent & (context.cache_level > EgressLevel.NOTHING), reuse, fresh)
        return _choose(repair(jnp.where(context.link >= Link.EDGE, local, wanted), mask, costs.space), mask)


@dataclass(frozen=True, kw_only=True)
class RandomPlanner:
    """A uniformly drawn allowed plan; the draw is a hash of the seed and the context, so it does not depend on the batch."""

    seed: int = 0

    def logits(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        """0 at the one plan that is chosen, -inf elsewhere; [b, p]."""
        del costs
        fields = (context.history_length, context.free_memory_mb, context.round_trip_ms, context.utility_per_ms)
        words = jnp.stack([jax.lax.bitcast_convert_type(field.astype(jnp.float32), jnp.uint32) for field in fields], axis=1)

        def noise(row: Array) -> Array:
            key = jax.random.key(self.seed)
            for word in row:
                key = jax.random.fold_in(key, word)
            return jax.random.uniform(key, mask.shape[1:])

        return _choose(jnp.argmax(jnp.where(mask, jax.vmap(noise)(words), -1.0), axis=1), mask)


def fixed_planners(space: PlanSpace = STANDARD) -> dict[str, FixedPlan]:
    """Every plan as a planner, by name."""
    return {name: FixedPlan(index) for index, name in enumerate(space.names)}
