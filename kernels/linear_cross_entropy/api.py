"""Public entry of the operation: checks, the choice of implementation, and what every implementation shares."""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.linear_cross_entropy.native import linear_cross_entropy_native, native_problem, sampled_native
from cda4rec_jax.kernels.linear_cross_entropy.pallas import linear_cross_entropy_pallas, sampled_pallas
from cda4rec_jax.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from cda4rec_jax.kernels.linear_cross_entropy.sampled import sampled_cross_entropy, sorted_samples
from cda4rec_jax.kernels.linear_cross_entropy.sharded import (
    DATA_AXIS,
    ITEM_AXIS,
    linear_cross_entropy_sharded,
    sampled_sharded,
    take_rows,
)
from cda4rec_jax.kernels.linear_cross_entropy.xla import linear_cross_entropy_xla, sampled_xla
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
    sampled: Int[Array, "k"] | None = None,
    log_counts: Float[Array, "k"] | None = None,
    label_smoothing: float = 0.0,
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

    With ``sampled`` items the normaliser is estimated from them (sampled softmax with logQ correction: Bengio and Senecal, 2008,
    doi 10.1109/TNN.2007.912312; Yi et al., RecSys 2019, doi 10.1145/3298689.3346996):
    ``exp(h_t . e_target) + sum_j exp(h_t . e_j - log_counts_j)`` over the sampled j that are neither 0 nor the target. Where each
    item is among them as often as its count says, on average, the normaliser is right on average. The target is no draw, so it is
    not corrected (arXiv 2507.09331). Neither [tokens, sampled] nor [tokens, items] is ever in memory.

    With ``label_smoothing`` (Szegedy et al., arXiv 1512.00567) the label is the target with probability ``1 - eps`` and any of the items,
    the target among them, with ``eps``: ``log Z - (1 - eps) h . e_target - eps h . mean(e)``. The mean logit is the logit of the mean
    vector, so smoothing costs no second pass over the catalogue, whatever the normaliser.

    A ``hidden`` of 16 bits makes all but ``reference`` round the operands of their products to its dtype; sums stay in float32, and
    so do the gradient of float32 items and the softmax. Operands of float32 are rounded as ``jax.default_matmul_precision`` says, which
    on accelerators is to fewer bits unless it is "highest"; so does ``native`` on a CPU with AMX, to 17 of 24. ``triton`` rounds none.

    Args:
      hidden: Output of the decoder, one row for each token. Must be finite also where the weight is 0.
      items: Item vectors; row 0 is padding.
      targets: Item index of the next item, 0 to i - 1; larger values are not detected.
      weights: Weight of each token.
      sampled: Items that all tokens share as negatives, in any order; one that is there twice counts twice, and 0 counts nothing. Larger
        values than of targets are not detected. None takes all items.
      log_counts: Of each sampled item the log of how often it is expected among them, such as ``log(k q)`` after k draws from q. It gets
        no gradient.
      label_smoothing: eps, from 0 to less than 1.
      chunk_size: Tokens whose logits exist at the same time (on one device), for ``xla``, ``native`` and ``sharded``. None takes 128 for
        ``native``; for the others 64 to 256 on a CPU, as many as have about a million logits, which suits its caches, and 1,024 elsewhere.
      num_items: Rows 1 to ``num_items`` are the items, and rows after them are padding as row 0 is. None: all rows but row 0.
      mesh: Devices of ``sharded``, with the axes "data", over which tokens are split, and "items". Inside of ``jax.jit``.
      implementation: ``reference`` materialises all logits. ``xla`` scans over chunks and makes the gradient in the forward scan,
        so that the backward pass only scales it (as Liger does, arXiv 2410.10989). ``native`` does the same in C++, for float32 on a
        CPU; it needs a compiler on its first use, and passes over tokens without a target. ``sharded`` is ``xla`` on every device of a
        mesh, each for its tokens and its items. ``triton`` is a Pallas kernel for GPUs, whose logits never reach memory; it makes them
        again for each gradient. None chooses ``sharded`` where there is a mesh, else ``native`` where it can be had, else ``xla``: also
        on a GPU, where the kernel has been lowered but not timed. All of them have all variants.
      interpret: Interpret the Pallas kernel, on any backend.

    Raises:
      UserError: Shapes that do not fit each other, no item besides padding, more items than rows, sampled items without their counts or
        none of them, a label smoothing outside [0, 1), a chunk size below 1, an unknown implementation, one for another backend or dtype
        or that cannot be compiled, or a mesh for another implementation, without these two axes, or missing.
    """
    _check_shapes(hidden, items, targets, weights)
    _check_variant(sampled, log_counts, label_smoothing)
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
    _check_implementation(implementation, narrow, wide, mesh, interpret)
    items, weights = items.astype(wide), weights.astype(wide)
    weights = jnp.where(targets > 0, weights, jnp.zeros_like(weights))
    log_counts = None if log_counts is None else jax.lax.stop_gradient(log_counts).astype(wide)
    if implementation == "reference":
        variant = (sampled, log_counts, label_smoothing)
        return linear_cross_entropy_reference(hidden.astype(wide), items[: num_items + 1], targets, weights, *variant)
    hidden = hidden.astype(narrow)
    if implementation != "sharded":
        items = items[: num_items + 1]
    target_rows = _rows_of(targets, items, mesh) if sampled is not None or label_smoothing else None
    if sampled is None or log_counts is None:
        total = _full(implementation, chunk_size, num_items, mesh, interpret, hidden, items, targets, weights)
    else:
        assert target_rows is not None
        ids, offsets, hits = sorted_samples(sampled, log_counts, targets)
        rows = items[ids] if mesh is None else take_rows(mesh, _rows_padded(mesh, items), ids, split=False)
        total = _sampled(implementation, chunk_size, mesh, interpret, hidden, rows, offsets, hits, target_rows, weights)
    if not label_smoothing:
        return total
    assert target_rows is not None
    return total + label_smoothing * _moved_to_all_items(hidden, items, num_items, target_rows, weights)


def _full(
    implementation: Implementation,
    chunk_size: int | None,
    num_items: int,
    mesh: Mesh | None,
    interpret: bool,
    hidden: Array,
    items: Array,
    targets: Array,
    weights: Array,
) -> Float[Array, ""]:
    if implementation == "native":
        return linear_cross_entropy_native(chunk_size or NATIVE_CHUNK, hidden, items, targets, weights)
    if implementation == "triton":
        return linear_cross_entropy_pallas(interpret, hidden, items, targets, weights)
    chunk_size = chunk_size or default_chunk_size(items.shape[0])
    if mesh is None:
        return linear_cross_entropy_xla(chunk_size, hidden, items, targets, weights)
    hidden, targets, weights = _tokens_padded(mesh.shape[DATA_AXIS], hidden, targets, weights)
    return linear_cross_entropy_sharded(mesh, chunk_size, num_items, hidden, _rows_padded(mesh, items), targets, weights)


def _sampled(
    implementation: Implementation,
    chunk_size: int | None,
    mesh: Mesh | None,
    interpret: bool,
    hidden: Array,
    rows: Array,
    offsets: Array,
    hits: Array,
    target_rows: Array,
    weights: Array,
) -> Float[Array, ""]:
    if mesh is not None:
        hidden, hits, target_rows, weights = _tokens_padded(mesh.size, hidden, hits, target_rows, weights)
        chunk_size = chunk_size or default_chunk_size(rows.shape[0])
        return sampled_sharded(mesh, chunk_size, hidden, rows, offsets, hits, target_rows, weights)
    made_by = {
        "native": partial(sampled_native, chunk_size or NATIVE_CHUNK),
        "triton": partial(sampled_pallas, interpret),
        "xla": partial(sampled_xla, chunk_size or default_chunk_size(rows.shape[0])),
    }
    return sampled_cross_entropy(made_by[implementation], hidden, rows, offsets, hits, target_rows, weights)


def _moved_to_all_items(hidden: Array, items: Array, num_items: int, target_rows: Array, weights: Array) -> Float[Array, ""]:
    """``sum_t w_t h_t . (e_target - mean(e))``: what the loss gains for each unit of label that goes from the target to all items."""
    numbers = jnp.arange(items.shape[0])[:, None]
    mean = jnp.sum(jnp.where((numbers >= 1) & (numbers <= num_items), items, 0), axis=0) / num_items
    return jnp.sum(weights * jnp.sum(hidden.astype(items.dtype) * (target_rows - mean[None]), axis=1))


def _rows_of(targets: Array, items: Array, mesh: Mesh | None) -> Float[Array, "t d"]:
    if mesh is None:
        return items[targets]
    (padded,) = _tokens_padded(mesh.shape[DATA_AXIS], targets)
    return take_rows(mesh, _rows_padded(mesh, items), padded, split=True)[: targets.shape[0]]


def _check_shapes(hidden: Array, items: Array, targets: Array, weights: Array) -> None:
    if hidden.ndim != 2 or items.ndim != 2 or hidden.shape[1] != items.shape[1]:
        raise UserError(
            f"hidden has shape {hidden.shape} and items {items.shape}; expected [t, d] and [i, d], of the same width d."
        )
    if not targets.shape == weights.shape == hidden.shape[:1]:
        raise UserError(
            f"targets have shape {targets.shape} and weights {weights.shape}; expected {hidden.shape[:1]}, one of each for a token."
        )


def _check_variant(sampled: Array | None, log_counts: Array | None, label_smoothing: float) -> None:
    shapes = [None if array is None else array.shape for array in (sampled, log_counts)]
    if shapes[0] != shapes[1] or (sampled is not None and (sampled.ndim != 1 or not len(sampled))):
        raise UserError(
            f"sampled has shape {shapes[0]} and log_counts {shapes[1]}; expected both [k] with k at least 1, or neither."
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"label_smoothing is {label_smoothing}; expected 0 to less than 1.")


def _check_implementation(implementation: str, narrow: Any, wide: Any, mesh: Mesh | None, interpret: bool) -> None:
    if (mesh is not None) != (implementation == "sharded"):
        raise UserError(f"implementation is {implementation!r} and mesh {mesh}; expected a mesh for 'sharded' and for it alone.")
    if implementation not in get_args(Implementation):
        raise UserError(f"implementation is {implementation!r}; expected one of {', '.join(get_args(Implementation))}, or None.")
    if mesh is not None and {DATA_AXIS, ITEM_AXIS} - {*mesh.axis_names}:
        raise UserError(f"mesh has the axes {mesh.axis_names}; expected {DATA_AXIS!r} and {ITEM_AXIS!r}.")
    if implementation == "native":
        check_native(narrow, wide, native_problem())
    if implementation == "triton":
        check_backend(implementation, interpret)


def _chosen(narrow: Any, wide: Any, mesh: Mesh | None) -> Implementation:
    if mesh is not None:
        return "sharded"
    return "native" if suits_native(narrow, wide) and native_problem() is None else "xla"


def _tokens_padded(devices: int, *of_tokens: Array) -> tuple[Array, ...]:
    """With tokens of 0 at the end, so that they divide."""
    return tuple(jnp.pad(array, ((0, -array.shape[0] % devices),) + ((0, 0),) * (array.ndim - 1)) for array in of_tokens)


def _rows_padded(mesh: Mesh, items: Array) -> Array:
    return jnp.pad(items, ((0, -items.shape[0] % mesh.shape[ITEM_AXIS]), (0, 0)))
