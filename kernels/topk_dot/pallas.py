"""For GPU (Triton) and TPU: scores and group maxima in one kernel, then the exact scores of the few groups that matter.

An item among the first k in order of (score descending, index ascending) lies in one of the first k groups of neighbours in order of
(maximum descending, group ascending): the groups before its own each hold an item that comes before it. So [b, i / GROUP_SIZE] maxima
leave the kernel, and never the scores. Each excluded item of a query may spoil one group more.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Bool, Float, Int

from cda4rec_jax.kernels.pallas_backend import LEAST_TRITON_WIDTH

GROUP_SIZE = 32
TRITON_ITEMS, TRITON_QUERIES = 128, 16
TPU_ITEMS, TPU_QUERIES = 4096, 128
GATHERED_VALUES = 2**26  # item vectors that are scored again at a time hold at most so many numbers
Backend = Literal["triton", "tpu"]


def topk_dot_pallas(
    items: Float[Array, "i d"],
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"],
    excluded: Int[Array, "b s"],
    backend: Backend,
    interpret: bool,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """As the reference, up to the rounding of scores: groups are chosen by the kernel's, and items by those of a plain product."""
    num_rows, width = items.shape
    # Which groups are best has no gradient; the scores of their items have.
    fixed_items, fixed_queries = jax.lax.stop_gradient((items, queries))
    maxima = group_maxima(fixed_items, fixed_queries, allowed, backend, interpret)
    num_groups = min(maxima.shape[1], k + excluded.shape[1])
    _, groups = jax.lax.top_k(maxima, num_groups)
    groups = jnp.sort(groups, axis=1)  # candidates by rising index, so that the last top k keeps the order of ties

    def choose(query: Float[Array, "d"], of_query: Int[Array, "g"], without: Int[Array, "s"]) -> tuple[Array, Array]:
        candidates = (of_query[:, None] * GROUP_SIZE + jnp.arange(GROUP_SIZE)[None]).reshape(-1)
        rows = jnp.minimum(candidates, num_rows - 1)
        scores = jnp.einsum("cd,d->c", items[rows], query, precision="highest", preferred_element_type=maxima.dtype)
        usable = (candidates < num_rows) & allowed[rows] & ~jnp.any(candidates[:, None] == without[None], axis=1)
        scores = jnp.pad(jnp.where(usable, scores, -jnp.inf), (0, max(0, k - rows.size)), constant_values=-jnp.inf)
        best, places = jax.lax.top_k(scores, k)
        return jnp.where(best > -jnp.inf, jnp.pad(rows, (0, scores.size - rows.size))[places], 0).astype(jnp.int32), best

    batch_size = max(1, GATHERED_VALUES // (num_groups * GROUP_SIZE * width))
    if batch_size >= queries.shape[0]:
        return jax.vmap(choose)(queries, groups, excluded)
    return jax.lax.map(lambda row: choose(*row), (queries, groups, excluded), batch_size=batch_size)


def group_maxima(
    items: Float[Array, "i d"], queries: Float[Array, "b d"], allowed: Bool[Array, "i"], backend: Backend, interpret: bool
) -> Float[Array, "b g"]:
    """``max_j q . e_(g G + j)`` over the allowed items of each group of ``G = GROUP_SIZE`` neighbours; -inf where none is."""
    num_rows, num_queries = items.shape[0], queries.shape[0]
    dtype = jnp.promote_types(jnp.result_type(items, queries), jnp.float32)
    block_items, block_queries = (TRITON_ITEMS, TRITON_QUERIES) if backend == "triton" else (TPU_ITEMS, TPU_QUERIES)
    bias = jnp.where(allowed, 0.0, -jnp.inf).astype(dtype)[:, None]
    # Queries are few: padding them is cheap. The table is not copied; rows past its end are masked.
    width = pl.next_power_of_2(max(LEAST_TRITON_WIDTH, items.shape[1])) if backend == "triton" else items.shape[1]
    queries = jnp.pad(queries, ((0, -num_queries % block_queries), (0, width - items.shape[1])))
    grid = (pl.cdiv(num_rows, block_items), queries.shape[0] // block_queries)
    out_shape = jax.ShapeDtypeStruct((pl.cdiv(num_rows, block_items) * (block_items // GROUP_SIZE), queries.shape[0]), dtype)
    out_spec = pl.BlockSpec((block_items // GROUP_SIZE, block_queries), lambda block, query: (block, query))
    query_spec = pl.BlockSpec((block_queries, width), lambda block, query: (query, 0))
    if backend == "triton":
        call = pl.pallas_call(
            _triton_kernel,
            grid=grid,
            in_specs=[pl.no_block_spec, query_spec, pl.no_block_spec],
            out_specs=out_spec,
            out_shape=out_shape,
            interpret=interpret,
            compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2),
            name="topk_dot_group_maxima",
        )
    else:
        call = _tpu_call(grid, query_spec, out_spec, out_shape, num_rows, width, interpret)
    return call(items, queries, bias).T[:num_queries, : pl.cdiv(num_rows, GROUP_SIZE)]


def _maxima(items: Array, queries: Array, bias: Array, dtype: jnp.dtype) -> Array:
    """Of one block: [block_items / GROUP_SIZE, block_queries]. Splitting the leading axis moves no data between lanes."""
    precision = jax.lax.Precision.HIGHEST if items.dtype.itemsize >= 4 else None
    scores = (
        jax.lax.dot_general(items, queries, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype) + bias
    )
    return jnp.max(scores.reshape(-1, GROUP_SIZE, scores.shape[1]), axis=1)


def _triton_kernel(items_ref, queries_ref, bias_ref, out_ref):
    num_rows, width = items_ref.shape
    start = pl.program_id(0) * TRITON_ITEMS
    rows = start + jax.lax.broadcasted_iota(jnp.int32, (TRITON_ITEMS, queries_ref.shape[1]), 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    inside = (rows < num_rows) & (columns < width)
    items = pltriton.load(items_ref.at[rows, columns], mask=inside, other=0.0)
    bias_rows = start + jax.lax.broadcasted_iota(jnp.int32, (TRITON_ITEMS, 1), 0)
    bias = pltriton.load(bias_ref.at[bias_rows, jnp.zeros_like(bias_rows)], mask=bias_rows < num_rows, other=-jnp.inf)
    out_ref[...] = _maxima(items, queries_ref[...], bias, out_ref.dtype)


def _tpu_kernel(items_ref, queries_ref, bias_ref, out_ref, *, num_rows: int):
    rows = pl.program_id(0) * TPU_ITEMS + jax.lax.broadcasted_iota(jnp.int32, (TPU_ITEMS, 1), 0)
    inside = rows < num_rows  # a block that sticks out of the table holds anything there, also NaN
    items = jnp.where(inside, items_ref[...], 0)
    out_ref[...] = _maxima(items, queries_ref[...], jnp.where(inside, bias_ref[...], -jnp.inf), out_ref.dtype)


def _tpu_call(grid, query_spec, out_spec, out_shape, num_rows: int, width: int, interpret: bool):
    from jax.experimental.pallas import tpu as pltpu

    return pl.pallas_call(
        functools.partial(_tpu_kernel, num_rows=num_rows),
        grid=grid,
        in_specs=[
            pl.BlockSpec((TPU_ITEMS, width), lambda block, query: (block, 0)),
            query_spec,
            pl.BlockSpec((TPU_ITEMS, 1), lambda block, query: (block, 0)),
        ],
        out_specs=out_spec,
        out_shape=out_shape,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="topk_dot_group_maxima",
    )
