"""Parts of a catalogue: centroids by k-means, and leaves of items that are all stored in the same number of places."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

CHUNK = 4096  # vectors whose distances to all centroids exist at a time
LANES = 32  # the places of a leaf are a multiple of it


@partial(jax.jit, static_argnames=("num_leaves", "iterations"))
def learn_centroids(
    vectors: Float[Array, "n d"], num_leaves: int, iterations: int, key: Key[Array, ""]
) -> Float[Array, "leaves d"]:
    """Lloyd's k-means from ``num_leaves`` distinct vectors, which the key draws; a centroid that nothing is near to stays where it is.

    Sums over a leaf are products with an indicator matrix: fast where a scatter is slow, and the same in each run, unlike sums by atomics.
    """
    count, width = vectors.shape
    chunk = min(CHUNK, count)
    chunks = -(-count // chunk)
    padded = jnp.pad(vectors, ((0, chunks * chunk - count), (0, 0))).reshape(chunks, chunk, width)
    real = (jnp.arange(chunks * chunk) < count).reshape(chunks, chunk)

    def step(_: Array, centroids: Float[Array, "leaves d"]) -> Float[Array, "leaves d"]:
        def add(sums: Float[Array, "leaves d1"], part: tuple[Array, Array]) -> tuple[Float[Array, "leaves d1"], None]:
            rows, exists = part
            nearest = jnp.argmax(_closeness(rows, centroids), axis=1)
            inside = (nearest[:, None] == jnp.arange(num_leaves)[None]) & exists[:, None]
            ones = jnp.ones((chunk, 1), rows.dtype)
            return sums + inside.astype(rows.dtype).T @ jnp.concatenate([rows, ones], axis=1), None

        total = jax.lax.scan(add, jnp.zeros((num_leaves, width + 1), vectors.dtype), (padded, real))[0]
        sizes = total[:, width:]
        return jnp.where(sizes > 0, total[:, :width] / jnp.maximum(sizes, 1), centroids)

    start = jax.random.choice(key, count, (num_leaves,), replace=False)
    return jax.lax.fori_loop(0, iterations, step, vectors[start])


@jax.jit
def nearest_leaf(vectors: Float[Array, "n d"], centroids: Float[Array, "leaves d"]) -> Int[Array, "n"]:
    """The leaf of each vector: ``argmin_l |x - c_l|``."""

    def nearest(vector: Float[Array, "d"]) -> Int[Array, ""]:
        return jnp.argmax(_closeness(vector[None], centroids)[0])

    return jax.lax.map(nearest, vectors, batch_size=CHUNK)


def _closeness(vectors: Float[Array, "n d"], centroids: Float[Array, "leaves d"]) -> Float[Array, "n leaves"]:
    """``x . c - |c|^2 / 2``, greatest where ``|x - c|`` is least."""
    return vectors @ centroids.T - jnp.sum(jnp.square(centroids), axis=1)[None] / 2


def capacity_for(num_items: int, num_leaves: int, slack: float) -> int:
    """Places of a leaf: ``slack`` times the mean number of items of a leaf."""
    return LANES * math.ceil(slack * num_items / num_leaves / LANES)


def split_leaves(
    vectors: Float[np.ndarray, "n d"], leaf_of: Int[np.ndarray, "n"], centroids: Float[np.ndarray, "leaves d"], capacity: int
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "more d"]]:
    """Leaves of at most ``capacity`` items, and their centroids; no item is lost, and memory stays bounded however uneven k-means is.

    An over-full leaf is cut across its direction of greatest variance into as few equal parts as hold its items; each part is a leaf with
    the mean of its items as its centroid. Leaves without an item go.
    """
    leaf_of, means = leaf_of.copy(), list(centroids)
    by_leaf = np.argsort(leaf_of, kind="stable")
    ends = np.cumsum(np.bincount(leaf_of, minlength=len(means)))
    for members in np.split(by_leaf, ends[:-1]):
        if len(members) <= capacity:
            continue
        inside = vectors[members]
        _, axes = np.linalg.eigh(np.cov(inside, rowvar=False).reshape(2 * vectors.shape[1:]))
        along = members[np.argsort(inside @ axes[:, -1].astype(np.float32), kind="stable")]
        for part in np.array_split(along, -(-len(along) // capacity)):
            leaf_of[part] = len(means)
            means.append(vectors[part].mean(axis=0))
    kept, leaf_of = np.unique(leaf_of, return_inverse=True)
    return leaf_of, np.stack(means)[kept]


def lay_out(
    items: Int[np.ndarray, "n"], leaf_of: Int[np.ndarray, "n"], num_leaves: int, capacity: int
) -> Int[np.ndarray, "leaves capacity"]:
    """Each item in a place of its leaf, 0 in places that are left; no leaf may have more items than places."""
    order = np.argsort(leaf_of, kind="stable")
    sizes = np.bincount(leaf_of, minlength=num_leaves)
    places = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    table = np.zeros((num_leaves, capacity), np.int32)
    table[leaf_of[order], places] = items[order]
    return table
