"""Sharded XLA implementation: tokens over one axis of a mesh, items over the other.

A device computes the logits of its tokens against its items, one chunk of tokens at a time; of what crosses devices, the softmax takes
two numbers a token (its maximum and its sum), and each gradient one sum over the axis along which it is not split.

Sampled items are few: every device has their rows, and each takes its part of the tokens, which both axes split then.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from cda4rec_jax.kernels.linear_cross_entropy.sampled import sampled_cross_entropy
from cda4rec_jax.kernels.linear_cross_entropy.xla import backward, in_chunks, sampled_xla

DATA_AXIS, ITEM_AXIS = "data", "items"


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def linear_cross_entropy_sharded(
    mesh: Mesh,
    chunk_size: int,
    num_items: int,
    hidden: Float[Array, "t d"],
    items: Float[Array, "i d"],
    targets: Int[Array, "t"],
    weights: Float[Array, "t"],
) -> Float[Array, ""]:
    """``sum_t w_t * (logsumexp_{1 <= i' <= num_items}(h_t . e_i') - h_t . e_target)``.

    The weight must be 0 where the target is 0; tokens and items must divide among the devices of their axis.
    """
    return _forward(mesh, chunk_size, num_items, hidden, items, targets, weights)[0]


def _forward(
    mesh: Mesh, chunk_size: int, num_items: int, hidden: Array, items: Array, targets: Array, weights: Array
) -> tuple[Array, tuple[Array, ...]]:
    tokens, rows, whole = PartitionSpec(DATA_AXIS), PartitionSpec(ITEM_AXIS), PartitionSpec()
    on_each_device = jax.shard_map(
        partial(_on_one_device, chunk_size, num_items),
        mesh=mesh,
        in_specs=(tokens, rows, tokens, tokens),
        out_specs=(whole, (tokens, rows, tokens)),
        check_vma=False,  # the check wants casts in the scan whose name changed between versions of JAX
    )
    return on_each_device(hidden, items, targets, weights)


def _on_one_device(
    chunk_size: int, num_items: int, hidden: Array, items: Array, targets: Array, weights: Array
) -> tuple[Array, tuple[Array, ...]]:
    """Loss of all tokens; gradients for the tokens and the items of this device, and its tokens' losses."""
    narrow, wide = hidden.dtype, items.dtype
    product = partial(jnp.matmul, preferred_element_type=wide)
    rows = items.astype(narrow)
    columns = rows.T
    first = jax.lax.axis_index(ITEM_AXIS) * rows.shape[0]
    numbers = first + jnp.arange(rows.shape[0])
    is_class = ((numbers >= 1) & (numbers <= num_items))[None]

    def chunk_step(d_columns: Array, chunk: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        chunk_hidden, chunk_weights = chunk
        logits = jnp.where(is_class, product(chunk_hidden, columns), -jnp.inf)
        maxima = jax.lax.pmax(jnp.max(logits, axis=1, keepdims=True), ITEM_AXIS)
        exponentials = jnp.exp(logits - maxima)
        sums = jax.lax.psum(jnp.sum(exponentials, axis=1, keepdims=True), ITEM_AXIS)
        scales = chunk_weights[:, None] / sums
        exponentials = exponentials.astype(narrow)
        d_columns = d_columns + product((chunk_hidden * scales).astype(narrow).T, exponentials)
        return d_columns, ((jnp.log(sums) + maxima)[:, 0], product(exponentials, rows) * scales)

    chunks = (in_chunks(hidden, chunk_size), in_chunks(weights, chunk_size))
    d_columns, (logsumexps, d_hidden) = jax.lax.scan(chunk_step, jnp.zeros(columns.shape, wide), chunks)

    local = targets - first
    here = (local >= 0) & (local < rows.shape[0])
    target_rows = jnp.where(here[:, None], rows[jnp.clip(local, 0, rows.shape[0] - 1)], 0).astype(wide)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]] - weights[:, None] * target_rows
    d_items = d_columns.T.at[jnp.where(here, local, rows.shape[0])].add(-weights[:, None] * hidden, mode="drop")
    target_logits = jax.lax.psum(jnp.sum(hidden.astype(wide) * target_rows, axis=1), ITEM_AXIS)
    losses = logsumexps.reshape(-1)[: hidden.shape[0]] - target_logits
    gradients = (jax.lax.psum(d_hidden, ITEM_AXIS).astype(narrow), jax.lax.psum(d_items, DATA_AXIS), losses)
    return jax.lax.psum(jnp.sum(weights * losses), DATA_AXIS), gradients


def _backward(
    mesh: Mesh, chunk_size: int, num_items: int, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, None, Array]:
    del mesh, chunk_size, num_items
    return backward(residuals, cotangent)


linear_cross_entropy_sharded.defvjp(_forward, _backward)


def take_rows(mesh: Mesh, items: Float[Array, "i d"], numbers: Int[Array, "n"], *, split: bool) -> Float[Array, "n d"]:
    """``items[numbers]`` of a table that is divided over the items' axis; no device gathers the table.

    ``split`` divides numbers and rows over the tokens' axis; otherwise every device has all of them.
    """

    def on_one_device(items: Array, numbers: Array) -> Array:
        local = numbers - jax.lax.axis_index(ITEM_AXIS) * items.shape[0]
        here = (local >= 0) & (local < items.shape[0])
        return jax.lax.psum(jnp.where(here[:, None], items[jnp.clip(local, 0, items.shape[0] - 1)], 0), ITEM_AXIS)

    spec = PartitionSpec(DATA_AXIS) if split else PartitionSpec()
    table = PartitionSpec(ITEM_AXIS)
    return jax.shard_map(on_one_device, mesh=mesh, in_specs=(table, spec), out_specs=spec, check_vma=False)(items, numbers)


def sampled_sharded(
    mesh: Mesh,
    chunk_size: int,
    hidden: Float[Array, "t d"],
    rows: Float[Array, "rows d"],
    offsets: Float[Array, "rows"],
    hits: Int[Array, "t 2"],
    target_rows: Float[Array, "t d"],
    weights: Float[Array, "t"],
) -> Float[Array, ""]:
    """``sampled_cross_entropy`` by XLA; tokens must divide among all devices."""

    def on_one_device(*arrays: Array) -> Array:
        loss: Any = sampled_cross_entropy(partial(sampled_xla, chunk_size), *arrays)
        return loss[None]

    tokens, whole = PartitionSpec((DATA_AXIS, ITEM_AXIS)), PartitionSpec()
    in_specs = (tokens, whole, whole, tokens, tokens, tokens)
    on_each_device = jax.shard_map(on_one_device, mesh=mesh, in_specs=in_specs, out_specs=tokens, check_vma=False)
    return jnp.sum(on_each_device(hidden, rows, offsets, hits, target_rows, weights))
