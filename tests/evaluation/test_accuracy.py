"""Ranks by popularity, and means of metrics."""

import numpy as np
import pytest

from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.evaluation.accuracy import groups_of, mean_metrics, per_user, popularity_ranks
from cda4rec_jax.metrics import MISS_RANK
from cda4rec_jax.pipeline.full_ranking import ranks_of_unseen


def interactions_of(histories: list[list[int]], num_items: int) -> Interactions:
    lengths = [len(history) for history in histories]
    return Interactions(
        name="made",
        user_ids=tuple(f"u{j}" for j in range(len(histories))),
        item_ids=tuple(f"i{j}" for j in range(num_items)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.concatenate(histories).astype(np.int32),
        timestamps=np.concatenate([np.arange(length) for length in lengths]).astype(np.float64),
        has_timestamps=False,
        titles=("",) * num_items,
        categories=((),) * num_items,
        user_attributes={},
    )


def test_popularity_ranks_by_hand():
    # Items 1..5 have 9, 7, 7, 3, 0 training events.
    counts = np.array([0, 9, 7, 7, 3, 0])
    data = interactions_of([[1, 4, 2], [2, 2, 3], [4, 3, 5], [1, 2, 1]], 5)
    ranks = popularity_ranks(counts, data, np.arange(4), np.array([2, 2, 2, 2]))
    # Item 2 ties with 3, while 1 is seen; item 3 has 1 above it, and its tie is seen twice; nothing unseen is below item 5; the last
    # user has had item 1 before.
    np.testing.assert_array_equal(ranks, [2, 2, 3, MISS_RANK])


def test_popularity_agrees_with_the_ranking_of_the_whole_catalogue():
    rng = np.random.default_rng(0)
    num_items, num_users = 30, 20
    histories = [rng.integers(1, num_items + 1, rng.integers(3, 12)).tolist() for _ in range(num_users)]
    data = interactions_of(histories, num_items)
    counts = rng.integers(0, 6, num_items + 1)
    users = np.repeat(np.arange(num_users), 2)
    positions = np.diff(data.offsets)[users] - np.tile([1, 2], num_users)
    seen = np.zeros((len(users), 12), np.int32)
    for row, (user, position) in enumerate(zip(users, positions, strict=True)):
        seen[row, :position] = data.history(int(user))[:position]
    targets = data.items[data.offsets[users] + positions]
    scores = np.broadcast_to(counts.astype(np.float32), (len(users), num_items + 1))
    expected = np.asarray(ranks_of_unseen(scores, seen, targets))
    assert 0 < np.sum(expected == MISS_RANK) < len(users), "some targets are repeated"
    np.testing.assert_array_equal(popularity_ranks(counts, data, users, positions), expected)


def test_means_of_metrics_by_hand():
    means = mean_metrics(np.array([1, 3, 7, MISS_RANK]))
    assert means["hit_rate@5"] == 0.5
    assert means["hit_rate@10"] == 0.75
    assert means["mrr@5"] == pytest.approx((1 + 1 / 3) / 4)
    assert means["ndcg@20"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 4)
    assert len(means) == 9


def test_metrics_per_user_are_one_context_each():
    np.testing.assert_array_equal(per_user(np.array([1, 30]), "hit_rate@10"), [[1.0], [0.0]])


def test_groups_reach_to_before_the_next_start_and_empty_ones_are_left_out():
    groups = groups_of(np.array([0, 1, 5, 6, 21, 400]), (0, 1, 6, 10, 21))
    assert list(groups) == ["0", "1-5", "6-9", "21 and more"]
    assert groups["1-5"].tolist() == [False, True, True, False, False, False]
    assert groups["21 and more"].tolist() == [False, False, False, False, True, True]
