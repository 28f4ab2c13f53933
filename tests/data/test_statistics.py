import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.data import statistics
from cda4rec_jax.data.statistics import item_categories, item_statistics
from cda4rec_jax.nn import dequantise_weights, quantise_weights


def _csr(histories):
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64)
    return offsets, np.asarray([item for history in histories for item in history], np.int32)


def _byte(weight):
    return max(1, round(255 * weight**0.5))


def _random_histories(num_users=60, num_items=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.choice(num_items, size=rng.integers(2, 12), replace=False) + 1 for _ in range(num_users)]


def test_previous_weights_count_one_half_and_a_third_by_gap_and_only_forward():
    table = item_statistics(*_csr([[1, 2, 3, 4], [1, 4]]), 5, num_neighbours=3)
    # Item 4 (2 events): after 1 at gaps 3 and 1 (2 events), after 2 at gap 2 and after 3 at gap 1 (1 event each).
    expected = {1: (1 / 3 + 1) / 22, 3: 1 / (21 * 22) ** 0.5, 2: (1 / 2) / (21 * 22) ** 0.5}
    assert table.previous_items[4].tolist() == list(expected)
    assert table.previous_weights[4].tolist() == [_byte(weight) for weight in expected.values()]
    assert table.previous_items[1].tolist() == [0, 0, 0]
    assert table.previous_weights[1].tolist() == [0, 0, 0]


def test_pairs_never_cross_users():
    table = item_statistics(*_csr([[1, 2], [3, 4]]), 4)
    assert 2 not in table.previous_items[3]
    assert not set(table.cooccurring_items[3].tolist()) & {1, 2}


def test_cooccurrence_is_the_shrunk_cosine_over_users():
    table = item_statistics(*_csr([[1, 2, 2], [2, 1], [1, 3]]), 3, num_neighbours=2)
    assert table.cooccurring_items[1].tolist() == [2, 3]
    assert table.cooccurring_weights[1].tolist() == [_byte(2 / (23 * 22) ** 0.5), _byte(1 / (23 * 21) ** 0.5)]


def test_equal_weights_stand_by_item_index_and_the_row_is_cut_after_them():
    table = item_statistics(*_csr([[5, 4, 3, 2, 1]]), 5, num_neighbours=3)
    assert table.cooccurring_items[2].tolist() == [1, 3, 4]


def test_no_item_is_its_own_neighbour():
    table = item_statistics(*_csr([[1, 1, 2, 1, 1]]), 2)
    own = np.arange(3)[:, None]
    assert not np.any((table.previous_items == own) & (table.previous_weights > 0))
    assert not np.any((table.cooccurring_items == own) & (table.cooccurring_weights > 0))


def test_popularity_counts_the_given_events_and_is_scaled_to_one():
    table = item_statistics(*_csr([[1, 2], [1, 3], [1, 2]]), 4)
    assert table.train_counts.tolist() == [0, 3, 2, 1, 0]
    np.testing.assert_allclose(table.log_popularity, np.log([1, 4, 3, 2, 1]) / np.log(4), rtol=1e-6)


def test_no_events_give_empty_tables():
    table = item_statistics(*_csr([[], []]), 3)
    assert not table.log_popularity.any()
    assert not table.previous_items.any()
    assert not table.cooccurring_weights.any()


def test_blocks_do_not_change_the_tables(monkeypatch):
    histories = _csr(_random_histories())
    whole = item_statistics(*histories, 40)
    monkeypatch.setattr(statistics, "_MAX_BLOCK_ENTRIES", 50)
    blocked = item_statistics(*histories, 40)
    np.testing.assert_array_equal(whole.cooccurring_items, blocked.cooccurring_items)
    np.testing.assert_array_equal(whole.cooccurring_weights, blocked.cooccurring_weights)


def test_the_order_of_users_does_not_change_the_tables():
    histories = _random_histories()
    forward, backward = item_statistics(*_csr(histories), 40), item_statistics(*_csr(histories[::-1]), 40)
    np.testing.assert_array_equal(forward.previous_items, backward.previous_items)
    np.testing.assert_array_equal(forward.previous_weights, backward.previous_weights)
    np.testing.assert_array_equal(forward.cooccurring_items, backward.cooccurring_items)


@pytest.mark.parametrize(
    ("offsets", "items", "message"), [([0, 2], [1, 9], "1..3, got 1..9"), ([0, 1], [1, 2], "offsets"), ([0], [1], "offsets")]
)
def test_histories_that_do_not_fit_are_refused(offsets, items, message):
    with pytest.raises(ValueError, match=message):
        item_statistics(np.asarray(offsets), np.asarray(items), 3)


def test_weights_survive_a_byte_to_within_one_step_and_zero_stays_zero():
    weights = np.linspace(0, 1, 1001)
    decoded = np.asarray(dequantise_weights(jnp.asarray(quantise_weights(weights))))
    assert np.abs(decoded - weights).max() <= 1 / 255
    assert decoded[0] == 0
    assert np.all(decoded[1:] > 0)
    assert np.all(np.diff(decoded) >= 0)


def test_categories_drop_the_common_one_and_say_the_same_twice():
    names = [("All", "B", "C"), ("All", "C"), ("All",), ("All", "C", "D", "unknown")]
    table = item_categories(names, max_categories=3, max_per_item=2)
    assert table.names == ("C", "B", "D")
    assert table.multi_hot.tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1]]
    assert table.ids.tolist() == [[0, 0], [1, 2], [1, 0], [0, 0], [1, 3]]


def test_an_item_with_too_many_categories_keeps_the_rarest():
    table = item_categories([("A", "B", "C"), ("A", "B"), ("A",), ("D",)], max_per_item=2)
    assert table.names == ("A", "B", "C", "D")
    assert table.ids[1].tolist() == [2, 3]
    assert table.multi_hot[1].tolist() == [0, 1, 1, 0]
