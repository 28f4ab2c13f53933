"""Exact search over items that are divided among the devices of a mesh, for users that are divided too.

Axis ``items`` of the mesh divides the rows of every item table. Users are divided over both axes: the devices that share one place on
``data`` hold different items, and ask each other. What they send are queries, k pairs of item and score from each, and rows that
somebody needs; never a table.

The part of a table that one device holds begins with a padding row, so that it looks like a whole table to what searches it.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Shaped

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.linear_cross_entropy.sharded import DATA_AXIS, ITEM_AXIS
from cda4rec_jax.kernels.topk_dot import topk_dot
from cda4rec_jax.retrieval.exact import ExactIndex
from cda4rec_jax.retrieval.rows import ItemRows, Vectors, read_rows

AXES = (DATA_AXIS, ITEM_AXIS)
BY_ITEM, BY_USER, WHOLE = PartitionSpec(ITEM_AXIS), PartitionSpec(AXES), PartitionSpec()


def check_mesh(mesh: Mesh) -> None:
    """UserError if the mesh has other axes than ``data`` and ``items``."""
    if {*mesh.axis_names} != {*AXES}:
        raise UserError(
            f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}; expected {' and '.join(AXES)}, of which either may have "
            'size 1, as in training.mesh.make_mesh("data=4,items=2").'
        )


def place(values: Shaped[np.ndarray, "..."], mesh: Mesh, spec: PartitionSpec) -> Array:
    """An array that every process holds whole, on the devices of the mesh; nothing is sent between processes."""
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), partial(np.ndarray.__getitem__, values))


def place_items(table: Shaped[np.ndarray, "i ..."], mesh: Mesh) -> Array:
    """A table by item index over axis ``items``: each part is row 0 and then its items' rows; zeros fill up the last part."""
    parts = mesh.shape[ITEM_AXIS]
    size = -(-(table.shape[0] - 1) // parts)
    shape = (parts * (1 + size), *table.shape[1:])

    def part(where: Any) -> np.ndarray:
        first = (where[0].start or 0) // (1 + size) * size
        own = table[1 + first : 1 + first + size]
        missing = np.zeros((size - len(own), *table.shape[1:]), table.dtype)
        return np.concatenate([table[:1], own, missing])

    return jax.make_array_from_callback(shape, NamedSharding(mesh, BY_ITEM), part)


def place_users(tree: Any, mesh: Mesh) -> Any:
    """Arrays with one row for each user over both axes; rows of zeros at the end make them divide, one to each device at least."""
    devices = math.prod(mesh.shape.values())

    def divided(leaf: Any) -> Array:
        values = np.asarray(leaf)
        rows = devices * max(1, -(-len(values) // devices))
        return place(np.pad(values, ((0, rows - len(values)), *((0, 0),) * (values.ndim - 1))), mesh, BY_USER)

    return jax.tree.map(divided, tree)


def look_up(part: Any, items: Int[Array, "b n"]) -> Any:
    """Rows [b, n, ...] of the items of this device's users, from a tree of divided tables; for use in ``jax.shard_map``.

    Each device gives the rows that it holds and zeros for the others: the sum is the row, unrounded. For a moment every device has a
    row for each item that the users of its place on ``data`` ask for.
    """
    asked = jax.lax.all_gather(items, ITEM_AXIS, tiled=True)

    def rows_of(table: Array) -> Array:
        local, here = _in_this_part(asked, table.shape[0] - 1)
        rows = jnp.where(here.reshape(*here.shape, *(1,) * (table.ndim - 1)), table[local], jnp.zeros((), table.dtype))
        return jax.lax.psum_scatter(rows, ITEM_AXIS, scatter_dimension=0, tiled=True)

    return jax.tree.map(rows_of, part)


def search_part(
    part: Float[Array, "i d"],
    queries: Float[Array, "b d"],
    k: int,
    *,
    num_items: int,
    allowed: Bool[Array, "i"] | None = None,
    excluded: Int[Array, "b s"] | None = None,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """What ``exact_search`` finds for this device's queries among all items of a divided table; for use in ``jax.shard_map``.

    Every device finds the k best of its own items for all that ask, and the k best of these are the k best of all. Parts follow each
    other by item index, and so among equals the lower index comes first here too.

    Args:
        part: of the item vectors, as ``place_items`` divides them.
        queries: one vector for each user of this device.
        k: items to find, at most ``num_items``.
        num_items: of the whole catalogue.
        allowed: False at items that no query may find; divided like the vectors.
        excluded: items of the whole catalogue that the query of this row must not find, 0 where there is none.
    """
    size = part.shape[0] - 1
    first = jax.lax.axis_index(ITEM_AXIS) * size
    if allowed is None and size * jax.lax.axis_size(ITEM_AXIS) > num_items:
        allowed = first + jnp.arange(1 + size) <= num_items
    if excluded is not None:
        excluded, _ = _in_this_part(jax.lax.all_gather(excluded, ITEM_AXIS, tiled=True), size)
    asked = jax.lax.all_gather(queries, ITEM_AXIS, tiled=True)
    # By XLA, as in `exact_search`: what is divided is found as it would be on one device.
    found, scores = topk_dot(part, asked, min(k, size), allowed=allowed, excluded=excluded, implementation="xla")
    found = jnp.where(found > 0, first + found, 0)
    found, scores = (jax.lax.all_to_all(best, ITEM_AXIS, split_axis=0, concat_axis=1, tiled=True) for best in (found, scores))
    best, places = jax.lax.top_k(scores, k)
    return jnp.take_along_axis(found, places, axis=1), best.astype(jnp.float32)


def on_each_device(mesh: Mesh, function: Any, in_specs: Any) -> Any:
    """``function`` over the parts that each device holds; its results, a row for each user, are whole on every device."""
    # The check wants casts in loops whose name changed between versions of JAX.
    divided = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=BY_USER, check_vma=False)
    return lambda *arguments: jax.lax.with_sharding_constraint(divided(*arguments), NamedSharding(mesh, WHOLE))


class ShardedIndex(ExactIndex):
    """Index that finds what ``ExactIndex`` finds, with its items divided over axis ``items`` of a mesh and queries over both axes.

    ``mesh`` has the axes ``data`` and ``items``; None divides the items among all devices. In a job of several processes all of them
    search together, with the same queries.
    """

    implementation = "sharded"

    def __init__(self, rows: ItemRows, mesh: Mesh | None = None) -> None:
        self._mesh = jax.make_mesh((1, jax.device_count()), AXES, axis_types=(AxisType.Auto,) * 2) if mesh is None else mesh
        check_mesh(self._mesh)
        super().__init__(rows)

    @classmethod
    def build(cls, item_vectors: Vectors, mesh: Mesh | None = None) -> "ShardedIndex":
        """Index of ``item_vectors``, where row 0 is padding; UserError if a value is not finite or the mesh has other axes."""
        return cls(ItemRows.of(item_vectors), mesh)

    @classmethod
    def load(cls, directory: Path, mesh: Mesh | None = None) -> "ShardedIndex":
        """Index from the folder of any index, whatever the number of devices that it was made on."""
        return cls(read_rows(directory), mesh)

    def _table_of(self, vectors: Float[np.ndarray, "i d"]) -> Any:
        return place_items(vectors, self._mesh)

    def _find(self, table: Any, queries: Any, k: int, allowed: Any, excluded: Any) -> Any:
        asked, excluded = place_users((queries, excluded), self._mesh)
        allowed = None if allowed is None else place_items(allowed, self._mesh)
        num_items = self._rows.vectors.shape[0] - 1
        found = _search(table, asked, allowed, excluded, k=k, num_items=num_items, mesh=self._mesh)
        return tuple(np.asarray(best)[: len(queries)] for best in found)


@partial(jax.jit, static_argnames=("k", "num_items", "mesh"))
def _search(
    table: Float[Array, "i d"],
    queries: Float[Array, "b d"],
    allowed: Bool[Array, "i"] | None,
    excluded: Int[Array, "b s"] | None,
    *,
    k: int,
    num_items: int,
    mesh: Mesh,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    def search(part: Array, queries: Array, allowed: Array | None, excluded: Array | None) -> tuple[Array, Array]:
        return search_part(part, queries, k, num_items=num_items, allowed=allowed, excluded=excluded)

    divided = on_each_device(mesh, search, in_specs=(BY_ITEM, BY_USER, BY_ITEM, BY_USER))
    return divided(table, queries, allowed, excluded)


def _in_this_part(items: Array, size: int) -> tuple[Array, Array]:
    """Rows of these items in the part of this device (0 where they are not in it), and where they are in it.

    Item 0 is in the first part alone.
    """
    number = jax.lax.axis_index(ITEM_AXIS)
    local = items - number * size
    here = (local <= size) & (local >= jnp.minimum(number, 1))
    return jnp.where(here, local, 0), here
