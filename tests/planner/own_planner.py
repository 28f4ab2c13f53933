"""A planner as a user would write it, and others that lack something."""

import jax.numpy as jnp
from flax import nnx

from cda4rec_jax.messages import EgressLevel, Placement
from cda4rec_jax.planner import DirectPolicy, LearnedPlanner, Policy, cloud_plan, fresh_plan, reuse_plan

OWN_PLANS = (
    fresh_plan(EgressLevel.RECENT, 50, Placement.DEVICE),
    reuse_plan(300, Placement.SKIP),
    cloud_plan(EgressLevel.FULL, 50, Placement.SKIP),
)


def candidates_sent(context, costs, table):
    """A candidate costs a thousandth, twice that on a device of the lowest tier."""
    scale = jnp.where(context.tier == 0, 2e-3, 1e-3)
    return scale[:, None] * jnp.asarray(table.candidates * table.uses_link)[None, :]


class Priced(Policy):
    """Our policy with plans and a cost of one's own."""

    plans = OWN_PLANS
    cost_terms = (candidates_sent,)


class Defiant(LearnedPlanner):
    """Wants whatever is forbidden, and is not sure of the rest."""

    plans = OWN_PLANS

    def __init__(self, config, *, space, rngs):
        self.bias = nnx.Param(jnp.zeros(space.num_plans))

    def logits(self, context, costs, mask):
        wanted = jnp.where(mask, jnp.where(jnp.arange(mask.shape[1])[None, :] % 2 == 0, jnp.nan, -jnp.inf), jnp.inf)
        return wanted + self.bias[...][None, :]


class Unmasked(Policy):
    """Our policy, which leaves the mask to whoever chooses."""

    def logits(self, context, costs, mask):
        return super().logits(context, costs, jnp.ones_like(mask))


class Mute(LearnedPlanner):
    """Takes the logarithm of a negative number, and so gives no plan a score."""

    def __init__(self, config, *, space, rngs):
        pass

    def logits(self, context, costs, mask):
        return jnp.log(jnp.where(mask, -1.0, -2.0) - context.round_trip_ms[:, None])


class NoLogits(LearnedPlanner):
    def __init__(self, config, *, space, rngs):
        pass


class OtherArguments(DirectPolicy):
    def __init__(self, hidden):
        pass


class ListOfNames(DirectPolicy):
    plans = ["fresh-recent-50-device"]  # noqa: RUF012  # pyright: ignore[reportAssignmentType]


class Repeated(DirectPolicy):
    plans = (fresh_plan(EgressLevel.RECENT, 100, Placement.DEVICE),)


class Impossible(DirectPolicy):
    plans = (fresh_plan(EgressLevel.RECENT, 1000, Placement.CLOUD),)


class Nameless(DirectPolicy):
    cost_terms = (lambda context, costs, table: costs.latency_ms,)


def one_price(context, costs, table):
    """Forgets that plans differ."""
    return context.round_trip_ms


class OneNumber(DirectPolicy):
    cost_terms = (one_price,)


class StandardPlansOnly(DirectPolicy):
    plans = OWN_PLANS

    def logits(self, context, costs, mask):
        return jnp.zeros((len(context.link), 32))


class Broken(DirectPolicy):
    def quality(self, features):
        return features @ jnp.zeros((3, 3))


class OneTerm(DirectPolicy):
    def further_terms(self, context, costs):
        return {"loyalty": context.history_length}


not_a_class = 3
