"""For GPU (Triton): logits exist in registers only, one block at a time, as in Cut Cross-Entropy (Wijmans et al., arXiv 2411.09009).

Three kernels: the log of the normaliser of each token, the gradient of the tokens, and that of the items. The last two make the logits
again, which costs less than to write [tokens, items] and read it back. A program owns a block of rows, loops over blocks of the other
side, and adds up nothing outside of itself. Where that gives too few programs, loops are cut into segments whose results XLA adds up.

Products take their operands in the dtype of ``hidden`` and accumulate in that of ``weights``, as in ``xla``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from cda4rec_jax.kernels.pallas_backend import LEAST_TRITON_WIDTH

TOKENS, ITEMS = 64, 64  # of a block
PROGRAMS = 512  # at least, where there are so many blocks: a GPU has some 130 processors


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_cross_entropy_pallas(
    interpret: bool,
    hidden: Float[Array, "t d"],
    items: Float[Array, "i d"],
    targets: Int[Array, "t"],
    weights: Float[Array, "t"],
) -> Float[Array, ""]:
    """``sum_t w_t * (logsumexp_{i' >= 1}(h_t . e_i') - h_t . e_target)``; the weight must be 0 where the target is 0."""
    return _forward(interpret, hidden, items, targets, weights)[0]


def _forward(interpret: bool, hidden: Array, items: Array, targets: Array, weights: Array) -> tuple[Array, tuple[Array, ...]]:
    tokens, rows = _padded(hidden, TOKENS), _padded(items.astype(hidden.dtype), ITEMS)
    kernel = partial(_log_sums_kernel, num_rows=items.shape[0])
    segments = _call(kernel, (tokens,), (rows,), (TOKENS, ITEMS), 1, weights.dtype, interpret)
    log_sums = jax.nn.logsumexp(segments, axis=0)
    target_rows = items[targets].astype(hidden.dtype).astype(weights.dtype)
    losses = log_sums[: hidden.shape[0], 0] - jnp.sum(hidden.astype(weights.dtype) * target_rows, axis=1)
    return jnp.sum(weights * losses), (hidden, items, targets, weights, log_sums, losses)


def _backward(interpret: bool, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None, Array]:
    hidden, items, targets, weights, log_sums, losses = residuals
    num_rows, (num_tokens, width), wide = items.shape[0], hidden.shape, weights.dtype
    scales = (cotangent * weights)[:, None]
    scaled = scales * hidden.astype(wide)
    tokens, rows = _padded(hidden, TOKENS), _padded(items.astype(hidden.dtype), ITEMS)
    call = partial(_call, width=tokens.shape[1], dtype=wide, interpret=interpret)

    kernel = partial(_expected_items_kernel, num_rows=num_rows)
    expected = call(kernel, (tokens, log_sums), (rows,), (TOKENS, ITEMS)).sum(axis=0)[:num_tokens, :width]
    d_hidden = scales * (expected - items[targets].astype(hidden.dtype).astype(wide))

    kernel = partial(_weighted_hidden_kernel, num_rows=num_rows)
    looped = (tokens, log_sums, _padded(scaled.astype(hidden.dtype), TOKENS))
    d_items = call(kernel, (rows,), looped, (ITEMS, TOKENS)).sum(axis=0)[:num_rows, :width].at[targets].add(-scaled)
    return d_hidden.astype(hidden.dtype), d_items.astype(items.dtype), None, cotangent * losses


linear_cross_entropy_pallas.defvjp(_forward, _backward)


def sampled_pallas(
    interpret: bool,
    hidden: Float[Array, "t d"],
    rows: Float[Array, "rows d"],
    offsets: Float[Array, "rows"],
    hits: Int[Array, "t 2"],
    target_logits: Float[Array, "t"],
    weights: Float[Array, "t"],
) -> tuple[Float[Array, "t"], Float[Array, "t d"], Float[Array, "rows d"]]:
    """Losses, and the gradients through the sampled rows, as ``sampled_cross_entropy`` wants them."""
    (num_tokens, width), num_rows, wide = hidden.shape, rows.shape[0], weights.dtype
    tokens, operands = _padded(hidden, TOKENS), _padded(rows.astype(hidden.dtype), ITEMS)
    ranges = jnp.pad(hits, ((0, tokens.shape[0] - num_tokens), (0, 0)))
    added = jnp.pad(offsets[:, None], ((0, operands.shape[0] - num_rows), (0, 0)))
    call = partial(_call, dtype=wide, interpret=interpret)

    kernel = partial(_log_sums_kernel, num_rows=num_rows)
    segments = call(kernel, (tokens, ranges), (operands, added), (TOKENS, ITEMS), width=1)
    of_target = jnp.pad(target_logits[:, None], ((0, tokens.shape[0] - num_tokens), (0, 0)))
    log_sums = jnp.logaddexp(jax.nn.logsumexp(segments, axis=0), of_target)

    kernel, scales = partial(_expected_items_kernel, num_rows=num_rows), weights[:, None]
    expected = call(kernel, (tokens, log_sums, ranges), (operands, added), (TOKENS, ITEMS), width=tokens.shape[1])
    scaled = _padded((scales * hidden.astype(wide)).astype(hidden.dtype), TOKENS)
    kernel = partial(_weighted_hidden_kernel, num_rows=num_rows)
    d_rows = call(kernel, (operands, added), (tokens, log_sums, scaled, ranges), (ITEMS, TOKENS), width=tokens.shape[1])
    losses = (log_sums - of_target)[:num_tokens, 0]
    return losses, scales * expected.sum(axis=0)[:num_tokens, :width], d_rows.sum(axis=0)[:num_rows, :width]


def _log_sums_kernel(*refs, blocks: Callable, num_rows: int):
    """``log sum_{i >= 1} exp(h_t . e_i)`` of a block of tokens over a segment of the items."""
    tokens_ref, rows_ref, out_ref, hits_ref, offsets_ref = _refs_in_order(refs, 3, hits=1, offsets=3)
    tokens, hits = tokens_ref[...], _ranges(hits_ref, slice(None))

    def step(first: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        maxima, sums = carry
        rows, offsets = rows_ref[pl.ds(first, ITEMS), :], _part(offsets_ref, first)
        logits = _logits(tokens, rows, first, 1, num_rows, out_ref.dtype, hits, offsets)
        largest = jnp.maximum(maxima, jnp.max(logits, axis=1, keepdims=True))
        return largest, sums * jnp.exp(maxima - largest) + jnp.sum(jnp.exp(logits - largest), axis=1, keepdims=True)

    # The maximum begins finite: of a segment without items it stays so, and -inf less -inf would be no number.
    begin = jnp.full(out_ref.shape, jnp.finfo(out_ref.dtype).min, out_ref.dtype), jnp.zeros(out_ref.shape, out_ref.dtype)
    maxima, sums = blocks(step, begin)
    out_ref[...] = maxima + jnp.log(sums)


def _expected_items_kernel(*refs, blocks: Callable, num_rows: int):
    """``sum_i p_t(i) e_i`` of a block of tokens over a segment of the items."""
    tokens_ref, log_sums_ref, rows_ref, out_ref, hits_ref, offsets_ref = _refs_in_order(refs, 4, hits=2, offsets=4)
    tokens, log_sums, hits = tokens_ref[...], log_sums_ref[...], _ranges(hits_ref, slice(None))

    def step(first: Array, total: Array) -> Array:
        rows = rows_ref[pl.ds(first, ITEMS), :]
        offsets = _part(offsets_ref, first)
        shares = jnp.exp(_logits(tokens, rows, first, 1, num_rows, out_ref.dtype, hits, offsets) - log_sums)
        return total + _product(shares.astype(rows.dtype), rows, 0, out_ref.dtype)

    out_ref[...] = blocks(step, jnp.zeros(out_ref.shape, out_ref.dtype))


def _weighted_hidden_kernel(*refs, blocks: Callable, num_rows: int):
    """``sum_t p_t(i) w_t h_t`` of a block of items over a segment of the tokens; ``scaled_ref`` has ``w_t h_t``.

    A token of padding meets a row of zeros, and its share is finite, since its log sum is that of logits of 0.
    """
    named = _refs_in_order(refs, 5, hits=5, offsets=1)
    rows_ref, tokens_ref, log_sums_ref, scaled_ref, out_ref, hits_ref, offsets_ref = named
    rows, offsets = rows_ref[...], None if offsets_ref is None else offsets_ref[...]
    first_row = pl.program_id(0) * ITEMS

    def step(first: Array, total: Array) -> Array:
        tokens, log_sums, scaled = (ref[pl.ds(first, TOKENS), :] for ref in (tokens_ref, log_sums_ref, scaled_ref))
        hits = _ranges(hits_ref, pl.ds(first, TOKENS))
        logits = _logits(rows, tokens, first_row, 0, num_rows, out_ref.dtype, hits, offsets)
        shares = jnp.exp(logits - log_sums.reshape(1, TOKENS))
        return total + _product(shares.astype(scaled.dtype), scaled, 0, out_ref.dtype)

    out_ref[...] = blocks(step, jnp.zeros(out_ref.shape, out_ref.dtype))


def _product(left: Array, right: Array, axis: int, dtype: jnp.dtype) -> Array:
    """The columns of ``left`` with that axis of ``right``."""
    precision = jax.lax.Precision.HIGHEST if left.dtype.itemsize >= 4 else None
    return jax.lax.dot_general(left, right, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=dtype)


def _refs_in_order(refs: tuple, num_plain: int, *, hits: int, offsets: int) -> tuple:
    """The ``num_plain`` refs that every call has, then those of the hits and the offsets: None where no items are sampled."""
    if len(refs) == num_plain:
        return *refs, None, None
    return *(ref for place, ref in enumerate(refs) if place not in (hits, offsets)), refs[hits], refs[offsets]


def _part(offsets_ref: Any, first: Array) -> Array | None:
    return None if offsets_ref is None else offsets_ref[pl.ds(first, ITEMS), :]


def _ranges(hits_ref: Any, tokens: Any) -> tuple[Array, Array] | None:
    """First row of each token's hits, and the one after the last."""
    return None if hits_ref is None else (hits_ref[tokens, pl.ds(0, 1)], hits_ref[tokens, pl.ds(1, 1)])


