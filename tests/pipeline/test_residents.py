"""What a device ranks of the items whose records it holds: by hand, and against exact search."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.messages import Candidates
from cda4rec_jax.pipeline.catalogue import Residents
from cda4rec_jax.pipeline.subtasks import StructuredState, each_once, with_residents
from cda4rec_jax.planner import NEIGHBOUR_EVENTS, OWN_CANDIDATES, RESIDENT_CANDIDATES
from cda4rec_jax.retrieval.exact import exact_search
from tests.pipeline.test_handover import records

SENT = Candidates.retrieved(jnp.asarray([[7, 2]]), jnp.asarray([[9.0, 4.0]]))
KNOWN, SEMANTIC = jnp.asarray([True]), jnp.asarray([[1.0]])


def residents(items, vectors, own_vectors) -> Residents:
    def padded(rows):
        return jnp.pad(jnp.asarray(rows), ((1, 0), (0, 0)))

    order = np.argsort(items)
    found = {"in_order": jnp.asarray(items)[order], "rows_in_order": jnp.asarray(1 + order)}
    tables = {"vectors": padded(vectors), "own_vectors": padded(own_vectors)}
    return Residents(items=jnp.asarray(items), **found, **tables, share=jnp.asarray(0.5))


def structure(state, neighbours) -> StructuredState:
    """Of a history whose records name these neighbours [l, n], oldest first."""
    count = len(neighbours)
    evidence = replace(records(1, count), cooccurring_items=jnp.asarray(neighbours)[None])
    return StructuredState(state=state, items=jnp.ones((1, count), jnp.int32), lengths=jnp.asarray([count]), evidence=evidence)


THREE = residents([2, 5, 8], [[1.0], [2.0], [3.0]], [[1.0], [1.0], [1.0]])


def test_rows_of_items_that_are_not_resident_are_those_of_padding():
    held = residents([8, 2, 5], np.eye(3), np.eye(3))
    np.testing.assert_array_equal(held.rows_of(jnp.asarray([[0, 1, 2, 5], [6, 8, 9, 700]])), [[0, 0, 2, 3], [0, 1, 0, 0]])


def test_resident_items_follow_the_candidates_best_first_for_the_embedding():
    found, places = with_residents(SENT, SEMANTIC, KNOWN, None, THREE, 12)
    np.testing.assert_array_equal(found.items, [[7, 2, 8, 5, 2]])
    np.testing.assert_array_equal(found.scores, [[9.0, 4.0, 3.0, 2.0, 1.0]])
    np.testing.assert_array_equal(found.present, np.ones((1, 5)))
    np.testing.assert_array_equal(places, [[2, 2, 1]])
    np.testing.assert_array_equal(each_once(found, places).items, [[7, 2, 8, 5, 0]])


def test_without_an_embedding_they_come_in_order_of_popularity_and_have_no_scores():
    empty = Candidates.retrieved(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2)))
    found, _ = with_residents(empty, SEMANTIC, ~KNOWN, None, THREE, 12)
    np.testing.assert_array_equal(found.items, [[0, 0, 2, 5, 8]])
    assert not np.any(np.asarray(found.scores)) and not np.any(np.asarray(found.present)[:, 2:])


def test_the_place_among_all_items_is_that_which_is_expected_of_a_random_part_of_them():
    found, _ = with_residents(SENT, SEMANTIC, KNOWN, None, THREE, 11)
    draws = np.sort([np.random.default_rng(seed).permutation(11)[:3] for seed in range(4000)], axis=1)
    np.testing.assert_allclose(found.ranks, [[0.0, 1.0, 2.0, 5.0, 8.0]])
    np.testing.assert_allclose(found.ranks[0, 2:], draws.mean(axis=0), atol=0.15)


def test_a_user_state_finds_items_that_the_embedding_does_not():
    generator = np.random.default_rng(0)
    count, number, more = 1000, RESIDENT_CANDIDATES, OWN_CANDIDATES
    vectors, own_vectors = generator.normal(size=(count, 8)), generator.normal(size=(count, 4))
    semantic, state = generator.normal(size=(1, 8)).astype(np.float32), generator.normal(size=(1, 4)).astype(np.float32)
    held = residents(2 * np.arange(count) + 1, vectors.astype(np.float32), own_vectors.astype(np.float32))
    # Beside each event: a resident item of its own, one that is not resident, and none; older events are not looked at.
    beside = np.asarray([[1, 2, 0]] + [[1201 + 2 * event, 4, 0] for event in range(NEIGHBOUR_EVENTS)])
    own = structure(jnp.asarray(state), beside)
    found, places = with_residents(SENT, jnp.asarray(semantic), KNOWN, own, held, 2000)
    products = vectors @ semantic[0]
    by_semantics, by_state = np.argsort(-products)[:number], np.argsort(-(own_vectors @ state[0]))[:more]
    by_history = np.concatenate([by_state, np.flip(beside[1:, 0]) // 2])
    rows = np.concatenate([by_semantics, by_history])
    is_resident = np.ones(2 + number + more + 3 * NEIGHBOUR_EVENTS, bool)
    is_resident[2 + number + more :].reshape(-1, 3)[:, 1:] = False
    np.testing.assert_array_equal(found.items[0, is_resident][2:], 2 * rows + 1)
    assert not np.any(np.asarray(found.items)[0, ~is_resident])
    np.testing.assert_allclose(found.scores[0, is_resident][2:], products[rows], rtol=1e-4, atol=1e-5)
    assert 1 < np.sum(np.isin(by_state, by_semantics)) < more / 2
    np.testing.assert_array_equal(np.asarray(places)[0, number : number + more] == -1, np.isin(by_state, by_semantics))
    once = np.asarray(each_once(found, places).items)[0]
    assert len(set(once[once > 0])) == np.sum(once > 0)
    assert set(once) - {0} == {7, 2} | set((2 * rows + 1).tolist())
    assert np.all(np.asarray(found.ranks)[0, 2 + number :] == found.ranks[0, 1 + number])


def test_a_device_that_holds_every_item_retrieves_as_the_cloud_does():
    vectors = jax.random.normal(jax.random.key(0), (41, 8)).at[0].set(0.0)
    semantic = jax.random.normal(jax.random.key(1), (3, 8))
    items, scores = exact_search(vectors, semantic, 40)
    sent, every = Candidates.retrieved(items[:, :10], scores[:, :10]), residents(np.arange(1, 41), vectors[1:], vectors[1:])
    both = each_once(*with_residents(sent, semantic, jnp.ones(3, bool), None, every, 40))
    for row in range(3):
        real = np.asarray(both.items[row]) > 0
        np.testing.assert_array_equal(both.items[row][real], items[row])
        np.testing.assert_allclose(both.scores[row][real], scores[row], rtol=1e-6)
        np.testing.assert_allclose(both.ranks[row][real], np.arange(40), atol=1e-5)
