"""The terms of the joint loss, as pure functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from cda4rec_jax.array_typing import Array, PackedInts, PlanMask, PlanValues
from cda4rec_jax.kernels.linear_cross_entropy import linear_cross_entropy
from cda4rec_jax.planner import entropy, expected_utility


def catalogue_loss(
    hidden: Float[Array, "r t d"], item_vectors: Float[Array, "i d"], targets: PackedInts, chunk_size: int
) -> Float[Array, ""]:
    """Mean next-item cross-entropy over the full catalogue at the positions with a target; 0 where there is none."""
    flat = targets.reshape(-1)
    weights = (flat > 0).astype(jnp.float32)
    total = linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), item_vectors, flat, weights, chunk_size=chunk_size)
    return total / jnp.maximum(jnp.sum(weights), 1.0)


def fusion_loss(
    losses: PlanValues, present: Bool[Array, "b p"], probabilities: PlanValues, practice: Float[Array, ""]
) -> Float[Array, ""]:
    """``sum_p rho(p) CE(p)``, mean over users, with ``rho = (1 - practice) / P + practice * stop_gradient(pi)``.

    The head practises the plans that are used, and no plan starves. A retrieval miss counts nothing.
    """
    uniform = jnp.full(losses.shape, 1.0 / losses.shape[1])
    rho = (1.0 - practice) * uniform + practice * jax.lax.stop_gradient(probabilities)
    weights = rho * present
    return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1e-6)


def planner_loss(
    probabilities: PlanValues,
    utilities: PlanValues,
    quality_gap: Float[Array, ""],
    entropy_weight: Float[Array, ""],
) -> Float[Array, ""]:
    """``- E_pi[U] / dQ - beta H(pi)``, mean over requests; dividing by dQ makes learning rates mean the same on every dataset."""
    return -jnp.mean(expected_utility(probabilities, utilities) / quality_gap + entropy_weight * entropy(probabilities))


def quality_loss(predicted: PlanValues, quality: PlanValues, mask: PlanMask, quality_gap: Float[Array, ""]) -> Float[Array, ""]:
    """Mean squared error of the predicted plan quality over allowed plans, in units of dQ."""
    error = jnp.where(mask, (predicted - jax.lax.stop_gradient(quality)) / quality_gap, 0.0)
    return jnp.sum(jnp.square(error)) / jnp.sum(mask)