def _logits(
    left: Array,
    right: Array,
    first_item: Array,
    item_axis: int,
    num_rows: int,
    dtype: jnp.dtype,
    hits: tuple[Array, Array] | None,
    offsets: Array | None,
) -> Array:
    """``left @ right.T``; -inf for row 0 of the items and for rows past their end. With offsets of the items, and without hits."""
    logits = _product(left, right, 1, dtype)
    numbers = first_item + jax.lax.broadcasted_iota(jnp.int32, logits.shape, item_axis)
    is_class = (numbers > 0) & (numbers < num_rows)
    if hits is None or offsets is None:
        return jnp.where(is_class, logits, -jnp.inf)
    of_tokens, of_items = ((-1, 1), (1, -1)) if item_axis == 1 else ((1, -1), (-1, 1))
    first, last = (bound.reshape(of_tokens) for bound in hits)
    return jnp.where(is_class & ((numbers < first) | (numbers >= last)), logits + offsets.reshape(of_items), -jnp.inf)


def _padded(rows: Float[Array, "n d"], multiple: int) -> Float[Array, "padded width"]:
    """With whole blocks, at least one, and a width that is a power of two."""
    num_rows, width = rows.shape
    more = max(multiple, pl.cdiv(num_rows, multiple) * multiple) - num_rows
    return jnp.pad(rows, ((0, more), (0, pl.next_power_of_2(max(LEAST_TRITON_WIDTH, width)) - width)))


