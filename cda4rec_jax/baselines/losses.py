"""The loss that only a baseline has, as a pure function of scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from cda4rec_jax.array_typing import Array


def binary_loss(
    positive_scores: Float[Array, "r t"],
    negative_scores: Float[Array, "r t k"],
    real: Bool[Array, "r t"],
    allowed: Bool[Array, "r t k"],
) -> Float[Array, ""]:
    """``-(log sigma(s+) + sum over allowed negatives of log(1 - sigma(s-)))``, mean over real positions; 0 where there is none.

    The loss of SASRec (Kang and McAuley, arXiv 1808.09781), there with one negative.
    """
    rejected = jnp.sum(jnp.where(allowed, jax.nn.log_sigmoid(-negative_scores), 0.0), axis=-1)
    gains = jnp.where(real, jax.nn.log_sigmoid(positive_scores) + rejected, 0.0)
    return -jnp.sum(gains) / jnp.maximum(jnp.sum(real), 1)
