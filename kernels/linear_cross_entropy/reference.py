"""The specification: all logits at once, never optimised."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def linear_cross_entropy_reference(
    hidden: Float[Array, "t d"],
    items: Float[Array, "i d"],
    targets: Int[Array, "t"],
    weights: Float[Array, "t"],
    sampled: Int[Array, "k"] | None = None,
    log_counts: Float[Array, "k"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """``sum_t w_t * (log Z_t - (1 - eps) h_t . e_target - eps mean_{i' >= 1}(h_t . e_i'))``; the weight must be 0 where the target is 0.

    ``Z_t`` is ``sum_{i' >= 1} exp(h_t . e_i')``, or, with ``sampled`` items,
    ``exp(h_t . e_target) + sum_{j: sampled_j is neither 0 nor the target} exp(h_t . e_(sampled_j) - log_counts_j)``.
    """
    logits = jnp.einsum("td,id->ti", hidden, items)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    if sampled is None or log_counts is None:
        normalised = logits[:, 1:]
    else:
        allowed = (sampled[None] != 0) & (sampled[None] != targets[:, None])
        negatives = jnp.where(allowed, logits[:, sampled] - log_counts[None], -jnp.inf)
        normalised = jnp.concatenate([target_logits[:, None], negatives], axis=1)
    labelled = target_logits
    if label_smoothing:
        labelled = (1.0 - label_smoothing) * target_logits + label_smoothing * jnp.mean(logits[:, 1:], axis=1)
    return jnp.sum(weights * (jax.nn.logsumexp(normalised, axis=1) - labelled))
