"""What a device can rank without asking: by hand, and against exact search."""

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.messages import Candidates
from cda4rec_jax.pipeline.subtasks import local_candidates
from cda4rec_jax.retrieval.exact import exact_search


def test_with_an_embedding_resident_items_follow_the_last_candidates_best_first():
    last = Candidates(items=jnp.asarray([[7, 2]]), scores=jnp.asarray([[9.0, 4.0]]))
    vectors = jnp.asarray([[1.0], [2.0], [3.0]])  # of items 2, 5 and 8
    found = local_candidates(last, jnp.asarray([[1.0]]), jnp.asarray([2, 5, 8]), vectors, jnp.asarray([True]))
    np.testing.assert_array_equal(found.items, [[7, 2, 8, 5, 0]])
    np.testing.assert_array_equal(found.scores[0, :4], [9.0, 4.0, 3.0, 2.0])


def test_without_an_embedding_they_are_alone_and_in_order_of_popularity():
    last = Candidates(items=jnp.asarray([[7, 2]]), scores=jnp.asarray([[9.0, 4.0]]))
    vectors = jnp.asarray([[1.0], [2.0], [3.0]])
    found = local_candidates(last, jnp.asarray([[1.0]]), jnp.asarray([2, 5, 8]), vectors, jnp.asarray([False]))
    np.testing.assert_array_equal(found.items, [[0, 0, 2, 5, 8]])
    assert not np.any(np.asarray(found.scores))


def test_a_device_that_holds_every_item_retrieves_as_the_cloud_does():
    vectors = jax.random.normal(jax.random.key(0), (41, 8)).at[0].set(0.0)
    semantic = jax.random.normal(jax.random.key(1), (3, 8))
    items, scores = exact_search(vectors, semantic, 40)
    last = Candidates(items=items[:, :10], scores=scores[:, :10])
    every = jnp.arange(1, 41)
    found = local_candidates(last, semantic, every, vectors[every], jnp.ones(3, bool))
    for row in range(3):
        real = np.asarray(found.items[row]) > 0
        np.testing.assert_array_equal(found.items[row][real], items[row])
        np.testing.assert_allclose(found.scores[row][real], scores[row], rtol=1e-6)
