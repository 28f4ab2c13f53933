"""The C++ custom calls, of float32 on a CPU: one for each pass, which makes the weights of a few queries at a time."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt32

from cda4rec_jax.kernels.native_build import provide

SOURCE = Path(__file__).with_name("native.cc")
_FORWARD, _BACKWARD = "cda4rec_jax_segment_attention", "cda4rec_jax_segment_attention_backward"
_LANES = 16  # sizes of heads come in multiples of it, whatever the processor


class _Inputs(NamedTuple):
    """Operands in the order of the custom calls. Without bias or dropout, these have no value at all, and get no gradient."""

    query: Float[Array, "r t n h"]
    key: Float[Array, "r t m h"]
    value: Float[Array, "r t m h"]
    segment_ids: Int[Array, "r t"]
    bias: Float[Array, "n t"] | Float[Array, "0"]
    seeds: UInt32[Array, "r n two"] | UInt32[Array, "0"]


@functools.partial(jax.jit, static_argnames=("kind", "dropout_rate"))
def segment_attention_native(
    query: Float[Array, "r t n h"],
    key: Float[Array, "r t m h"],
    value: Float[Array, "r t m h"],
    segment_ids: Int[Array, "r t"],
    bias: Float[Array, "n t"] | None,
    seeds: UInt32[Array, "r n two"] | None,
    kind: Literal["softmax", "silu"],
    dropout_rate: float,
) -> Float[Array, "r t n h"]:
    """As ``segment_attention_xla``, of float32 on a CPU. ``native_problem`` must have returned None.

    Beside its results a thread takes the keys and values of a row and head, and the weights of 24 queries, twice.
    """
    head_size = query.shape[3]
    query, key, value = (jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, -head_size % _LANES))) for array in (query, key, value))
    nothing = jnp.zeros(0, jnp.float32)
    inputs = _Inputs(
        query,
        key,
        value,
        segment_ids.astype(jnp.int32),
        nothing if bias is None else bias,
        nothing.astype(jnp.uint32) if seeds is None else seeds,
    )
    return _attend(kind, 0.0 if seeds is None else dropout_rate, inputs)[..., :head_size]


def _forward(kind: str, dropout_rate: float, inputs: _Inputs) -> tuple[Array, tuple[Any, ...]]:
    rows, length, heads, _ = inputs.query.shape
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (inputs.query.shape, *2 * ((rows, heads, length),))]
    out, maxima, sums = _call(_FORWARD, results, kind, dropout_rate, *inputs)
    return out, (inputs, out, maxima, sums)


def _backward(kind: str, dropout_rate: float, residuals: tuple[Any, ...], d_out: Array) -> tuple[_Inputs]:
    inputs, *others = residuals
    query, key, bias = inputs.query, inputs.key, inputs.bias
    shapes = (query.shape, key.shape, key.shape, (query.shape[0], *bias.shape))
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    d_query, d_key, d_value, d_bias = _call(_BACKWARD, results, kind, dropout_rate, *inputs, *others, d_out)
    return (_Inputs(d_query, d_key, d_value, None, jnp.sum(d_bias, axis=0), None),)  # pyright: ignore[reportArgumentType]


def _call(target: str, results: list[jax.ShapeDtypeStruct], kind: str, dropout_rate: float, *operands: Array) -> Sequence[Array]:
    """Axes that ``jax.vmap`` adds are more rows to the custom calls."""
    call = jax.ffi.ffi_call(target, results, vmap_method="broadcast_all")
    dropout = {"threshold": np.int64(round(dropout_rate * 2**32)), "scale": np.float32(1.0 / (1.0 - dropout_rate))}
    return call(*operands, silu=kind == "silu", **dropout)


_attend = jax.custom_vjp(lambda kind, dropout_rate, inputs: _forward(kind, dropout_rate, inputs)[0], nondiff_argnums=(0, 1))
_attend.defvjp(_forward, _backward)


@functools.cache
def native_problem() -> str | None:
    """Makes the custom calls available; None, or what stands in the way. See ``native_build.provide``."""
    return provide(SOURCE, {_FORWARD: "SegmentAttention", _BACKWARD: "SegmentAttentionBackward"})
