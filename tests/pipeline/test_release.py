"""The user abstract: what each level lets out."""

import numpy as np
import pytest

from cda4rec_jax.messages import EgressLevel, HistoryBatch
from cda4rec_jax.pipeline.subtasks import abstract_sequences, release, released_items

LENGTH, STORED = 12, 30


def batch(lengths: list[int]) -> HistoryBatch:
    size = len(lengths)
    items = np.zeros((size, STORED), np.int32)
    for row, length in enumerate(lengths):
        items[row, :length] = np.arange(1, length + 1)
    column = np.zeros(size, np.float32)
    return HistoryBatch(
        user_indices=np.arange(size, dtype=np.int32),
        event_ids=np.arange(size, dtype=np.int32),
        items=items,
        lengths=np.asarray(lengths, np.int32),
        total_lengths=np.asarray(lengths, np.int32),
        seen=items,
        session_counts=column,
        hours_since_last=column,
        has_timestamps=column,
        attributes=np.ones((size, 2), np.float32),
        targets=np.zeros(size, np.int32),
    )


def categories() -> np.ndarray:
    """Items 1-10 are of category 0, all others of category 1."""
    table = np.zeros((STORED + 1, 2), np.float32)
    table[1:11, 0] = 1
    table[11:, 1] = 1
    return table


def released(lengths: list[int], level: EgressLevel, age: int = 0):
    size = len(lengths)
    return release(
        batch(lengths),
        categories(),
        np.full(size, int(level), np.int32),
        np.full(size, age, np.int32),
        max_items=released_items(level, LENGTH),
        history_length=LENGTH,
        profile_events=20,
    )


def test_profile_releases_no_id_and_no_attribute():
    abstract = released([25], EgressLevel.PROFILE)
    assert abstract.items.shape == (1, 0)
    assert not np.any(abstract.attributes)
    # Events 6 to 25: five of category 0, fifteen of category 1.
    np.testing.assert_array_equal(abstract.category_shares, [[round(15 * 0.25**0.5), round(15 * 0.75**0.5)]])


def test_recent_releases_the_last_ten_and_a_profile_of_what_came_before():
    abstract = released([25], EgressLevel.RECENT)
    np.testing.assert_array_equal(abstract.items, [np.arange(16, 26)])
    assert not np.any(abstract.attributes)
    # Events 1 to 15: ten of category 0.
    np.testing.assert_array_equal(abstract.category_shares, [[round(15 * (10 / 15) ** 0.5), round(15 * (5 / 15) ** 0.5)]])


def test_full_releases_the_newest_events_and_the_attributes():
    abstract = released([25, 4], EgressLevel.FULL)
    np.testing.assert_array_equal(abstract.items[0], np.arange(14, 26))
    np.testing.assert_array_equal(abstract.items[1], [1, 2, 3, 4] + [0] * 8)
    assert np.all(np.asarray(abstract.attributes) == 1)
    assert not np.any(np.asarray(abstract.category_shares)[1])


def test_an_older_view_does_not_know_newer_events():
    abstract = released([25], EgressLevel.FULL, age=5)
    np.testing.assert_array_equal(abstract.items[0], np.arange(9, 21))


@pytest.mark.parametrize("level", [EgressLevel.PROFILE, EgressLevel.RECENT, EgressLevel.FULL])
def test_batch_order_changes_nothing(level):
    together, alone = released([25, 7, 0], level), released([7], level)
    np.testing.assert_array_equal(together.items[1:2], alone.items)
    np.testing.assert_array_equal(together.category_shares[1:2], alone.category_shares)


def test_sequences_are_a_prefix_and_the_released_ids():
    sequences, tokens = abstract_sequences(released([4], EgressLevel.FULL))
    np.testing.assert_array_equal(tokens, [5])
    np.testing.assert_array_equal(sequences.item_indices[0], [0, 1, 2, 3, 4] + [0] * 8)
    np.testing.assert_array_equal(sequences.segment_ids[0], [1] * 5 + [0] * 8)
    np.testing.assert_array_equal(sequences.prefix_rows[0], [1] + [0] * 12)
