"""The cross-entropy whose normaliser is estimated from sampled items: what all implementations share.

The sampled items are rows gathered from the table, shared by all tokens and sorted by item, so that those that are a token's own target
are one range, its hits. An implementation gives the loss of every token and the gradients that come through the rows; the target's own
logit, which no row has, is a term of every normaliser, and its gradient is added here.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

LEFT_OUT = -1e30  # offset of a row that is no class: finite, as 0 times it must be a number

# (hidden, rows, offsets, hits, target_logits, weights) to (losses without weights, d_hidden, d_rows)
Implementation = Callable[[Array, Array, Array, Array, Array, Array], tuple[Array, Array, Array]]


def sorted_samples(
    sampled: Int[Array, "k"], log_counts: Float[Array, "k"], targets: Int[Array, "t"]
) -> tuple[Int[Array, "rows"], Float[Array, "rows"], Int[Array, "t 2"]]:
    """Items of the k + 1 rows (the first is padding), what is added to their logits, and the range of rows that is each token's target.

    The range is from -1 to -1 where a token has no target, and empty where its target was not sampled.
    """
    order = jnp.argsort(sampled)
    ids = jnp.concatenate([jnp.zeros(1, sampled.dtype), sampled[order]])
    offsets = jnp.concatenate([jnp.zeros(1, log_counts.dtype), -log_counts[order]])
    hits = jnp.stack([jnp.searchsorted(ids, targets, side=side) for side in ("left", "right")], axis=1).astype(jnp.int32)
    return ids, jnp.where(ids > 0, offsets, LEFT_OUT), jnp.where(targets[:, None] > 0, hits, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sampled_cross_entropy(
    implementation: Implementation,
    hidden: Float[Array, "t d"],
    rows: Float[Array, "rows d"],
    offsets: Float[Array, "rows"],
    hits: Int[Array, "t 2"],
    target_rows: Float[Array, "t d"],
    weights: Float[Array, "t"],
) -> Float[Array, ""]:
    """``sum_t w_t * (log(exp(h_t . target_row_t) + sum_r exp(h_t . row_r + offset_r)) - h_t . target_row_t)`` over rows r that are no hit.

    Row 0 is padding. The weight must be 0 where a token has no target. Offsets get no gradient.
    """
    return _forward(implementation, hidden, rows, offsets, hits, target_rows, weights)[0]


def _forward(
    implementation: Implementation, hidden: Array, rows: Array, offsets: Array, hits: Array, target_rows: Array, weights: Array
) -> tuple[Array, tuple[Array, ...]]:
    narrow, wide = hidden.dtype, rows.dtype
    rounded = target_rows.astype(narrow).astype(wide)
    target_logits = jnp.sum(hidden.astype(wide) * rounded, axis=1)
    losses, d_hidden, d_rows = implementation(hidden, rows, offsets, hits, target_logits, weights)
    steps = (weights * jnp.expm1(-losses))[:, None]  # the target's probability is exp(-loss)
    d_hidden, d_target_rows = (d_hidden + steps * rounded).astype(narrow), steps * hidden.astype(wide)
    return jnp.sum(weights * losses), (d_hidden, d_rows, d_target_rows, losses)


def _backward(implementation: Implementation, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
    del implementation
    d_hidden, d_rows, d_target_rows, losses = residuals
    scaled = (cotangent * d_hidden).astype(d_hidden.dtype)
    return scaled, cotangent * d_rows, None, None, cotangent * d_target_rows, cotangent * losses


sampled_cross_entropy.defvjp(_forward, _backward)
