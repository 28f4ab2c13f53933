"""What only an index over several devices has; the contract of every index is in ``test_retrieval.py``."""

import jax
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval import ExactIndex, ShardedIndex
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
    index = ShardedIndex.build(vectors, make_mesh(mesh))
    jax.tree.map(np.testing.assert_array_equal, index.search(queries, 30), ExactIndex.build(vectors).search(queries, 30))


def test_a_mesh_with_other_axes_is_refused() -> None:
    with pytest.raises(UserError, match="the mesh has the axes data; expected data and items"):
        ShardedIndex.build(np.ones((5, 2), np.float32), jax.make_mesh((2,), ("data",)))
