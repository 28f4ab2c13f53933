"""Exact search by way of 8-bit codes, which are a quarter of what has to be read: for few queries, reading is what takes the time."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Int8

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot.api import check_inputs
from cda4rec_jax.kernels.topk_dot.native import native_problem, topk_dot_int8_native

BLOCK = 16  # as in native_int8.cc
MOST_WIDTH = 1040  # 127 * 127 * 1040 < 2^24: sums of products of codes are exact in float32
_ROUND_UP = np.float32(1.00001)  # more than float32 rounding can take away from a norm


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QuantisedItems:
    """``e_i = scale_i codes_i + r_i`` with ``|r_i| <= residual_i`` and ``|e_i| <= norm_i``; padded to whole blocks with zeros."""

    items: Float[Array, "i d"]  # float32
    codes: Int8[Array, "blocks d block"]
    scales: Float[Array, "codes"]
    residuals: Float[Array, "codes"]
    norms: Float[Array, "codes"]


def quantise_items(items: Float[np.ndarray, "i d"]) -> QuantisedItems:
    """Codes of -127 to 127 by the greatest absolute value of each item. UserError if the items are not float32 or too wide."""
    codes, scales, residuals, norms = map(jnp.asarray, quantise_rows(items))
    return QuantisedItems(items=jnp.asarray(items), codes=codes, scales=scales, residuals=residuals, norms=norms)


def quantise_rows(
    items: Float[np.ndarray, "i d"],
) -> tuple[
    Int8[np.ndarray, "blocks d block"], Float[np.ndarray, "codes"], Float[np.ndarray, "codes"], Float[np.ndarray, "codes"]
]:
    """Codes, scales, residuals and norms of ``QuantisedItems``, for tables that are made piece by piece. Raises as ``quantise_items``."""
    if items.dtype != np.float32 or not 1 <= items.shape[1] <= MOST_WIDTH:
        raise UserError(f"items are {items.dtype} and {items.shape[1]} wide; expected float32 and a width of 1 to {MOST_WIDTH}.")
    scales = np.abs(items).max(axis=1) / np.float32(127)
    codes = np.rint(items / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    padding = -items.shape[0] % BLOCK
    residuals = np.linalg.norm(items - scales[:, None] * codes, axis=1) * _ROUND_UP
    norms = np.linalg.norm(items, axis=1) * _ROUND_UP
    blocks = np.pad(codes, ((0, padding), (0, 0))).reshape(-1, BLOCK, items.shape[1]).transpose(0, 2, 1)
    scales, residuals, norms = (np.pad(values, (0, padding)) for values in (scales, residuals, norms))
    return np.ascontiguousarray(blocks), scales, residuals, norms


def topk_dot_quantised(
    table: QuantisedItems,
    queries: Float[Array, "b d"],
    k: int,
    *,
    allowed: Bool[Array, "i"] | None = None,
    excluded: Int[Array, "b s"] | None = None,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """As ``topk_dot``, on a CPU; always the exact top k, bit for bit that of its ``native`` implementation.

    With ``q = s c + r`` too, ``|q . e_i - s s_i (c . c_i)| <= |s c| |r_i| + |r| |e_i|`` (Cauchy-Schwarz), to which the rounding of
    float32 is added. An item is scored exactly unless its upper bound is below the k-th greatest lower bound. So no result has to be
    flagged as uncertain: worse codes cost time, since more items are scored again, and never an item.

    Raises:
      UserError: shapes do not fit each other, ``k`` does not fit the catalogue, the queries are not float32, JAX is not on a CPU, or the
        custom call cannot be compiled.
    """
    check_inputs(table.items, queries, k, allowed, excluded)
    if queries.dtype != jnp.float32:
        raise UserError(f"queries are {queries.dtype}; expected float32.")
    check_quantised()
    excluded = jnp.zeros((queries.shape[0], 0), jnp.int32) if excluded is None else excluded
    values = (table.items, table.codes, table.scales, table.residuals, table.norms)
    return topk_dot_int8_native(*values, queries, k, allowed, excluded)


def check_quantised() -> None:
    """UserError if search by codes cannot run here."""
    if jax.default_backend() != "cpu":
        raise UserError(f"search by 8-bit codes runs on a CPU, and JAX is on {jax.default_backend()}: use the exact index.")
    if (problem := native_problem()) is not None:
        raise UserError(f"search by 8-bit codes cannot be had: {problem}. Use the exact index, which finds the same items.")
