"""The learned planners. Quality is learned and cost is known, so a decision explains itself in ms, mJ, bytes and exposure."""

import itertools
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from cda4rec_jax.array_typing import Array, ContextFeatures, PlanLogits, PlanMask, PlanValues
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context, Plan
from cda4rec_jax.planner.contexts import NUM_CONTEXT_FEATURES, context_features, weight_features
from cda4rec_jax.planner.costs import PlanCosts
from cda4rec_jax.planner.plan_space import NUM_PLANS, STANDARD, CostTerm, PlanSpace
from cda4rec_jax.planner.utility import cost_in_utility

MAX_MULTIPLY_ADDS = 15_000


@runtime_checkable
class Planner(Protocol):
    """Anything that scores plans: higher is better, -inf is never chosen, serving takes the argmax."""

    def logits(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        """Scores [b, p]; -inf where ``mask`` is False."""
        ...


class LearnedPlanner(nnx.Module):
    """What training, evaluation and recommending need of a planner that learns. Subclass it for one of your own.

    A subclass is made as ``Class(config, space=space, rngs=rngs)``, with the ``PolicyConfig`` of the system and the plans that there are.
    It must write ``logits``, which training differentiates in the module's ``nnx.Param``; all else may stay.

    Attributes:
        plans: plans of its own, beside the standard ones.
        cost_terms: costs of its own, see ``plan_space.CostTerm``.
        prices_count: whether what time, energy, exposure and ``cost_terms`` cost is a part of the logit that ``tau`` tells of.
    """

    plans: ClassVar[tuple[Plan, ...]] = ()
    cost_terms: ClassVar[tuple[CostTerm, ...]] = ()
    prices_count: ClassVar[bool] = True

    def logits(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        """Scores [b, p] from the predicted ``costs``; higher is better. Where ``mask`` is False nothing that it says counts."""
        raise NotImplementedError(f"{type(self).__name__} must write logits(context, costs, mask)")

    def quality(self, features: ContextFeatures) -> PlanValues | None:
        """Quality [b, p] that it expects of every plan, from ``context_features``; None: it cannot say, and explains no decision.

        Training also regresses it on the quality that plans turn out to have.
        """
        del features
        return None

    def tau(self) -> Float[Array, ""] | None:
        """Temperature, where logit = (quality - costs in utility + ``further_terms``) / tau; None: the logit is something else."""
        return None

    def further_terms(self, context: Context, costs: PlanCosts) -> dict[str, PlanValues]:
        """What the logit has beside quality and prices, each [b, p] in units of quality, by a name to show; an underscore is a space."""
        del context, costs
        return {}

    def standardise(self, quality_gap: Float[Array, ""], mean_quality: Float[Array, "p"]) -> None:
        """Hears dQ and the mean quality of each plan whenever training has measured them, in units of quality."""


def permitted(logits: PlanLogits, mask: PlanMask) -> PlanLogits:
    """-inf exactly where ``mask`` is False or the logit is no number, whatever a planner said there: a broken one must not choose by it."""
    return _forbid(logits, mask & (logits > -jnp.inf))


def choose(logits: PlanLogits, mask: PlanMask, space: PlanSpace = STANDARD) -> Int[Array, "b"]:
    """The permitted plan of the highest logit; ``local-skip-skip``, which is always allowed, where there is none. Jittable."""
    scores = permitted(logits, mask)
    return jnp.where(jnp.max(scores, axis=1) > -jnp.inf, jnp.argmax(scores, axis=1), space.last_resort)


def check_scores(planner: Planner, logits: PlanLogits, mask: PlanMask) -> None:
    """Refuse a planner that has learned, or was written, to say no number of a plan that is allowed.

    Raises:
        UserError: NaN where ``mask`` is True.
    """
    allowed = np.asarray(mask)
    broken = np.count_nonzero(np.isnan(np.asarray(logits)) & allowed)
    if broken:
        raise UserError(
            f"{type(planner).__name__} scores {broken:,} of {np.count_nonzero(allowed):,} allowed plans as NaN: expected numbers, or "
            "-inf for a plan that is never to be chosen. Look in its logits for 0 / 0, infinity minus infinity, or the logarithm of a "
            "negative number"
        )


class PolicyScale(nnx.Variable):
    """A number that is set from data and never trained."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Sizes of the policy, and the units it starts in."""

    hidden: int = 64
    rank: int = 32  # of the product between the context tower and the plan tower
    quality_scale: float = 0.05  # what one unit of the network's output is worth; set to dQ once that is known
    temperature: float = 0.1  # tau in units of quality_scale

    def multiply_adds(self, num_plans: int = NUM_PLANS) -> int:
        """Multiply-adds of the quality of one context under all plans; the plan tower is cached and not counted."""
        tower = NUM_CONTEXT_FEATURES * self.hidden + self.hidden * self.hidden + self.hidden * self.rank
        return tower + self.rank * num_plans


def _forbid(values: PlanValues, mask: PlanMask) -> PlanLogits:
    return jnp.where(mask, values, -jnp.inf)


class _Mlp(nnx.Module):
    """Dense layers with GELU between them."""

    def __init__(self, sizes: tuple[int, ...], *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x: Float[Array, "n f"]) -> Float[Array, "n o"]:
        hidden = jnp.asarray(x)
        for layer in list(self.layers)[:-1]:
            hidden = jax.nn.gelu(layer(hidden))
        return self.layers[-1](hidden)


class Policy(LearnedPlanner):
    """logits_p = (q_theta(context, phi(plan))_p - w . c_p(context)) / tau.

    q_theta = mean_quality_p + quality_scale * <context tower, plan tower> / sqrt(rank). ``mean_quality`` is measured, never
    trained: what the towers learn is how a context departs from it.

    Raises:
      UserError: the config asks for more than ``MAX_MULTIPLY_ADDS`` a decision.
    """

    def __init__(self, config: PolicyConfig, *, space: PlanSpace = STANDARD, rngs: nnx.Rngs):
        needed = config.multiply_adds(space.num_plans)
        if needed > MAX_MULTIPLY_ADDS:
            raise UserError(
                f"policy of hidden={config.hidden}, rank={config.rank} needs {needed} multiply-adds a decision, "
                f"more than {MAX_MULTIPLY_ADDS}: choose smaller sizes"
            )
        self.config, self.space = config, space
        self.context_tower = _Mlp((NUM_CONTEXT_FEATURES, config.hidden, config.hidden, config.rank), rngs=rngs)
        # A policy starts as plug-in: the same mean quality in every context, until it has learned where that is wrong.
        last = self.context_tower.layers[-1]
        last.kernel[...] = jnp.zeros_like(last.kernel[...])
        self.plan_tower = _Mlp((space.features.shape[1], config.hidden, config.rank), rngs=rngs)
        self.quality_scale = PolicyScale(jnp.asarray(config.quality_scale, jnp.float32))
        self.mean_quality = PolicyScale(jnp.zeros((space.num_plans,)))

    def plan_vectors(self) -> Float[Array, "p r"]:
        """The plan tower's output: depends on weights only, so serving computes it once."""
        return self.plan_tower(jnp.asarray(self.space.features))

    def quality(self, features: ContextFeatures) -> PlanValues:
        """Learned quality [b, p] of every plan, in units of 1 / log2(1 + rank)."""
        product = self.context_tower(features) @ self.plan_vectors().T
        return self.mean_quality[...][None, :] + self.quality_scale[...] * product / self.config.rank**0.5

    def tau(self) -> Float[Array, ""]:
        """Temperature in units of quality."""
        return jnp.asarray(self.config.temperature * self.quality_scale[...])

    def standardise(self, quality_gap: Float[Array, ""], mean_quality: Float[Array, "p"]) -> None:
        """Take dQ for the unit of the network's output, and start from the mean quality of each plan."""
        self.quality_scale[...] = quality_gap
        self.mean_quality[...] = mean_quality

    def logits(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        """Scores [b, p] from the predicted ``costs``; -inf where ``mask`` is False."""
        worth = self.quality(context_features(context)) - cost_in_utility(costs, context)
        return _forbid(worth / self.tau(), mask)


class DirectPolicy(LearnedPlanner):
    """The ablation: an MLP from the context and its weights straight to logits. It sees no costs, and explains nothing."""

    def __init__(self, config: PolicyConfig, *, space: PlanSpace = STANDARD, rngs: nnx.Rngs):
        self.net = _Mlp((NUM_CONTEXT_FEATURES + 3, config.hidden, config.hidden, space.num_plans), rngs=rngs)
        self.quality_scale = PolicyScale(jnp.asarray(config.quality_scale, jnp.float32))

    def standardise(self, quality_gap: Float[Array, ""], mean_quality: Float[Array, "p"]) -> None:
        """Take dQ for the unit of the prices; mean quality plays no part."""
        del mean_quality
        self.quality_scale[...] = quality_gap

    def logits(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        """Scores [b, p]; ``costs`` is there for the protocol alone."""
        del costs
        weights = weight_features(context, self.quality_scale[...])
        return _forbid(self.net(jnp.concatenate([context_features(context), weights], axis=1)), mask)
