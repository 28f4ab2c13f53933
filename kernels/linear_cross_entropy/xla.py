"""Chunked XLA implementation: the logits of one chunk of tokens exist at a time, and the forward scan makes the gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

_ROW_MULTIPLE = 8


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_cross_entropy_xla(
    chunk_size: int,
    hidden: Float[Array, "t d"],
    items: Float[Array, "i d"],
    targets: Int[Array, "t"],
    weights: Float[Array, "t"],
) -> Float[Array, ""]:
    """``sum_t w_t * (logsumexp_{i' >= 1}(h_t . e_i') - h_t . e_target)``; the weight must be 0 where the target is 0."""
    is_item = _is_item(items)

    def chunk_step(_: None, chunk: Array) -> tuple[None, Array]:
        return None, jax.nn.logsumexp(jnp.where(is_item, _logits(chunk, items), -jnp.inf), axis=1)

    _, logsumexps = jax.lax.scan(chunk_step, None, _in_chunks(hidden, chunk_size))
    return jnp.sum(weights * _token_losses(logsumexps, hidden, items, targets))


def _forward(chunk_size: int, hidden: Array, items: Array, targets: Array, weights: Array) -> tuple[Array, tuple[Array, ...]]:
    is_item = _is_item(items)

    def chunk_step(d_items: Array, chunk: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        chunk_hidden, chunk_weights = chunk
        logits = _logits(chunk_hidden, items)
        maxima = jnp.max(jnp.where(is_item, logits, -jnp.inf), axis=1, keepdims=True)
        exponentials = jnp.where(is_item, jnp.exp(logits - maxima), 0.0)
        sums = jnp.sum(exponentials, axis=1, keepdims=True)
        # Scaling the narrow [chunk, d] sides leaves the wide softmax unnormalised, which saves a pass over it.
        scales = chunk_weights[:, None] / sums
        d_items = d_items + jax.lax.dot_general(exponentials, chunk_hidden * scales, (((0,), (0,)), ((), ())))
        return d_items, ((jnp.log(sums) + maxima)[:, 0], (exponentials @ items) * scales)

    # Copies of the items, without row 0 or transposed, would gain no time and cost most of the memory.
    chunks = (_in_chunks(hidden, chunk_size), _in_chunks(weights, chunk_size))
    d_items, (logsumexps, d_hidden) = jax.lax.scan(chunk_step, jnp.zeros_like(items), chunks)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]] - weights[:, None] * items[targets]
    d_items = d_items.at[targets].add(-weights[:, None] * hidden)
    losses = _token_losses(logsumexps, hidden, items, targets)
    return jnp.sum(weights * losses), (d_hidden, d_items, losses)


def _backward(chunk_size: int, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None, Array]:
    del chunk_size
    d_hidden, d_items, losses = residuals
    return cotangent * d_hidden, cotangent * d_items, None, cotangent * losses


linear_cross_entropy_xla.defvjp(_forward, _backward)


def _logits(hidden: Float[Array, "t d"], items: Float[Array, "i d"]) -> Float[Array, "t i"]:
    return jax.lax.dot_general(hidden, items, (((1,), (1,)), ((), ())))


def _is_item(items: Float[Array, "i d"]) -> Bool[Array, "one i"]:
    """False for row 0, which is padding."""
    return (jnp.arange(items.shape[0]) > 0)[None]


def _in_chunks(rows: Float[Array, "t ..."], chunk_size: int) -> Float[Array, "chunks chunk ..."]:
    """Rows in equal chunks of at most about ``chunk_size``, padded with 0 at the end."""
    num_chunks = -(-rows.shape[0] // chunk_size)
    # Equal chunks keep the padding below one multiple per chunk: 130 rows become 2 x 72, not 2 x 128.
    size = min(chunk_size, -(-rows.shape[0] // (max(num_chunks, 1) * _ROW_MULTIPLE)) * _ROW_MULTIPLE)
    padding = num_chunks * size - rows.shape[0]
    padded = jnp.pad(rows, ((0, padding),) + ((0, 0),) * (rows.ndim - 1))
    return padded.reshape(num_chunks, size, *rows.shape[1:])


def _token_losses(
    logsumexps: Float[Array, "chunks chunk"], hidden: Float[Array, "t d"], items: Float[Array, "i d"], targets: Int[Array, "t"]
) -> Float[Array, "t"]:
    return logsumexps.reshape(-1)[: hidden.shape[0]] - jnp.sum(hidden * items[targets], axis=1)
