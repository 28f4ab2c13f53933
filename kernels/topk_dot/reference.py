"""The specification: all scores at once, never optimised."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int


def topk_dot_reference(
    items: Float[Array, "i d"],
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"],
    excluded: Int[Array, "b s"],
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """The first ``k`` of the allowed items in order of ``(-q . e_i, i)``; ``(0, -inf)`` where there are fewer."""
    products = jnp.matmul(queries, items.T, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.where(allowed[None], products, -jnp.inf)
    scores = scores.at[jnp.arange(queries.shape[0])[:, None], excluded].set(-jnp.inf)
    best, found = jax.lax.top_k(scores, k)
    return jnp.where(best > -jnp.inf, found, 0).astype(jnp.int32), best
