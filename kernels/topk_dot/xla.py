"""Chunks of items one after another, each cut down by a threshold before its top k is sought."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

GROUP_SIZE = 32
LEAST_QUERIES = 8  # from which the threshold saves more than it costs
BISECTIONS = 10


def topk_dot_xla(
    items: Float[Array, "i d"],
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"] | None,
    excluded: Int[Array, "b s"] | None,
    chunk_size: int,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """As the reference, with [b, chunk_size] scores at a time. Row 0 is excluded here; None excludes nothing else."""
    num_rows = items.shape[0]
    chunk_size = min(chunk_size, num_rows)

    def best_of_chunk(chunk: int | Array) -> tuple[Int[Array, "b n"], Float[Array, "b n"]]:
        first_new = chunk * chunk_size
        # The last chunk overlaps the one before it instead of padding, which would copy the whole table.
        start = jnp.minimum(first_new, num_rows - chunk_size)
        # Accelerators round float32 operands to fewer bits unless they are told, and the first k would be others.
        part = jax.lax.dynamic_slice_in_dim(items, start, chunk_size)
        scores = jnp.matmul(queries, part.T, precision=jax.lax.Precision.HIGHEST)
        rows = start + jnp.arange(chunk_size)[None]
        usable = rows >= jnp.maximum(first_new, 1)
        if allowed is not None:
            usable &= jax.lax.dynamic_slice_in_dim(allowed, start, chunk_size)[None]
        scores = jnp.where(usable, scores, -jnp.inf)
        if excluded is not None:
            places = jnp.where(excluded >= start, excluded - start, chunk_size)  # negative places would count from the end
            scores = scores.at[jnp.arange(queries.shape[0])[:, None], places].set(-jnp.inf, mode="drop")
        best, positions = jax.lax.top_k(_above_threshold(scores, k), min(k, chunk_size))
        return (start + positions).astype(jnp.int32), best

    def merge(chunk: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        both, scores = (jnp.concatenate(pair, axis=1) for pair in zip(found, best_of_chunk(chunk), strict=True))
        best, positions = jax.lax.top_k(scores, k)
        return jnp.take_along_axis(both, positions, axis=1), best

    if chunk_size == num_rows:
        found, best = best_of_chunk(0)
    else:
        shape = (queries.shape[0], k)
        none = (jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf, queries.dtype))
        found, best = jax.lax.fori_loop(0, -(-num_rows // chunk_size), merge, none)
    return jnp.where(best > -jnp.inf, found, 0), best


def _above_threshold(scores: Float[Array, "b n"], k: int) -> Float[Array, "b n"]:
    """Scores with -inf in place of most that are not among the k greatest; on a CPU ``lax.top_k`` then takes half of its time.

    The threshold t is at most the k-th greatest of the maxima of disjoint groups, of which at least k are therefore at least t; so at
    least k scores are, and none that is lower can be among the k greatest. Scores equal to t stay: the order of ties does not change.
    """
    queries, num_rows = scores.shape
    num_groups = num_rows // GROUP_SIZE
    if queries < LEAST_QUERIES or num_groups <= k:
        return scores
    # Without the barrier XLA on a CPU computes the product anew for each of its readers.
    scores = jax.lax.optimization_barrier(scores)
    # Groups go across the row in equal strides, so that their maxima are taken of whole vectors.
    groups = jax.lax.stop_gradient(scores[:, : num_groups * GROUP_SIZE]).reshape(queries, GROUP_SIZE, num_groups)
    maxima = jnp.max(groups, axis=1)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low / 2 + high / 2
        enough = jnp.sum(maxima >= middle, axis=1, keepdims=True) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bounds = (jnp.min(maxima, axis=1, keepdims=True), jnp.max(maxima, axis=1, keepdims=True))
    threshold, _ = jax.lax.fori_loop(0, BISECTIONS, halve, bounds)
    return jnp.where(scores < threshold, -jnp.inf, scores)
