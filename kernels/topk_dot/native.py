"""The C++ custom calls, of float32 on a CPU."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Int8

from cda4rec_jax.kernels.native_build import provide

SOURCE, INT8_SOURCE = (Path(__file__).with_name(name) for name in ("native.cc", "native_int8.cc"))
_TARGET, _INT8_TARGET = "cda4rec_jax_topk_dot", "cda4rec_jax_topk_dot_int8"


def topk_dot_native(
    items: Float[Array, "i d"],
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"] | None,
    excluded: Int[Array, "b s"],
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """As the reference, of float32 on a CPU. ``native_problem`` must have returned None."""
    call = jax.ffi.ffi_call(_TARGET, _results(queries, k), vmap_method="sequential")
    found, scores = call(queries, items, _real(allowed), excluded.astype(jnp.int32))
    return found, scores


def topk_dot_int8_native(
    items: Float[Array, "i d"],
    codes: Int8[Array, "blocks d block"],
    scales: Float[Array, "codes"],
    residuals: Float[Array, "codes"],
    norms: Float[Array, "codes"],
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"] | None,
    excluded: Int[Array, "b s"],
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """What ``topk_dot_native`` finds, bit for bit, by way of the codes; see ``cda4rec_jax.kernels.topk_dot.quantised``."""
    call = jax.ffi.ffi_call(_INT8_TARGET, _results(queries, k), vmap_method="sequential")
    found, scores = call(queries, items, codes, scales, residuals, norms, _real(allowed), excluded.astype(jnp.int32))
    return found, scores


def _real(allowed: Bool[Array, "i"] | None) -> Bool[Array, "_"]:
    """Without padding; no value at all where nothing else is missing, so that nothing is read."""
    return jnp.zeros(0, bool) if allowed is None else allowed.at[0].set(False)


def _results(queries: Array, k: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    shape = (queries.shape[0], k)
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def native_problem() -> str | None:
    """Makes the custom calls available; None, or what stands in the way. See ``native_build.provide``."""
    return provide(SOURCE, {_TARGET: "TopkDot"}) or provide(INT8_SOURCE, {_INT8_TARGET: "TopkDotInt8"})
