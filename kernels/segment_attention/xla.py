"""XLA implementation: whole rows as one block, or pairs of blocks that can share a segment.

Besides the letters of the specification: p blocks of a row, z all blocks of all rows, a and c the query and the key within a block, x the
queries of a block for all heads of a key-value head. Arrays of weights have four axes, ``[z, n, a, c]``: with more, even of size 1, XLA
on a CPU takes twice as long.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

from cda4rec_jax.kernels.segment_attention.dropout import keep_weights


class _Static(NamedTuple):
    kind: Literal["softmax", "silu"]
    dropout_rate: float
    wide: np.dtype  # of logits and sums


class _Inputs(NamedTuple):
    """Operands cut into blocks, head-major, so that the products are plain batched ones."""

    query: Float[Array, "r p m x h"]
    key: Float[Array, "r p m c h"]
    value: Float[Array, "r p m c h"]
    segment_ids: Int[Array, "r p c"]
    bias: Float[Array, "n distances"] | None  # by distance, from 1 - c on
    seeds: UInt32[Array, "r n two"] | None


@partial(jax.jit, static_argnames=("kind", "dropout_rate", "block_size", "wide"))
def segment_attention_xla(
    query: Float[Array, "r t n h"],
    key: Float[Array, "r t m h"],
    value: Float[Array, "r t m h"],
    segment_ids: Int[Array, "r t"],
    bias: Float[Array, "n t"] | None,
    seeds: UInt32[Array, "r n two"] | None,
    kind: Literal["softmax", "silu"],
    dropout_rate: float,
    block_size: int,
    wide: np.dtype,
) -> Float[Array, "r t n h"]:
    """``out_t = sum_{u that t reads} w_tu v_u``, with the weights of the docstring of ``segment_attention``."""
    rows, length, heads, head_size = query.shape
    kv_heads = key.shape[2]
    size = max(1, min(block_size, length))
    blocks = -(-length // size)
    padding = blocks * size - length

    def cut(array: Array, groups: int) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, padding), (0, 0), (0, 0)))
        split = padded.reshape(rows, blocks, size, kv_heads, groups, head_size).transpose(0, 1, 3, 4, 2, 5)
        return split.reshape(rows, blocks, kv_heads, groups * size, head_size)

    inputs = _Inputs(
        query=cut(query, heads // kv_heads),
        key=cut(key, 1),
        value=cut(value, 1),
        segment_ids=jnp.pad(segment_ids, ((0, 0), (0, padding))).reshape(rows, blocks, size),
        bias=None if bias is None else jnp.pad(bias, ((0, 0), (size - 1, padding))),
        seeds=seeds,
    )
    static = _Static(kind, dropout_rate, wide)
    if blocks <= 1:
        out = _one_block(static, inputs)
    elif jax.default_backend() == "cpu":
        # One row after the other stays in cache, and each row skips for itself.
        def one_row(_: None, row: _Inputs) -> tuple[None, Array]:
            return None, _many_blocks(static, row)

        _, out = jax.lax.scan(one_row, None, _each_row(inputs))
    else:
        out = _many_blocks(static, inputs)
    out = out.reshape(rows, blocks, heads, size, head_size).transpose(0, 1, 3, 2, 4)
    return out.reshape(rows, blocks * size, heads, head_size)[:, :length]


def _one_block(static: _Static, inputs: _Inputs) -> Float[Array, "r p m x h"]:
    """Whole rows. Automatic differentiation is as fast here as a backward pass by hand."""
    logits = _logits(static, inputs, inputs.key, 0)
    reads = _reads(inputs.segment_ids, inputs.segment_ids, 0)
    if static.kind == "softmax":
        weights = jax.nn.softmax(jnp.where(reads, logits, jnp.finfo(static.wide).min), axis=-1)
    else:
        counts = jnp.maximum(jnp.sum(reads, axis=-1, keepdims=True), 1).astype(static.wide)
        weights = jnp.where(reads, jax.nn.silu(logits), 0.0) / counts
    out = _mix(_dropped(static, inputs, weights, 0), inputs.value)
    # The softmax of a padding token is uniform: to blot it out here is cheaper than in the weights.
    real = jnp.tile(_fold(inputs.segment_ids) > 0, (1, inputs.query.shape[3] // inputs.key.shape[3]))
    return jnp.where(real[:, None, :, None], out, 0.0).astype(inputs.value.dtype).reshape(inputs.query.shape)


def _forward(static: _Static, inputs: _Inputs) -> tuple[Array, tuple[_Inputs, Array, Array]]:
    """Softmax in one pass with a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867)."""
    lowest = jnp.finfo(static.wide).min
    per_query = (*_logits_shape(inputs)[:3], 1)
    mixed_shape = _fold(inputs.query).shape

    def step(distance: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, maxima, sums = carry
        logits = _logits(static, inputs, _earlier(inputs.key, distance), distance)
        reads = _reads(inputs.segment_ids, _earlier(inputs.segment_ids, distance), distance)
        if static.kind == "softmax":
            logits = jnp.where(reads, logits, lowest)
            higher = jnp.maximum(maxima, jnp.max(logits, axis=-1, keepdims=True))
            weights, shrink = jnp.where(reads, jnp.exp(logits - higher), 0.0), jnp.exp(maxima - higher)
            maxima, sums = higher, sums * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            mixed = mixed * shrink.reshape(*mixed_shape[:3], 1)
        else:
            weights = jnp.where(reads, jax.nn.silu(logits), 0.0)
            sums = sums + jnp.sum(reads, axis=-1, keepdims=True).astype(static.wide)
        weights = _dropped(static, inputs, weights, distance)
        return mixed + _mix(weights, _earlier(inputs.value, distance)), maxima, sums

    start = (
        jnp.zeros(mixed_shape, static.wide),
        jnp.full(per_query, lowest, static.wide),
        jnp.zeros(per_query, static.wide),
    )
    mixed, maxima, sums = jax.lax.fori_loop(0, _num_distances(inputs.segment_ids), step, start)
    sums = jnp.where(sums > 0, sums, 1.0)  # a padding token sums over nothing
    out = (mixed / sums.reshape(*mixed_shape[:3], 1)).astype(inputs.value.dtype).reshape(inputs.query.shape)
    return out, (inputs, out, maxima + jnp.log(sums) if static.kind == "softmax" else sums)


def _backward(static: _Static, residuals: tuple[_Inputs, Array, Array], d_out: Array) -> tuple[_Inputs]:
    """The weights again, from the logits and their normaliser: the logarithm of the softmax's sum, or the count."""
    inputs, out, normaliser = residuals
    kv_heads = inputs.key.shape[2]
    narrow, wide = inputs.value.dtype, static.wide
    delta = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1).reshape(normaliser.shape)
    query, d_out = _fold(inputs.query), _fold(d_out)

    def step(distance: Array, carry: _Inputs) -> _Inputs:
        keys, values = _earlier(inputs.key, distance), _earlier(inputs.value, distance)
        logits = _logits(static, inputs, keys, distance)
        reads = _reads(inputs.segment_ids, _earlier(inputs.segment_ids, distance), distance)
        d_weights = jnp.einsum("zmxh,zmch->zmxc", d_out, _fold(values), preferred_element_type=wide)
        d_weights = _dropped(static, inputs, d_weights.reshape(logits.shape), distance)
        if static.kind == "softmax":
            weights = jnp.where(reads, jnp.exp(logits - normaliser), 0.0)
            d_logits = weights * (d_weights - delta)
        else:
            gates = jnp.where(reads, jax.nn.sigmoid(logits), 0.0) / normaliser
            weights = logits * gates
            d_logits = gates * (1.0 + logits * (1.0 - jax.nn.sigmoid(logits))) * d_weights
        dropped = _by_kv_head(_dropped(static, inputs, weights, distance), kv_heads).astype(narrow)
        d_key = jnp.einsum("zmxc,zmxh->zmch", _by_kv_head(d_logits, kv_heads).astype(narrow), query, preferred_element_type=wide)
        d_value = jnp.einsum("zmxc,zmxh->zmch", dropped, d_out, preferred_element_type=wide)
        return carry._replace(
            query=carry.query + _mix(d_logits, keys).reshape(carry.query.shape),
            key=carry.key + _later(d_key.reshape(carry.key.shape), distance),
            value=carry.value + _later(d_value.reshape(carry.value.shape), distance),
            bias=None if carry.bias is None else _with_bias_gradient(carry.bias, d_logits, distance),
        )

    differentiable = inputs._replace(segment_ids=None, seeds=None)
    start = jax.tree.map(lambda array: jnp.zeros(array.shape, wide), differentiable)
    gradients = jax.lax.fori_loop(0, _num_distances(inputs.segment_ids), step, start)
    return (jax.tree.map(lambda gradient, array: gradient.astype(array.dtype), gradients, differentiable),)


