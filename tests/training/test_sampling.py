"""The distribution of negatives, by hand and by counting draws."""

import math

import jax
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.training.sampling import ItemShares

COUNTS = np.array([0, 4, 0, 2, 0, 9])  # in row 0, padding


def test_shares_are_those_of_the_counts_and_one_more_of_each_item() -> None:
    logs = ItemShares.of(COUNTS).log_share(np.array([[0, 1, 2], [3, 4, 5]]))
    np.testing.assert_allclose(
        logs, [[0, math.log(5 / 20), math.log(1 / 20)], [math.log(3 / 20), math.log(1 / 20), math.log(10 / 20)]], rtol=1e-6
    )


def test_draws_come_as_often_as_their_shares_say_and_none_is_padding() -> None:
    drawn = np.bincount(ItemShares.of(COUNTS).draw(jax.random.key(3), 20_000), minlength=6)
    assert drawn[0] == 0 and len(drawn) == 6
    np.testing.assert_allclose(drawn[1:] / 20_000, [5 / 20, 1 / 20, 3 / 20, 1 / 20, 10 / 20], atol=0.015)


def test_draws_are_those_of_their_key() -> None:
    shares = ItemShares.of(np.arange(1000))
    first, again, other = (shares.draw(jax.random.key(seed, impl="unsafe_rbg"), 64) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_rare_items_among_a_billion_events_keep_their_share() -> None:
    counts = np.array([0, 1_000_000_000, 0, 1_000_000_000, 7])
    shares = ItemShares.of(counts)
    np.testing.assert_allclose(
        shares.log_share(np.array([2, 4])),
        np.log([1 / 2_000_000_010, 8 / 2_000_000_010]) + np.log(2_000_000_010 / 2_000_000_011),
        rtol=1e-6,
    )


def test_more_events_than_can_be_numbered_raise_a_user_error() -> None:
    with pytest.raises(UserError, match="2,147,483,648 training events and items"):
        ItemShares.of(np.array([0, 2**31 - 1]))
