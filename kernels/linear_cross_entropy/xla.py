"""Chunked XLA implementation: the logits of one chunk of tokens exist at a time, and the forward scan makes the gradient.

Products take their operands in the dtype of ``hidden`` and accumulate in that of ``items``; all else is in the dtype of ``items``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from cda4rec_jax.kernels.linear_cross_entropy.sampled import LEFT_OUT

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
    rows = items.astype(hidden.dtype)
    is_item = _is_item(rows)

    def chunk_step(_: None, chunk: Array) -> tuple[None, Array]:
        return None, jax.nn.logsumexp(jnp.where(is_item, _logits(chunk, rows, items.dtype), -jnp.inf), axis=1)

    _, logsumexps = jax.lax.scan(chunk_step, None, in_chunks(hidden, chunk_size))
    return jnp.sum(weights * _token_losses(logsumexps, hidden, rows, targets, weights))


def _forward(chunk_size: int, hidden: Array, items: Array, targets: Array, weights: Array) -> tuple[Array, tuple[Array, ...]]:
    narrow, wide = hidden.dtype, items.dtype
    rows = items.astype(narrow)
    is_item = _is_item(rows)

    def chunk_step(d_items: Array, chunk: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        chunk_hidden, chunk_weights = chunk
        logits = _logits(chunk_hidden, rows, wide)
        maxima = jnp.max(jnp.where(is_item, logits, -jnp.inf), axis=1, keepdims=True)
        exponentials = jnp.where(is_item, jnp.exp(logits - maxima), 0.0)
        sums = jnp.sum(exponentials, axis=1, keepdims=True)
        # Scaling the narrow [chunk, d] sides leaves the wide softmax unnormalised, which saves a pass over it.
        scales = chunk_weights[:, None] / sums
        exponentials = exponentials.astype(narrow)
        scaled = (chunk_hidden * scales).astype(narrow)
        d_items = d_items + jax.lax.dot_general(exponentials, scaled, (((0,), (0,)), ((), ())), preferred_element_type=wide)
        return d_items, ((jnp.log(sums) + maxima)[:, 0], jnp.matmul(exponentials, rows, preferred_element_type=wide) * scales)

    # Copies of the items, without row 0 or transposed, would gain no time and cost most of the memory.
    chunks = (in_chunks(hidden, chunk_size), in_chunks(weights, chunk_size))
    d_items, (logsumexps, d_hidden) = jax.lax.scan(chunk_step, jnp.zeros_like(items), chunks)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]] - weights[:, None] * rows[targets]
    d_items = d_items.at[targets].add(-weights[:, None] * hidden)
    losses = _token_losses(logsumexps, hidden, rows, targets, weights)
    return jnp.sum(weights * losses), (d_hidden.astype(narrow), d_items, losses)


def backward(residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None, Array]:
    """Scale the gradients that the forward pass made."""
    d_hidden, d_items, losses = residuals
    return (cotangent * d_hidden).astype(d_hidden.dtype), cotangent * d_items, None, cotangent * losses


linear_cross_entropy_xla.defvjp(_forward, lambda chunk_size, residuals, cotangent: backward(residuals, cotangent))


def sampled_xla(
    chunk_size: int,
    hidden: Float[Array, "t d"],
    rows: Float[Array, "rows d"],
    offsets: Float[Array, "rows"],
    hits: Int[Array, "t 2"],
    target_logits: Float[Array, "t"],
    weights: Float[Array, "t"],
) -> tuple[Float[Array, "t"], Float[Array, "t d"], Float[Array, "rows d"]]:
    """Losses, and the gradients through the sampled rows, as ``sampled_cross_entropy`` wants them."""
    narrow, wide = hidden.dtype, rows.dtype
    operands = rows.astype(narrow)
    numbers = jnp.arange(rows.shape[0])[None]

    def chunk_step(d_rows: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        chunk_hidden, chunk_weights, chunk_targets, chunk_hits = chunk
        is_negative = (numbers > 0) & ((numbers < chunk_hits[:, :1]) | (numbers >= chunk_hits[:, 1:]))
        logits = jnp.where(is_negative, _logits(chunk_hidden, operands, wide) + offsets[None], LEFT_OUT)
        of_target = chunk_targets[:, None]
        maxima = jnp.maximum(jnp.max(logits, axis=1, keepdims=True), of_target)
        exponentials = jnp.exp(logits - maxima)
        sums = jnp.sum(exponentials, axis=1, keepdims=True) + jnp.exp(of_target - maxima)
        scales = chunk_weights[:, None] / sums
        exponentials = exponentials.astype(narrow)
        scaled = (chunk_hidden * scales).astype(narrow)
        d_rows = d_rows + jax.lax.dot_general(exponentials, scaled, (((0,), (0,)), ((), ())), preferred_element_type=wide)
        d_hidden = jnp.matmul(exponentials, operands, preferred_element_type=wide) * scales
        return d_rows, ((jnp.log(sums) + (maxima - of_target))[:, 0], d_hidden)

    chunks = tuple(in_chunks(array, chunk_size) for array in (hidden, weights, target_logits, hits))
    d_rows, (losses, d_hidden) = jax.lax.scan(chunk_step, jnp.zeros_like(rows), chunks)
    return losses.reshape(-1)[: hidden.shape[0]], d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], d_rows


def _logits(hidden: Float[Array, "t d"], items: Float[Array, "i d"], dtype: jnp.dtype) -> Float[Array, "t i"]:
    return jax.lax.dot_general(hidden, items, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _is_item(items: Float[Array, "i d"]) -> Bool[Array, "one i"]:
    """False for row 0, which is padding."""
    return (jnp.arange(items.shape[0]) > 0)[None]


def in_chunks(rows: Shaped[Array, "t ..."], chunk_size: int) -> Shaped[Array, "chunks chunk ..."]:
    """Rows in equal chunks of at most about ``chunk_size``, padded with 0 at the end."""
    num_chunks = -(-rows.shape[0] // chunk_size)
    # Equal chunks keep the padding below one multiple per chunk: 130 rows become 2 x 72, not 2 x 128.
    size = min(chunk_size, -(-rows.shape[0] // (max(num_chunks, 1) * _ROW_MULTIPLE)) * _ROW_MULTIPLE)
    padding = num_chunks * size - rows.shape[0]
    padded = jnp.pad(rows, ((0, padding),) + ((0, 0),) * (rows.ndim - 1))
    return padded.reshape(num_chunks, size, *rows.shape[1:])


def _token_losses(
    logsumexps: Float[Array, "chunks chunk"],
    hidden: Float[Array, "t d"],
    rows: Float[Array, "i d"],
    targets: Int[Array, "t"],
    weights: Float[Array, "t"],
) -> Float[Array, "t"]:
    target_logits = jnp.sum(hidden.astype(weights.dtype) * rows[targets].astype(weights.dtype), axis=1)
    return logsumexps.reshape(-1)[: hidden.shape[0]] - target_logits
