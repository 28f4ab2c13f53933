"""Packing: every token is real, every target is predicted once, and no prefix knows what it predicts."""

import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.data.packing import Histories, PackedEpoch, PackingConfig, draw_segments, pack
from cda4rec_jax.data.profiles import quantise_shares
from cda4rec_jax.messages import EgressLevel

CONFIG = PackingConfig(history_length=7, row_tokens=12, recent_length=3, recent_share=0.5, profile_targets=0.5, profile_events=4)


def histories(num_users: int = 30) -> Histories:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 40, num_users)
    items = rng.integers(1, 51, sizes.sum()).astype(np.int32)
    categories = np.zeros((51, 3), np.float32)
    categories[np.arange(1, 51), np.arange(50) % 3] = 1
    return Histories(
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        items=items,
        lengths=sizes.astype(np.int64),
        item_categories=categories,
        attributes=np.eye(num_users, 2, dtype=np.float32),
    )


def epoch(seed: int = 0, *, all_levels: bool = False) -> PackedEpoch:
    data = histories()
    return PackedEpoch(data, data.category_counts(), CONFIG, np.random.default_rng(seed), all_levels=all_levels)


def test_an_epoch_predicts_every_event_once_at_full():
    data = histories()
    packed = epoch()
    batch = packed.batch(0, packed.num_rows)
    found = np.sort(np.asarray(batch.targets)[np.asarray(batch.targets) > 0])
    np.testing.assert_array_equal(found, np.sort(data.items))


def test_every_token_has_a_target_and_every_other_cell_is_padding():
    packed = epoch(all_levels=True)
    batch = packed.batch(0, packed.num_rows)
    np.testing.assert_array_equal(np.asarray(batch.targets) > 0, np.asarray(batch.segment_ids) > 0)
    assert not np.any(np.asarray(batch.item_indices)[np.asarray(batch.segment_ids) == 0])


def test_each_segment_is_a_prefix_and_the_events_before_its_targets():
    packed = epoch()
    batch = packed.batch(0, packed.num_rows)
    for row in range(packed.num_rows):
        ids = np.asarray(batch.segment_ids)[row]
        for segment in range(1, ids.max() + 1):
            cells = np.flatnonzero(ids == segment)
            items, targets = np.asarray(batch.item_indices)[row, cells], np.asarray(batch.targets)[row, cells]
            assert items[0] == 0 and np.asarray(batch.prefix_rows)[row, cells[0]] > 0
            np.testing.assert_array_equal(items[1:], targets[:-1])
            np.testing.assert_array_equal(np.asarray(batch.positions)[row, cells], np.arange(len(cells)))
            assert len(cells) <= CONFIG.history_length + 1


def test_prefixes_summarise_only_what_came_before_the_segment():
    data = histories()
    changed = Histories(**{**vars(data), "items": data.items.copy()})
    segments = draw_segments(data, CONFIG, np.random.default_rng(3), all_levels=True)
    late = int(np.argmax(segments.starts))
    user, start, stop = segments.users[late], segments.starts[late], segments.stops[late]
    begin = data.offsets[user]
    changed.items[begin + start : begin + stop] = 50
    before, after = data.category_counts(), changed.category_counts()
    np.testing.assert_array_equal(before[begin + start] - before[begin], after[begin + start] - after[begin])


def test_profiles_of_training_are_those_of_requests_behind_many_events():
    rng = np.random.default_rng(0)
    categories = np.zeros((301, 12), np.float32)
    for row in range(1, 301):
        categories[row, rng.choice(12, rng.integers(1, 7), replace=False)] = 1
    sizes = np.array([2_000_000, *[30] * 200])
    items = rng.integers(1, 301, sizes.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    data = Histories(
        offsets=offsets, items=items, lengths=sizes, item_categories=categories, attributes=np.zeros((201, 0), np.float32)
    )
    counts = data.category_counts()
    of_training = quantise_shares(counts[offsets[1:-1] + 30] - counts[offsets[1:-1]])
    weights = jnp.asarray(categories / np.maximum(categories.sum(axis=1, keepdims=True), 1.0))
    histories = jnp.asarray(items[sizes[0] :].reshape(200, 30))
    of_requests = quantise_shares(jnp.einsum("bl,blg->bg", jnp.ones(histories.shape), weights[histories]))
    np.testing.assert_array_equal(of_training, of_requests)


def test_profile_segments_predict_one_target_and_recent_ones_read_few_items():
    segments = draw_segments(histories(), CONFIG, np.random.default_rng(0), all_levels=True)
    assert set(segments.sizes[segments.levels == EgressLevel.PROFILE]) == {1}
    assert segments.sizes[segments.levels == EgressLevel.RECENT].max() <= CONFIG.recent_length + 1
    assert segments.sizes[segments.levels == EgressLevel.FULL].max() == CONFIG.history_length + 1


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    first, again, other = epoch(1).batch(0, 5), epoch(1).batch(0, 5), epoch(2).batch(0, 5)
    np.testing.assert_array_equal(first.targets, again.targets)
    assert not np.array_equal(first.targets, other.targets)


def test_rows_past_the_last_are_padding():
    packed = epoch()
    batch = packed.batch(packed.num_rows - 1, 4)
    assert batch.targets.shape == (4, CONFIG.row_tokens)
    assert not np.any(np.asarray(batch.targets)[1:])


def test_packing_overfills_no_row_and_fills_most_of_them():
    sizes = np.random.default_rng(0).integers(1, 13, 500)
    rows, firsts, numbers = pack(sizes, 12, 4)
    assert np.bincount(rows, weights=sizes).max() <= 12
    assert numbers.max() < 4
    assert sizes.sum() / (12 * (rows.max() + 1)) > 0.9
    taken = {(row, first + place) for row, first, size in zip(rows, firsts, sizes, strict=True) for place in range(size)}
    assert len(taken) == sizes.sum()


def test_rows_too_short_for_a_history_are_refused():
    with pytest.raises(ValueError, match="row_tokens 5 must be at least history_length"):
        PackingConfig(history_length=7, row_tokens=5)
