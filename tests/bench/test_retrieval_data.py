"""The generated hard set is what its docstring says."""

import numpy as np
import pytest

from cda4rec_jax.bench.retrieval_data import RANK, hard_items, hard_queries
from cda4rec_jax.errors import UserError


def test_hard_items_have_24_strong_directions_norms_from_07_to_13_and_a_padding_row():
    items = hard_items(5000, 64, seed=3)
    assert (items.shape, items.dtype) == ((5001, 64), np.float32)
    assert not items[0].any()
    norms = np.linalg.norm(items[1:], axis=1)
    assert 0.7 - 1e-5 <= norms.min() < 0.71 and 1.29 < norms.max() <= 1.3 + 1e-5
    variances = np.linalg.eigvalsh(np.cov(items[1:].T))[::-1]
    assert variances[RANK - 1] > 10 * variances[RANK]
    assert variances[-1] > 0.5 * variances[RANK]  # noise has no direction


def test_queries_lie_in_the_space_of_the_items_and_are_none_of_them():
    items, queries = hard_items(3000, 32, seed=1)[1:], hard_queries(3000, 32, seed=1)
    _, _, directions = np.linalg.svd(items, full_matrices=False)
    inside = np.linalg.norm(queries @ directions[:RANK].T, axis=1) / np.linalg.norm(queries, axis=1)
    assert inside.min() > 0.85
    assert not np.isin(queries[:, 0], items[:, 0]).any()


def test_a_seed_gives_the_same_vectors_and_a_larger_table_begins_with_a_smaller_one():
    large = hard_items(70_000, 24, seed=5)
    np.testing.assert_array_equal(hard_items(69_000, 24, seed=5), large[:69_001])
    assert not np.array_equal(hard_items(10, 24, seed=6), large[:11])


@pytest.mark.parametrize(("count", "width"), [(0, 64), (10, 23)])
def test_no_vector_or_too_narrow_raises(count, width):
    with pytest.raises(UserError, match="width of at least 24"):
        hard_items(count, width)
