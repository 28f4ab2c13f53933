"""Random draws through inverse distribution functions: one uniform draw then serves all that is simulated of a request."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from cda4rec_jax.array_typing import Array

MIN_UNIFORM = 1e-7  # keeps the normal quantile finite where a uniform draw is 0


def log_normal(uniform: Float[Array, "*n"], spread: float) -> Float[Array, "*n"]:
    """Quantiles of LogNormal(0, spread) at ``uniform`` in [0, 1).

    ``erf_inv`` is one operation; ``jax.scipy.special.ndtri`` is two hundred to trace and compile. Its argument is exact at multiples of
    2^-23, as ``jax.random.uniform`` draws them.
    """
    return jnp.exp(spread * math.sqrt(2.0) * jax.lax.erf_inv(2.0 * jnp.maximum(uniform, MIN_UNIFORM) - 1.0))
