"""Public entry of the operation: checks, the choice of implementation, and what every implementation shares."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.linear_cross_entropy.native import linear_cross_entropy_native, native_problem
from cda4rec_jax.kernels.linear_cross_entropy.pallas import linear_cross_entropy_pallas
from cda4rec_jax.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from cda4rec_jax.kernels.linear_cross_entropy.sharded import DATA_AXIS, ITEM_AXIS, linear_cross_entropy_sharded
from cda4rec_jax.kernels.linear_cross_entropy.xla import linear_cross_entropy_xla
from cda4rec_jax.kernels.native_build import check_native, suits_native
from cda4rec_jax.kernels.pallas_backend import check_backend

Implementation = Literal["reference", "xla", "native", "sharded", "triton"]
NATIVE_CHUNK = 128  # as fast as 256 and faster than 64 wherever it was measured


def default_chunk_size(num_items: int) -> int:
    """Tokens of a chunk of ``xla`` and ``sharded`` where the caller leaves it to us."""
    if jax.default_backend() != "cpu":
        return 1024
    return max(64, min(256, 1_000_000 // num_items // 8 * 8))


def linear_cross_entropy(
    hidden: Float[Array, "t d"],
    items: Float[Array, "i d"],
    targets: Int[Array, "t"],
    weights: Float[Array, "t"],
    *,
    chunk_size: int | None = None,
    num_items: int | None = None,
    mesh: Mesh | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, ""]:
    """Weighted sum of next-item cross-entropies, ``sum_t w_t * (log sum_{i'=1}^{i-1} exp(h_t . e_i') - h_t . e_target)``.

    Row 0 of ``items`` is padding: it is no class, and its gradient is 0. A token whose target is 0 counts nothing, whatever its
    weight. The caller normalises. Computed in float32 (float64 where an input is), differentiable once in ``hidden``, ``items``
    and ``weights`` by reverse mode; gradients have the dtype of their input. No token gives a loss of 0.

    A ``hidden`` of 16 bits makes all but ``reference`` round the operands of their products to its dtype; sums stay in float32, and
    so do the gradient of float32 items and the softmax. Operands of float32 are rounded as ``jax.default_matmul_precision`` says, which
    on accelerators is to fewer bits unless it is "highest"; so does ``native`` on a CPU with AMX, to 17 of 24. ``triton`` rounds none.

    Args:
      hidden: Output of the decoder, one row for each token. Must be finite also where the weight is 0.
      items: Item vectors; row 0 is padding.
      targets: Item index of the next item, 0 to i - 1; larger values are not detected.
      weights: Weight of each token.
      chunk_size: Tokens whose logits exist at the same time (on one device), for ``xla``, ``native`` and ``sharded``. None takes 128 for
        ``native``; for the others 64 to 256 on a CPU, as many as have about a million logits, which suits its caches, and 1,024 elsewhere.
      num_items: Rows 1 to ``num_items`` are the items, and rows after them are padding as row 0 is. None: all rows but row 0.
      mesh: Devices of ``sharded``, with the axes "data", over which tokens are split, and "items". Inside of ``jax.jit``.
      implementation: ``reference`` materialises all logits. ``xla`` scans over chunks and makes the gradient in the forward scan,
        so that the backward pass only scales it (as Liger does, arXiv 2410.10989). ``native`` does the same in C++, for float32 on a
        CPU; it needs a compiler on its first use, and passes over tokens without a target. ``sharded`` is ``xla`` on every device of a
        mesh, each for its tokens and its items. ``triton`` is a Pallas kernel for GPUs, whose logits never reach memory; it makes them
        again for each gradient. None chooses ``sharded`` where there is a mesh, else ``native`` where it can be had, else ``xla``: also
        on a GPU, where the kernel has been lowered but not timed.
      interpret: Interpret the Pallas kernel, on any backend.

    Raises:
      UserError: Shapes that do not fit each other, no item besides padding, more items than rows, a chunk size below 1, an unknown
        implementation, one for another backend or dtype or that cannot be compiled, or a mesh for another implementation, without
        these two axes, or missing.
    """
    _check_shapes(hidden, items, targets, weights)
    if items.shape[0] < 2:
        raise UserError(f"items has {items.shape[0]} rows; expected row 0 (padding) and at least one item.")
    num_items = items.shape[0] - 1 if num_items is None else num_items
    if not 1 <= num_items < items.shape[0]:
        raise UserError(f"num_items is {num_items}; expected 1 to {items.shape[0] - 1}, as items has {items.shape[0]} rows.")
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"chunk_size is {chunk_size}; expected at least 1.")
    wide = jnp.promote_types(jnp.result_type(hidden, items, weights), jnp.float32)
    narrow = hidden.dtype if hidden.dtype.itemsize == 2 else wide
    implementation = implementation or _chosen(narrow, wide, mesh)
    if (mesh is not None) != (implementation == "sharded"):
        raise UserError(f"implementation is {implementation!r} and mesh {mesh}; expected a mesh for 'sharded' and for it alone.")
    items, weights = items.astype(wide), weights.astype(wide)
    weights = jnp.where(targets > 0, weights, jnp.zeros_like(weights))
    if implementation == "reference":
        return linear_cross_entropy_reference(hidden.astype(wide), items[: num_items + 1], targets, weights)
    hidden = hidden.astype(narrow)
    if implementation == "native":
        check_native(narrow, wide, native_problem())
        return linear_cross_entropy_native(chunk_size or NATIVE_CHUNK, hidden, items[: num_items + 1], targets, weights)
    chunk_size = chunk_size or default_chunk_size(items.shape[0])
    if implementation == "xla":
        return linear_cross_entropy_xla(chunk_size, hidden, items[: num_items + 1], targets, weights)
    if implementation == "triton":
        check_backend(implementation, interpret)
        return linear_cross_entropy_pallas(interpret, hidden, items[: num_items + 1], targets, weights)
    if mesh is None:
        raise UserError(f"implementation is {implementation!r}; expected one of {', '.join(get_args(Implementation))}, or None.")
    return _sharded(mesh, chunk_size, num_items, hidden, items, targets, weights)


def _check_shapes(hidden: Array, items: Array, targets: Array, weights: Array) -> None:
    if hidden.ndim != 2 or items.ndim != 2 or hidden.shape[1] != items.shape[1]:
        raise UserError(
            f"hidden has shape {hidden.shape} and items {items.shape}; expected [t, d] and [i, d], of the same width d."
        )
    if not targets.shape == weights.shape == hidden.shape[:1]:
        raise UserError(
            f"targets have shape {targets.shape} and weights {weights.shape}; expected {hidden.shape[:1]}, one of each for a token."
        )


def _chosen(narrow: Any, wide: Any, mesh: Mesh | None) -> Implementation:
    if mesh is not None:
        return "sharded"
    return "native" if suits_native(narrow, wide) and native_problem() is None else "xla"


def _sharded(
    mesh: Mesh, chunk_size: int, num_items: int, hidden: Array, items: Array, targets: Array, weights: Array
) -> Float[Array, ""]:
    """With tokens and items padded so that they divide."""
    if {DATA_AXIS, ITEM_AXIS} - {*mesh.axis_names}:
        raise UserError(f"mesh has the axes {mesh.axis_names}; expected {DATA_AXIS!r} and {ITEM_AXIS!r}.")
    tokens = (0, -hidden.shape[0] % mesh.shape[DATA_AXIS])
    rows = (0, -items.shape[0] % mesh.shape[ITEM_AXIS])
    hidden, items = jnp.pad(hidden, (tokens, (0, 0))), jnp.pad(items, (rows, (0, 0)))
    targets, weights = jnp.pad(targets, (tokens,)), jnp.pad(weights, (tokens,))
    return linear_cross_entropy_sharded(mesh, chunk_size, num_items, hidden, items, targets, weights)
