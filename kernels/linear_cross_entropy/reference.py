"""The specification: all logits at once, never optimised."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def linear_cross_entropy_reference(
    hidden: Float[Array, "t d"], items: Float[Array, "i d"], targets: Int[Array, "t"], weights: Float[Array, "t"]
) -> Float[Array, ""]:
    """``sum_t w_t * (logsumexp_{i' >= 1}(h_t . e_i') - h_t . e_target)``; the weight must be 0 where the target is 0."""
    logits = jnp.einsum("td,id->ti", hidden, items)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits[:, 1:], axis=1) - target_logits))
