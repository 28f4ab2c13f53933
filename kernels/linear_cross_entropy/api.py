"""Public entry of the operation: checks, the choice of implementation, and what every implementation shares."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from cda4rec_jax.kernels.linear_cross_entropy.xla import linear_cross_entropy_xla


def default_chunk_size(num_items: int) -> int:
    """Tokens of a chunk where the caller leaves it to us."""
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
    implementation: Literal["reference", "xla"] | None = None,
) -> Float[Array, ""]:
    """Weighted sum of next-item cross-entropies, ``sum_t w_t * (log sum_{i'=1}^{i-1} exp(h_t . e_i') - h_t . e_target)``.

    Row 0 of ``items`` is padding: it is no class, and its gradient is 0. A token whose target is 0 counts nothing, whatever its
    weight. The caller normalises. Computed in float32 (float64 where an input is), differentiable once in ``hidden``, ``items``
    and ``weights`` by reverse mode; gradients have the dtype of their input. No token gives a loss of 0.

    Args:
      hidden: Output of the decoder, one row for each token. Must be finite also where the weight is 0.
      items: Item vectors; row 0 is padding.
      targets: Item index of the next item, 0 to i - 1; larger values are not detected.
      weights: Weight of each token.
      chunk_size: Tokens whose logits exist at the same time, for ``xla``. None takes 64 to 256 on a CPU, as many as have about a
        million logits, which suits its caches; and 1,024 elsewhere.
      implementation: ``reference`` materialises all logits. ``xla`` scans over chunks and makes the gradient in the forward scan,
        so that the backward pass only scales it (as Liger does, arXiv 2410.10989). None chooses ``xla``.

    Raises:
      UserError: No item besides padding, a chunk size below 1, or an unknown implementation.
    """
    if items.shape[0] < 2:
        raise UserError(f"items has {items.shape[0]} rows; expected row 0 (padding) and at least one item.")
    chunk_size = default_chunk_size(items.shape[0]) if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise UserError(f"chunk_size is {chunk_size}; expected at least 1.")
    dtype = jnp.promote_types(jnp.result_type(hidden, items, weights), jnp.float32)
    hidden, items, weights = (array.astype(dtype) for array in (hidden, items, weights))
    weights = jnp.where(targets > 0, weights, jnp.zeros_like(weights))
    if implementation == "reference":
        return linear_cross_entropy_reference(hidden, items, targets, weights)
    if implementation in (None, "xla"):
        return linear_cross_entropy_xla(chunk_size, hidden, items, targets, weights)
    raise UserError(f"implementation is {implementation!r}; expected 'reference', 'xla' or None.")
