"""The C++ custom call, of float32 on a CPU: one forward pass makes loss and gradients, as in the chunked XLA version."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from cda4rec_jax.kernels.linear_cross_entropy.xla import backward
from cda4rec_jax.kernels.native_build import provide

SOURCE = Path(__file__).with_name("native.cc")
_TARGET, _SAMPLED_TARGET = "cda4rec_jax_linear_cross_entropy", "cda4rec_jax_sampled_cross_entropy"
_LANES = 16  # widths come in multiples of it, whatever the processor
_TOKENS = 64  # so do chunks
_EXACT = (
    "highest",
    "float32",
    "F32_F32_F32",
    "F64_F64_F64",
    "BF16_BF16_F32_X6",
    "BF16_BF16_F32_X9",
)  # of jax.default_matmul_precision


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_cross_entropy_native(
    chunk_size: int,
    hidden: Float[Array, "t d"],
    items: Float[Array, "i d"],
    targets: Int[Array, "t"],
    weights: Float[Array, "t"],
) -> Float[Array, ""]:
    """As ``linear_cross_entropy_xla``, of float32 on a CPU. ``native_problem`` must have returned None.

    On a processor with a matrix unit (AMX) each operand of a product is split into two bfloat16, which keep 17 of its 24 bits, unless
    ``jax.default_matmul_precision`` is "highest" or "float32". Tokens without a target cost nothing. Beside its results it takes the
    logits of a chunk (of at least 64 tokens) and, for each thread, some copies of the chunk's hidden states.
    """
    return _forward(chunk_size, hidden, items, targets, weights)[0]


def _forward(chunk_size: int, hidden: Array, items: Array, targets: Array, weights: Array) -> tuple[Array, tuple[Array, ...]]:
    losses, d_hidden, d_items = _call(_TARGET, chunk_size, hidden, items, targets.astype(jnp.int32), weights)
    return jnp.sum(weights * losses), (d_hidden, d_items, losses)


linear_cross_entropy_native.defvjp(_forward, lambda chunk_size, residuals, cotangent: backward(residuals, cotangent))


def sampled_native(
    chunk_size: int,
    hidden: Float[Array, "t d"],
    rows: Float[Array, "rows d"],
    offsets: Float[Array, "rows"],
    hits: Int[Array, "t 2"],
    target_logits: Float[Array, "t"],
    weights: Float[Array, "t"],
) -> tuple[Float[Array, "t"], Float[Array, "t d"], Float[Array, "rows d"]]:
    """As ``sampled_xla``, of float32 on a CPU. ``native_problem`` must have returned None.

    Offsets are two more channels of the rows, before a hidden state's two of 1; the width is padded anyway. Two, since a channel keeps
    only the first 8 bits of an offset for sure where operands are split.
    """
    width = hidden.shape[1]
    coarse = jax.lax.reduce_precision(offsets, exponent_bits=8, mantissa_bits=7)
    hidden = jnp.pad(hidden, ((0, 0), (0, 2)), constant_values=1.0)
    rows = jnp.concatenate([rows, coarse[:, None], (offsets - coarse)[:, None]], axis=1)
    losses, d_hidden, d_rows = _call(_SAMPLED_TARGET, chunk_size, hidden, rows, hits, target_logits, weights)
    return losses, d_hidden[:, :width], d_rows[:, :width]


def _call(target: str, chunk_size: int, hidden: Array, items: Array, *of_tokens: Array) -> tuple[Array, Array, Array]:
    """Losses and both gradients from a custom call."""
    tokens, width = hidden.shape
    columns = ((0, 0), (0, -width % _LANES))
    hidden, items = jnp.pad(hidden, columns), jnp.pad(items, columns)
    chunk = -(-min(chunk_size, max(tokens, 1)) // _TOKENS) * _TOKENS
    shapes = ((tokens,), hidden.shape, items.shape, (items.shape[0] - 1, chunk))
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    exact = not may_split_operands()
    losses, d_hidden, d_items, _ = call(hidden, items, *of_tokens, exact=np.bool_(exact))
    return losses, d_hidden[:, :width], d_items[:, :width]


def may_split_operands() -> bool:
    """Whether ``jax.default_matmul_precision`` lets operands be split where there is a matrix unit."""
    return jax.default_matmul_precision.value not in _EXACT


@functools.cache
def native_problem() -> str | None:
    """Makes the custom calls available; None, or what stands in the way. See ``native_build.provide``."""
    return provide(SOURCE, {_TARGET: "LinearCrossEntropy", _SAMPLED_TARGET: "SampledCrossEntropy"})
