"""Features of a candidate, by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.agents.device.features import (
    CLOUD_FEATURES,
    FEATURES,
    STRUCTURED_FEATURES,
    candidate_features,
    cloud_features,
    structured_features,
)
from cda4rec_jax.messages import Candidates, Evidence

NUM_ITEMS = 9


def evidence(items: np.ndarray) -> Evidence:
    """Records in which item j's vector and text are unit vector j mod 3, and item j was last preceded by item j - 1."""
    shape = items.shape
    unit = (127 * np.eye(3, dtype=np.int8))[items % 3]
    neighbours = np.zeros((*shape, 2), np.int32)
    neighbours[..., 0] = np.maximum(items - 1, 0)
    weights = np.where(neighbours > 0, 255, 0).astype(np.uint8)
    columns = Evidence(
        vectors=unit,
        vector_scales=np.full(shape, 1 / 127, np.float32),
        text=unit,
        text_scales=np.full(shape, 1 / 127, np.float32),
        previous_items=neighbours,
        previous_weights=weights,
        cooccurring_items=neighbours,
        cooccurring_weights=weights,
        categories=np.where(items > 0, 1 + items % 2, 0)[..., None].astype(np.uint8),
        # Item j shares its only word with the items of its remainder by 4.
        words=np.where(items > 0, 1 + items % 4, 0)[..., None].astype(np.uint16),
        word_weights=np.where(items > 0, 255, 0)[..., None].astype(np.uint8),
        log_popularity=(items / NUM_ITEMS).astype(np.float32),
    )
    return jax.tree.map(jnp.asarray, columns)


def structured(history: list[int], candidates: list[int]) -> dict[str, np.ndarray]:
    items = np.zeros((1, 6), np.int32)
    items[0, : len(history)] = history
    found = np.asarray([candidates], np.int32)
    lengths = np.asarray([len(history)], np.int32)
    state = jnp.asarray([[1.0, 2.0, 4.0]])
    features = structured_features(items, lengths, evidence(items), state, evidence(found), NUM_ITEMS)
    return dict(zip(STRUCTURED_FEATURES, np.moveaxis(np.asarray(features), -1, 0)[:, 0], strict=True))


def test_device_score_is_relative_to_the_first_candidate():
    np.testing.assert_allclose(structured([1], [3, 4, 5])["device_score"], [0.0, 0.5, 1.5], atol=1e-5)


def test_text_similarity_to_the_last_item_is_twice_the_cosine():
    np.testing.assert_allclose(structured([1, 5], [2, 3])["text_last"], [2.0, 0.0], atol=1e-4)


def test_an_item_that_follows_the_last_one_is_recognised():
    found = structured([4, 7], [8, 5, 2])
    np.testing.assert_allclose(found["followed_last"], [1.0, 0.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(found["followed_recent"], [1.0, 0.6**0.5, 0.0], atol=1e-5)


def test_a_pair_of_rare_items_that_follow_each_other_counts_more_than_one_of_popular_items():
    rare, popular = structured([1], [2])["followed_last_rare"], structured([7], [8])["followed_last_rare"]
    # log_popularity of item j is j / 9, and each item has a factor exp(.5 - 3 log_popularity); the root of the product is the feature.
    np.testing.assert_allclose(rare, np.exp(0.5 - 1.5 * (1 + 2) / 9), rtol=1e-5)
    np.testing.assert_allclose(popular, np.exp(0.5 - 1.5 * (7 + 8) / 9), rtol=1e-5)


def test_words_of_the_title_are_compared_with_last_recent_and_all_titles():
    found = structured([1, 5, 2], [6, 9, 3])
    np.testing.assert_allclose(found["words_last"], [1.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(found["words_short"], [1.0, 0.36 + 0.6, 0.0], atol=1e-5)
    long = np.asarray([1.0, 0.95, 0.95**2])
    np.testing.assert_allclose(found["words_long"], [long[0] / long.sum(), long[1:].sum() / long.sum(), 0.0], atol=1e-5)


def test_older_events_weigh_less_in_the_short_than_in_the_long_view():
    found = structured([4, 7], [5, 8])
    np.testing.assert_allclose(found["cooccurring_short"], [0.6**0.5, 1.0], atol=1e-5)
    np.testing.assert_allclose(found["cooccurring_long"], [0.95**0.5, 1.0], atol=1e-5)


def test_category_share_sums_to_one_over_categories():
    found = structured([1, 3, 2], [4, 5])
    np.testing.assert_allclose(found["category_short"].sum(), 1.0, atol=1e-5)


def test_an_empty_history_gives_finite_features():
    for name, values in structured([], [1, 2]).items():
        assert np.isfinite(values).all(), name


def test_padding_of_the_history_changes_nothing():
    short, long = structured([1, 2], [3, 4]), structured([1, 2], [3, 4])
    items = np.zeros((1, 12), np.int32)
    items[0, :2] = [1, 2]
    found = np.asarray([[3, 4]], np.int32)
    wide = structured_features(
        items, np.asarray([2], np.int32), evidence(items), jnp.asarray([[1.0, 2.0, 4.0]]), evidence(found), NUM_ITEMS
    )
    np.testing.assert_allclose(np.asarray(wide)[0].T, np.stack(list(long.values())), atol=1e-6)
    assert short.keys() == long.keys()


def cloud(present: list[float], age: float = 3.0) -> dict[str, np.ndarray]:
    found = Candidates.retrieved(np.asarray([[1, 2, 3]]), np.asarray([[5.0, 4.0, 1.0]], np.float32))
    features = cloud_features(
        replace(found, present=jnp.asarray([present])),
        jnp.asarray([[0.1, 0.2, 0.3]]),
        age_events=jnp.asarray([age]),
        level=jnp.asarray([2]),
    )
    return dict(zip(CLOUD_FEATURES, np.moveaxis(np.asarray(features), -1, 0)[:, 0], strict=True))


def test_cloud_score_is_relative_to_the_best_candidate_and_knows_its_age():
    found = cloud([1.0, 1.0, 1.0])
    np.testing.assert_allclose(found["cloud_score"], [0.0, -0.5, -2.0])
    np.testing.assert_allclose(found["cloud_score_by_age"], np.log(4.0) * found["cloud_score"], rtol=1e-6)
    np.testing.assert_array_equal(found["level_recent"], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(found["level_full"], [0.0, 0.0, 0.0])


def test_without_a_semantic_score_only_popularity_remains():
    found = cloud([0.0, 0.0, 0.0])
    np.testing.assert_allclose(found.pop("popularity"), [0.1, 0.2, 0.3])
    assert not any(np.any(values) for values in found.values())


@pytest.mark.parametrize("structured", [None, "given"])
def test_all_features_stand_in_the_documented_order(structured):
    own = None if structured is None else jax.numpy.ones((1, 3, len(STRUCTURED_FEATURES)))
    joined = candidate_features(jnp.zeros((1, 3, len(CLOUD_FEATURES))), own)
    assert joined.shape[-1] == len(FEATURES)
    assert bool(jnp.any(joined)) == (structured is not None)
