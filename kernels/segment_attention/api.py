"""Public entry of the operation: checks, the choice of implementation, and what every implementation shares."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.native_build import check_native, suits_native
from cda4rec_jax.kernels.segment_attention.dropout import dropout_seeds
from cda4rec_jax.kernels.segment_attention.native import native_problem, segment_attention_native
from cda4rec_jax.kernels.segment_attention.reference import segment_attention_reference
from cda4rec_jax.kernels.segment_attention.xla import segment_attention_xla

Implementation = Literal["reference", "xla", "native"]
LONGEST_WHOLE_ROW = 256  # tokens up to which one block is faster than skipping blocks
BLOCK_SIZE = 128


def segment_attention(
    query: Float[Array, "r t n h"],
    key: Float[Array, "r t m h"],
    value: Float[Array, "r t m h"],
    segment_ids: Int[Array, "r t"],
    *,
    bias: Float[Array, "n distances"] | None = None,
    kind: Literal["softmax", "silu"] = "softmax",
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    block_size: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "r t n h"]:
    """Causal attention over packed rows: ``out_t = sum_u w_tu v_u`` over the tokens ``u <= t`` of the segment of ``t``.

    ``s_tu = q_t . k_u + bias[t - u]`` gives ``w_tu = exp(s_tu) / sum_u' exp(s_tu')`` (``softmax``), or ``w_tu = SiLU(s_tu) / c_t`` with
    ``c_t`` the number of tokens that ``t`` reads (``silu``: HSTU, arXiv 2402.17152, which divides by one constant length; the count makes
    packing change nothing). The caller scales the query. Query head j reads key-value head ``j // (n / m)`` (grouped queries, arXiv
    2305.13245). A padding token reads nothing, is read by nothing, and gives 0.

    Products accumulate in float32 (float64 where an input is); the output has the dtype of query, key and value. Differentiable
    once in these and ``bias`` by reverse mode.

    Args:
      query: Queries of n heads.
      key: Keys of m heads, where m divides n. Like the query and the value, finite also at padding.
      value: Values of m heads.
      segment_ids: Segment of each token, 0 at padding. Any numbers are right; blocks are skipped where they rise along the row.
      bias: Added to the logits by distance ``t - u`` in the row, [n, t].
      kind: How a logit becomes a weight.
      dropout_rate: Share of the weights that are dropped where there is a key; the others are scaled by ``1 / (1 - dropout_rate)``.
      dropout_key: Decides which; the same weights in every implementation and at every block size.
      block_size: Tokens of a block, for ``xla``, which it chooses too; from the row's length on there is one block. None takes whole rows
        up to 256 tokens and blocks of 128 above.
      implementation: ``reference`` materialises all weights. ``xla`` with several blocks goes through pairs of blocks at equal
        distance, all pairs of one distance at once, up to the largest distance at which blocks share a segment; the backward
        pass computes the weights again (FlashAttention, arXiv 2205.14135). ``native`` does so too, in C++, for float32 on a CPU, and
        skips for every few queries; it needs a compiler on its first use, and takes arrays of one device. None chooses ``native``
        where it can be had, unless there is a block size or, in the context, a mesh (``jax.sharding.get_abstract_mesh``): XLA
        cannot divide the custom call. Else it chooses ``xla``.

    Raises:
      UserError: Shapes that do not fit each other, heads that do not divide, a dropout rate outside [0, 1), a block size below 1 or one
        for ``native``, an unknown kind or implementation, or one for another backend or dtype or that cannot be compiled.
    """
    _check_shapes(query, key, value, segment_ids, bias)
    if not 0.0 <= dropout_rate < 1.0:
        raise UserError(f"dropout_rate is {dropout_rate}; expected at least 0 and less than 1.")
    if block_size is not None and block_size < 1:
        raise UserError(f"block_size is {block_size}; expected at least 1.")
    if kind not in ("softmax", "silu"):
        raise UserError(f"kind is {kind!r}; expected 'softmax' or 'silu'.")
    length, heads = query.shape[1:3]
    dtype = jnp.result_type(query, key, value)
    if query.size == 0:
        return jnp.zeros(query.shape, dtype)
    seeds = None
    if dropout_key is not None and dropout_rate > 0.0:
        seeds = dropout_seeds(dropout_key, query.shape[0], heads)
    wide = jnp.promote_types(dtype if bias is None else jnp.promote_types(dtype, bias.dtype), jnp.float32)
    bias = None if bias is None else bias.astype(wide)
    implementation = implementation or _chosen(dtype, wide, block_size)
    if implementation == "reference":
        query, key, value = (array.astype(wide) for array in (query, key, value))
        out = segment_attention_reference(query, key, value, segment_ids, bias, seeds, kind, dropout_rate)
        return out.astype(dtype)
    query, key, value = (array.astype(dtype) for array in (query, key, value))
    if implementation == "native":
        if block_size is not None:
            raise UserError(f"block_size is {block_size}; expected None for implementation 'native'.")
        check_native(dtype, wide, native_problem())
        return segment_attention_native(query, key, value, segment_ids, bias, seeds, kind, dropout_rate)
    if implementation == "xla":
        size = block_size or (length if length <= LONGEST_WHOLE_ROW else BLOCK_SIZE)
        return segment_attention_xla(query, key, value, segment_ids, bias, seeds, kind, dropout_rate, size, wide)
    raise UserError(f"implementation is {implementation!r}; expected one of {', '.join(get_args(Implementation))}, or None.")


def _chosen(dtype: Any, wide: Any, block_size: int | None) -> Implementation:
    undivided = block_size is None and jax.sharding.get_abstract_mesh().empty
    return "native" if suits_native(dtype, wide) and undivided and native_problem() is None else "xla"


def _check_shapes(query: Array, key: Array, value: Array, segment_ids: Array, bias: Array | None) -> None:
    if query.ndim != 4 or key.shape != (*query.shape[:2], *key.shape[2:3], *query.shape[3:]) or value.shape != key.shape:
        raise UserError(
            f"query has shape {query.shape}, key {key.shape} and value {value.shape}; expected [r, t, n, h] and twice [r, t, m, h]."
        )
    length, heads, kv_heads = query.shape[1], query.shape[2], key.shape[2]
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(f"query has {heads} heads and key {kv_heads}; expected a multiple.")
    if segment_ids.shape != query.shape[:2]:
        raise UserError(f"segment_ids have shape {segment_ids.shape}; expected {query.shape[:2]}, one for each token.")
    if bias is not None and bias.shape != (heads, length):
        raise UserError(f"bias has shape {bias.shape}; expected {(heads, length)}, one value for each head and distance.")
