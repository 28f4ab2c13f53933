"""Leave-one-out."""

import numpy as np
import pytest

from cda4rec_jax.data import Interactions, Split, prefix_lengths, targets, train_histories, train_lengths

TOY = Interactions(
    name="toy",
    user_ids=("u", "v"),
    item_ids=tuple("abcde"),
    offsets=np.array([0, 3, 8], np.int64),
    items=np.array([1, 2, 3, 5, 4, 3, 2, 1], np.int32),
    timestamps=np.array([0, 1, 2, 0, 1, 2, 3, 4], np.float64),
    has_timestamps=False,
    titles=("",) * 5,
    categories=((),) * 5,
    user_attributes={},
)


def test_the_last_event_is_the_test_target_and_the_one_before_the_validation_target() -> None:
    assert targets(TOY, Split.TEST).tolist() == [3, 1]
    assert targets(TOY, Split.VALIDATION).tolist() == [2, 2]
    assert prefix_lengths(TOY, Split.TEST).tolist() == [2, 4]
    assert prefix_lengths(TOY, Split.VALIDATION).tolist() == [1, 3]


def test_training_histories_end_before_the_validation_target() -> None:
    offsets, items = train_histories(TOY)
    assert train_lengths(TOY).tolist() == [1, 3]
    assert offsets.tolist() == [0, 1, 4]
    assert items.tolist() == [1, 5, 4, 3]


def test_the_training_split_has_no_single_target() -> None:
    with pytest.raises(ValueError, match="train_histories"):
        targets(TOY, Split.TRAIN)
