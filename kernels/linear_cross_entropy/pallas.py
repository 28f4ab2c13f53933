"""For GPU (Triton): logits exist in registers only, one block at a time, as in Cut Cross-Entropy (Wijmans et al., arXiv 2411.09009).

Three kernels: the log of the normaliser of each token, the gradient of the tokens, and that of the items. The last two make the logits
again, which costs less than to write [tokens, items] and read it back. A program owns a block of rows, loops over blocks of the other
side, and adds up nothing outside of itself. Where that gives too few programs, loops are cut into segments whose results XLA adds up.

Products take their operands in the dtype of ``hidden`` and accumulate in that of ``weights``, as in ``xla``.
"""

from collections.abc import Callable
from functools import partial

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


def _log_sums_kernel(tokens_ref, rows_ref, out_ref, *, blocks: Callable, num_rows: int):
    """``log sum_{i >= 1} exp(h_t . e_i)`` of a block of tokens over a segment of the items."""
    tokens = tokens_ref[...]

    def step(first: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        maxima, sums = carry
        logits = _logits(tokens, rows_ref[pl.ds(first, ITEMS), :], first, 1, num_rows, out_ref.dtype)
        largest = jnp.maximum(maxima, jnp.max(logits, axis=1, keepdims=True))
        return largest, sums * jnp.exp(maxima - largest) + jnp.sum(jnp.exp(logits - largest), axis=1, keepdims=True)

    # The maximum begins finite: of a segment without items it stays so, and -inf less -inf would be no number.
    begin = jnp.full(out_ref.shape, jnp.finfo(out_ref.dtype).min, out_ref.dtype), jnp.zeros(out_ref.shape, out_ref.dtype)
    maxima, sums = blocks(step, begin)
    out_ref[...] = maxima + jnp.log(sums)


def _expected_items_kernel(tokens_ref, log_sums_ref, rows_ref, out_ref, *, blocks: Callable, num_rows: int):
    """``sum_i p_t(i) e_i`` of a block of tokens over a segment of the items."""
    tokens, log_sums = tokens_ref[...], log_sums_ref[...]

    def step(first: Array, total: Array) -> Array:
        rows = rows_ref[pl.ds(first, ITEMS), :]
        shares = jnp.exp(_logits(tokens, rows, first, 1, num_rows, out_ref.dtype) - log_sums)
        return total + _product(shares.astype(rows.dtype), rows, 0, out_ref.dtype)

    out_ref[...] = blocks(step, jnp.zeros(out_ref.shape, out_ref.dtype))


def _weighted_hidden_kernel(rows_ref, tokens_ref, log_sums_ref, scaled_ref, out_ref, *, blocks: Callable, num_rows: int):
    """``sum_t p_t(i) w_t h_t`` of a block of items over a segment of the tokens; ``scaled_ref`` has ``w_t h_t``.

    A token of padding meets a row of zeros, and its share is finite, since its log sum is that of logits of 0.
    """
    rows = rows_ref[...]
    first_row = pl.program_id(0) * ITEMS

    def step(first: Array, total: Array) -> Array:
        tokens, log_sums, scaled = (ref[pl.ds(first, TOKENS), :] for ref in (tokens_ref, log_sums_ref, scaled_ref))
        logits = _logits(rows, tokens, first_row, 0, num_rows, out_ref.dtype)
        shares = jnp.exp(logits - log_sums.reshape(1, TOKENS))
        return total + _product(shares.astype(scaled.dtype), scaled, 0, out_ref.dtype)

    out_ref[...] = blocks(step, jnp.zeros(out_ref.shape, out_ref.dtype))


def _product(left: Array, right: Array, axis: int, dtype: jnp.dtype) -> Array:
    """The columns of ``left`` with that axis of ``right``."""
    precision = jax.lax.Precision.HIGHEST if left.dtype.itemsize >= 4 else None
    return jax.lax.dot_general(left, right, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=dtype)


def _logits(left: Array, right: Array, first_item: Array, item_axis: int, num_rows: int, dtype: jnp.dtype) -> Array:
    """``left @ right.T``; -inf for row 0 of the items and for rows past their end."""
    logits = _product(left, right, 1, dtype)
    numbers = first_item + jax.lax.broadcasted_iota(jnp.int32, logits.shape, item_axis)
    return jnp.where((numbers > 0) & (numbers < num_rows), logits, -jnp.inf)


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
