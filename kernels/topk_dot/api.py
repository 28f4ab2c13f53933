"""Public entry of the operation: checks, the choice of implementation, and what every implementation shares."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.pallas_backend import check_backend
from cda4rec_jax.kernels.topk_dot.native import native_problem, topk_dot_native
from cda4rec_jax.kernels.topk_dot.pallas import topk_dot_pallas
from cda4rec_jax.kernels.topk_dot.reference import topk_dot_reference
from cda4rec_jax.kernels.topk_dot.xla import topk_dot_xla

Implementation = Literal["reference", "xla", "native", "triton", "tpu"]
IMPLEMENTATIONS = ("reference", "xla", "native", "triton", "tpu")
LEAST_CHUNK, CHUNK_SCORES = 16384, 2**20  # on a CPU a loop over chunks copies them, so few queries take large chunks
LEAST_NATIVE_QUERIES = 8  # below, reading the items is what takes the time, and XLA reads them faster


def topk_dot(
    items: Float[Array, "i d"],
    queries: Float[Array, "b d"],
    k: int,
    *,
    allowed: Bool[Array, "i"] | None = None,
    excluded: Int[Array, "b s"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """The ``k`` items with the greatest ``q . e_i``, best first and among equals the lower index first, with their scores.

    Row 0 is padding and never found. Items that are not ``allowed``, or ``excluded`` for a query, make room for others; where fewer
    than ``k`` remain, the rest is item 0 with a score of -inf. Pure; ``k``, ``chunk_size``, ``implementation`` static in ``jax.jit``.
    Scores accumulate in float32 (float64 where an input is), and have that dtype. Inputs must be finite.

    Args:
      items: Item vectors; row 0 is padding.
      queries: One vector for each user.
      k: Items to find, 1 to i - 1.
      allowed: False at items that no query may find. None allows all.
      excluded: Items that the query of this row must not find, 0 where there is none.
      chunk_size: Items whose scores exist at the same time, for ``xla``. None takes as many as have about a million scores, and at
        least 16,384.
      implementation: ``reference`` materialises all scores. ``xla`` goes through chunks of items. ``native`` is a C++ custom call for
        float32 on a CPU; it needs a compiler on its first use, and is the only one whose scores have no gradients: JAX then raises
        ValueError, also where None has chosen it. ``triton`` (GPU) and
        ``tpu`` are Pallas kernels that write the maxima of groups of items, and then score the best groups again. None chooses by
        what was measured: ``native`` on a CPU from 8 queries on where it can be had, else ``xla``; also on accelerators, where the
        Pallas kernels have been lowered but not timed.
      interpret: Interpret the Pallas kernels, on any backend.

    Raises:
      UserError: Shapes do not fit each other, ``k`` does not fit the catalogue, ``chunk_size`` is below 1, or the implementation is
        unknown, needs another backend or dtype, or cannot be compiled.
    """
    check_inputs(items, queries, k, allowed, excluded)
    if chunk_size is None:
        chunk_size = max(LEAST_CHUNK, CHUNK_SCORES // max(1, queries.shape[0]))
    if chunk_size < 1:
        raise UserError(f"chunk_size is {chunk_size}; expected at least 1.")
    wide = jnp.promote_types(jnp.result_type(items, queries), jnp.float32)
    if implementation is None:
        fits = jax.default_backend() == "cpu" and _is_float32(items, queries) and queries.shape[0] >= LEAST_NATIVE_QUERIES
        implementation = "native" if fits and native_problem() is None else "xla"
    if implementation == "xla":
        return topk_dot_xla(items.astype(wide), queries.astype(wide), k, allowed, excluded, chunk_size)
    excluded = jnp.zeros((queries.shape[0], 0), jnp.int32) if excluded is None else excluded
    if implementation == "native":
        _check_native(items, queries)
        return topk_dot_native(items, queries, k, allowed, excluded)
    real = jnp.arange(items.shape[0]) > 0
    allowed = real if allowed is None else allowed & real
    if implementation == "reference":
        return topk_dot_reference(items.astype(wide), queries.astype(wide), k, allowed, excluded)
    if implementation in ("triton", "tpu"):
        check_backend(implementation, interpret)
        return topk_dot_pallas(items, queries, k, allowed, excluded, implementation, interpret)
    raise UserError(f"implementation is {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}, or None.")


def check_inputs(items: Array, queries: Array, k: int, allowed: Array | None, excluded: Array | None) -> None:
    """UserError where shapes do not fit each other, or ``k`` does not fit the catalogue; native code reads what it is told is there."""
    if items.ndim != 2 or queries.shape[1:] != items.shape[1:]:
        raise UserError(
            f"items have shape {items.shape} and queries {queries.shape}; expected [i, d] and [b, d], of the same width d."
        )
    num_items = items.shape[0] - 1
    if not 1 <= k <= num_items:
        raise UserError(f"asked for {k} items of a catalogue of {num_items}; expected 1 to {num_items}.")
    if allowed is not None and allowed.shape != items.shape[:1]:
        raise UserError(
            f"allowed has shape {allowed.shape}; expected {items.shape[:1]}, one value for each row of items, row 0 too."
        )
    if excluded is not None and (excluded.ndim != 2 or excluded.shape[0] != queries.shape[0]):
        raise UserError(f"excluded has shape {excluded.shape}; expected [{queries.shape[0]}, s], one row for each query.")


def _is_float32(items: Array, queries: Array) -> bool:
    return items.dtype == queries.dtype == jnp.float32


def _check_native(items: Array, queries: Array) -> None:
    if jax.default_backend() != "cpu":
        raise UserError(f"implementation 'native' runs on a CPU, and JAX is on {jax.default_backend()}: choose another, or None.")
    if not _is_float32(items, queries):
        raise UserError(
            f"implementation 'native' takes float32, got {items.dtype} items and {queries.dtype} queries: choose 'xla'."
        )
    if (problem := native_problem()) is not None:
        raise UserError(f"implementation 'native' cannot be had: {problem}. Choose 'xla', which gives the same items.")
