"""The columns of interactions, their fingerprint, and the k-core."""

from dataclasses import replace

import numpy as np
import pytest

from cda4rec_jax.data import Interactions, before_last, k_core
from cda4rec_jax.errors import UserError


def interactions(histories: list[list[int]], num_items: int, has_timestamps: bool = True) -> Interactions:
    lengths = [len(history) for history in histories]
    return Interactions(
        name="toy",
        user_ids=tuple(f"u{j}" for j in range(len(histories))),
        item_ids=tuple(f"i{j}" for j in range(1, num_items + 1)),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        items=np.array([item for history in histories for item in history], np.int32),
        timestamps=np.array([10.0 * j if has_timestamps else j for n in lengths for j in range(n)], np.float64),
        has_timestamps=has_timestamps,
        titles=tuple(f"title {j}" for j in range(1, num_items + 1)),
        categories=tuple((f"c{j % 2}",) for j in range(1, num_items + 1)),
        user_attributes={"age": tuple(str(20 + j) for j in range(len(histories)))},
    )


TOY = interactions([[1, 2, 3], [2, 3, 4, 1], [3, 1, 2, 5, 4]], num_items=5)


def test_a_history_is_a_read_only_view_of_one_user() -> None:
    assert TOY.history(1).tolist() == [2, 3, 4, 1]
    with pytest.raises(ValueError, match="read-only"):
        TOY.history(1)[0] = 5


def test_the_fingerprint_covers_content_and_not_the_name() -> None:
    assert replace(TOY, name="other").fingerprint == TOY.fingerprint
    later = TOY.timestamps.copy()
    later[-1] += 1
    changed = [
        replace(TOY, timestamps=later),
        replace(TOY, has_timestamps=False),
        replace(TOY, titles=("new", *TOY.titles[1:])),
        replace(TOY, user_attributes={}),
        replace(TOY, items=TOY.items[::-1]),
    ]
    assert len({data.fingerprint for data in [TOY, *changed]}) == len(changed) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([0, 3, 3, 12], np.int64)}, "offsets must rise"),
        ({"items": np.zeros(12, np.int32)}, "item indices must lie in 1..5"),
        ({"titles": ("one",)}, "expected 5 titles"),
        ({"user_attributes": {"age": ("3",)}}, "user attribute 'age' has 1 values, expected 3"),
        ({"user_ids": ("u", "u", "v")}, "unique"),
        ({"timestamps": np.full(12, np.nan)}, "finite"),
        ({"timestamps": -TOY.timestamps}, "chronological"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TOY, **change)


def test_k_core_drops_users_and_items_in_turns_until_none_is_weak() -> None:
    # Item 5 is rare; without it u2 has 2 events and falls; without u2 item 4 is rare.
    data = interactions([[1, 2, 3], [3, 2, 1], [4, 5, 1], [1, 3, 2, 4]], num_items=5)
    core, findings = k_core(data, 2)
    assert core.user_ids == ("u0", "u1", "u3")
    assert core.item_ids == ("i1", "i2", "i3")
    assert [core.history(j).tolist() for j in range(3)] == [[1, 2, 3], [3, 2, 1], [1, 3, 2]]
    assert core.titles == ("title 1", "title 2", "title 3")
    assert core.user_attributes == {"age": ("20", "21", "23")}
    assert core.timestamps.tolist() == [0, 10, 20] * 3
    assert [finding.line() for finding in findings] == [
        "dropped 1 users: outside the 2-core",
        "dropped 2 items: outside the 2-core",
        "dropped 4 interactions: outside the 2-core",
    ]


def test_an_order_counts_from_0_without_gaps_after_k_core() -> None:
    data = interactions([[1, 4, 2, 3], [3, 2, 1]], num_items=4, has_timestamps=False)
    core, _ = k_core(data, 2)
    assert core.history(0).tolist() == [1, 2, 3]
    assert core.timestamps.tolist() == [0, 1, 2, 0, 1, 2]


def test_k_core_of_what_is_dense_enough_changes_nothing() -> None:
    core, findings = k_core(TOY, 1)
    assert core is TOY
    assert findings == ()


def test_k_core_that_leaves_too_little_is_refused() -> None:
    with pytest.raises(UserError, match="the 4-core keeps 0 of 3 users"):
        k_core(TOY, 4)
    with pytest.raises(UserError, match="k of at least 1, got 0"):
        k_core(TOY, 0)


def test_before_the_last_events_users_and_items_stay() -> None:
    toy = interactions([[1, 2, 3], [2, 3, 4, 1], [3, 1, 2, 5, 4]], num_items=5)
    earlier = before_last(toy, np.array([0, 1, 2]))
    assert [earlier.history(user).tolist() for user in range(3)] == [[1, 2, 3], [2, 3, 4], [3, 1, 2]]
    assert earlier.user_ids == toy.user_ids and earlier.item_ids == toy.item_ids
    assert earlier.timestamps.tolist() == [0, 10, 20] * 3
    with pytest.raises(ValueError, match="would keep 2 events"):
        before_last(toy, np.array([0, 2, 0]))
