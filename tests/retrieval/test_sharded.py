"""What only an index over several devices has; the contract of every index is in ``test_retrieval.py``."""

import jax
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval import ExactIndex, ShardedIndex
from cda4rec_jax.retrieval.sharded import BY_ITEM, BY_USER, look_up, on_each_device, place_items, place_users
from cda4rec_jax.training.mesh import make_mesh


def test_among_equal_items_of_several_parts_the_lower_index_comes_first() -> None:
    vectors = np.ones((12, 3), np.float32)
    vectors[[3, 9]] = 2.0
    items, _ = ShardedIndex.build(vectors).search(np.ones((3, 3), np.float32), 10)
    np.testing.assert_array_equal(items, np.broadcast_to([3, 9, 1, 2, 4, 5, 6, 7, 8, 10], (3, 10)))


@pytest.mark.parametrize("mesh", ["data=2", "items=2"])
def test_the_mesh_may_divide_queries_or_items(mesh: str) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = rng.integers(-3, 4, (42, 5)).astype(np.float32), rng.integers(-3, 4, (7, 5)).astype(np.float32)
    divided, whole = ShardedIndex.build(vectors, make_mesh(mesh)), ExactIndex.build(vectors)
    for k, allowed in ((30, None), (41, np.arange(42) % 3 > 0)):  # the second asks for more items than there are
        jax.tree.map(np.testing.assert_array_equal, *(index.search(queries, k, allowed=allowed) for index in (divided, whole)))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float32])
def test_rows_of_items_are_found_whoever_holds_them(dtype: type) -> None:
    mesh = make_mesh("items=2")
    table = np.random.default_rng(0).integers(1, 99, (10, 2, 3)).astype(dtype)  # row 0 too holds something
    items = np.arange(10, dtype=np.int32).reshape(2, 5)
    rows = jax.jit(on_each_device(mesh, look_up, (BY_ITEM, BY_USER)))([place_items(table, mesh)], place_users(items, mesh))
    np.testing.assert_array_equal(rows[0], table[items])


def test_a_mesh_with_other_axes_is_refused() -> None:
    with pytest.raises(UserError, match="the mesh has the axes data; expected data and items"):
        ShardedIndex.build(np.ones((5, 2), np.float32), jax.make_mesh((2,), ("data",)))
