"""From logits to an objective: probabilities exactly 0 where a plan is forbidden, and two ways to differentiate a choice."""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.array_typing import Array, PlanLogits, PlanMask, PlanValues


class Objective(enum.StrEnum):
    """What training a planner improves, and how it differentiates the choice of a plan."""

    EXACT = "exact"  # expected utility over all plans
    GUMBEL = "gumbel"  # utility of one sampled plan, straight-through Gumbel-softmax (Jang et al. 2017, arXiv 1611.01144)
    REGRESSION = "regression"  # the predicted quality of all plans alone; choices follow, without a gradient of their own


def masked_softmax(logits: PlanLogits, mask: PlanMask) -> PlanValues:
    """Softmax over the allowed plans; exactly 0 elsewhere, whatever the logits here or there (infinite and NaN included).

    Gradients are finite and 0 at forbidden plans. A row that allows no plan with a finite logit has no probabilities: they do not
    sum to 1, or are NaN at allowed plans.
    """
    usable = mask & (logits > -jnp.inf)
    safe = jnp.where(usable, logits, 0.0)
    top = jnp.max(jnp.where(usable, logits, -jnp.inf), axis=1, keepdims=True)
    weights = jnp.where(usable, jnp.exp(jnp.where(usable, safe - jax.lax.stop_gradient(top), 0.0)), 0.0)
    return jnp.where(usable, weights / jnp.sum(weights, axis=1, keepdims=True), 0.0)


def entropy(probabilities: PlanValues) -> Float[Array, "b"]:
    """H = - sum_p pi log pi in nats, where 0 log 0 = 0 (and its gradient is 0)."""
    positive = probabilities > 0
    safe = jnp.where(positive, probabilities, 1.0)
    return -jnp.sum(jnp.where(positive, probabilities * jnp.log(safe), 0.0), axis=1)


def choice_weights(
    logits: PlanLogits,
    mask: PlanMask,
    objective: Objective = Objective.EXACT,
    *,
    key: PRNGKeyArray | None = None,
    temperature: float = 1.0,
) -> PlanValues:
    """Weights [b, p] that sum to 1, are exactly 0 at forbidden plans, and carry the gradient of the choice.

    EXACT: the probabilities; ``key`` and ``temperature`` play no part. GUMBEL: one-hot of argmax(logits + Gumbel noise), with the
    gradient of softmax((logits + noise) / temperature). REGRESSION: the probabilities, without a gradient.

    Raises:
      ValueError: GUMBEL without a ``key``.
    """
    if objective is not Objective.GUMBEL:
        probabilities = masked_softmax(logits, mask)
        return probabilities if objective is Objective.EXACT else jax.lax.stop_gradient(probabilities)
    if key is None:
        raise ValueError("Objective.GUMBEL samples: pass key=jax.random.key(...)")
    noisy = logits + jax.random.gumbel(key, logits.shape)
    soft = masked_softmax(noisy / temperature, mask)
    hard = jax.nn.one_hot(jnp.argmax(soft, axis=1), logits.shape[1])
    return hard - jax.lax.stop_gradient(soft) + soft


def expected_utility(weights: PlanValues, utilities: PlanValues, mask: PlanMask) -> Float[Array, "b"]:
    """E_pi[U] = sum_p weights U over allowed plans: differentiable in the weights, while U is taken as given (stop_gradient).

    Utilities of forbidden plans play no part, even if they are not finite. Those of allowed plans of weight 0 do: the gradient of a
    straight-through choice compares them with the one that was sampled.
    """
    return jnp.sum(weights * jnp.where(mask, jax.lax.stop_gradient(utilities), 0.0), axis=1)