_many_blocks = jax.custom_vjp(lambda static, inputs: _forward(static, inputs)[0], nondiff_argnums=(0,))
_many_blocks.defvjp(_forward, _backward)


def _logits_shape(inputs: _Inputs) -> tuple[int, int, int, int]:
    rows, blocks, kv_heads, size, _ = inputs.key.shape
    return rows * blocks, kv_heads * (inputs.query.shape[3] // size), size, size


def _logits(
    static: _Static, inputs: _Inputs, keys: Float[Array, "r p m c h"], distance: Int[Array, ""] | int
) -> Float[Array, "z n a c"]:
    """Query blocks against ``keys``, the key blocks that lie ``distance`` blocks before them."""
    logits = jnp.einsum("zmxh,zmch->zmxc", _fold(inputs.query), _fold(keys), preferred_element_type=static.wide)
    logits = logits.reshape(_logits_shape(inputs))
    if inputs.bias is None:
        return logits
    size = logits.shape[3]
    window = jax.lax.dynamic_slice_in_dim(inputs.bias, distance * size, 2 * size - 1, axis=1)
    return logits + _toeplitz(window)[None]


def _reads(
    query_segments: Int[Array, "r p a"], key_segments: Int[Array, "r p c"], distance: Int[Array, ""] | int
) -> Bool[Array, "z one a c"]:
    """True where a query reads a key: the same segment, not later, no padding, and a block that exists."""
    _, blocks, size = query_segments.shape
    same = query_segments[:, :, :, None] == key_segments[:, :, None, :]
    not_later = jnp.tril(jnp.ones((size, size), bool)) | (distance > 0)
    exists = jnp.arange(blocks) >= distance
    real = (query_segments > 0) & exists[None, :, None]
    return _fold(same & real[..., None] & not_later[None, None])[:, None]


def _dropped(
    static: _Static, inputs: _Inputs, weights: Float[Array, "z n a c"], distance: Int[Array, ""] | int
) -> Float[Array, "z n a c"]:
    if inputs.seeds is None:
        return weights
    rows, blocks, size = inputs.segment_ids.shape
    positions = jnp.tile(jnp.arange(blocks * size).reshape(blocks, 1, 1, size), (rows, 1, 1, 1))
    seeds = jnp.repeat(inputs.seeds, blocks, axis=0)[:, :, None, None]
    keep = keep_weights(seeds, positions.swapaxes(2, 3), positions - distance * size, static.dropout_rate)
    return jnp.where(keep, weights / (1.0 - static.dropout_rate), 0.0)


def _mix(weights: Float[Array, "z n a c"], values: Float[Array, "r p m c h"]) -> Float[Array, "z m x h"]:
    narrow = _by_kv_head(weights, values.shape[2]).astype(values.dtype)
    return jnp.einsum("zmxc,zmch->zmxh", narrow, _fold(values), preferred_element_type=weights.dtype)


def _by_kv_head(weights: Float[Array, "z n a c"], kv_heads: int) -> Float[Array, "z m x c"]:
    return weights.reshape(weights.shape[0], kv_heads, -1, weights.shape[3])


def _fold(blocks: Array) -> Array:
    return blocks.reshape(-1, *blocks.shape[2:])


def _each_row(inputs: _Inputs) -> _Inputs:
    """Inputs with one more leading axis, over rows, for a scan."""
    rows = inputs.key.shape[0]
    per_row = jax.tree.map(lambda array: array[:, None], inputs._replace(bias=None))
    return per_row._replace(bias=None if inputs.bias is None else jnp.broadcast_to(inputs.bias[None], (rows, *inputs.bias.shape)))


def _earlier(blocks: Array, distance: Int[Array, ""]) -> Array:
    """At p, the block p - distance; some other block where there is none."""
    return jnp.take(blocks, jnp.maximum(jnp.arange(blocks.shape[1]) - distance, 0), axis=1)


def _later(blocks: Float[Array, "r p m c h"], distance: Int[Array, ""]) -> Float[Array, "r p m c h"]:
    """At p, the block p + distance; 0 where there is none."""
    return jnp.take(blocks, jnp.arange(blocks.shape[1]) + distance, axis=1, mode="fill", fill_value=0)


def _num_distances(segment_ids: Int[Array, "r p c"]) -> Int[Array, ""]:
    """One more than the largest distance between blocks whose ranges of segments overlap in any row; 0 without any token."""
    real = segment_ids > 0
    lowest = jnp.min(jnp.where(real, segment_ids, jnp.iinfo(segment_ids.dtype).max), axis=2)
    highest = jnp.max(jnp.where(real, segment_ids, 0), axis=2)
    share = (lowest[:, :, None] <= highest[:, None, :]) & (lowest[:, None, :] <= highest[:, :, None])
    numbers = jnp.arange(segment_ids.shape[1])
    distances = numbers[:, None] - numbers[None, :]
    return jnp.max(jnp.where(share & (distances >= 0)[None], distances[None] + 1, 0), initial=0)


def _toeplitz(window: Float[Array, "n distances"]) -> Float[Array, "n a c"]:
    """``out[n, a, c] = window[n, size - 1 + a - c]`` for ``2 size - 1`` distances; by reshapes, since the transpose of a gather is slow."""
    heads, width = window.shape
    size = (width + 1) // 2
    rows = jnp.broadcast_to(jnp.pad(window[:, ::-1], ((0, 0), (0, 1)))[:, None], (heads, size, width + 1))
    # Rows that are read one element too short drift by one element a row.
    drifting = rows.reshape(heads, -1)[:, : size * width].reshape(heads, size, width)
    return drifting[:, :, size - 1 :]


def _with_bias_gradient(
    d_bias: Float[Array, "n distances"], d_logits: Float[Array, "z n a c"], distance: Int[Array, ""]
) -> Float[Array, "n distances"]:
    size = d_logits.shape[3]
    window = jax.ShapeDtypeStruct((d_logits.shape[1], 2 * size - 1), d_logits.dtype)
    (d_window,) = jax.linear_transpose(_toeplitz, window)(jnp.sum(d_logits, axis=0))
    old = jax.lax.dynamic_slice_in_dim(d_bias, distance * size, 2 * size - 1, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(d_bias, old + d_window, distance * size, axis=1)