def _call(
    kernel: partial[None],
    owned: tuple[Array, ...],
    looped: tuple[Array, ...],
    sizes: tuple[int, int],
    width: int,
    dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "segments rows width"]:
    """The kernel on every block of ``sizes[0]`` rows of ``owned``, with blocks of ``sizes[1]`` rows of ``looped`` in segments."""
    num_owned, num_looped = owned[0].shape[0] // sizes[0], looped[0].shape[0] // sizes[1]
    segments = min(num_looped, pl.cdiv(PROGRAMS, num_owned))
    most = pl.cdiv(num_looped, segments)

    def blocks(step: Callable, begin: Array | tuple[Array, ...]) -> Array | tuple[Array, ...]:
        first = pl.program_id(1) * most
        last = jnp.minimum(first + most, num_looped)
        return jax.lax.fori_loop(first, last, lambda block, carry: step(block * sizes[1], carry), begin)

    return pl.pallas_call(
        partial(kernel, blocks=blocks),
        grid=(num_owned, segments),
        in_specs=[pl.BlockSpec((sizes[0], array.shape[1]), lambda block, _: (block, 0)) for array in owned]
        + [pl.no_block_spec] * len(looped),
        out_specs=pl.BlockSpec((None, sizes[0], width), lambda block, segment: (segment, block, 0)),
        out_shape=jax.ShapeDtypeStruct((segments, owned[0].shape[0], width), dtype),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2),
        name=f"linear_cross_entropy{kernel.func.__name__.removesuffix('_kernel')}",
    )(*owned, *looped)
