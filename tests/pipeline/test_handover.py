"""What is handed to a program in few arrays comes out as it went in."""

from dataclasses import fields

import jax
import numpy as np
import pytest

from cda4rec_jax.messages import Evidence
from cda4rec_jax.pipeline.handover import Handover

ROWS = 7


def records(*leading: int) -> Evidence:
    """Random bytes, so that every number of every dtype may be among them but NaN, which equals nothing."""
    rng = np.random.default_rng(0)

    def of(dtype: type, *shape: int) -> np.ndarray:
        if dtype is np.float32:
            return rng.normal(size=(*leading, *shape)).astype(dtype)
        return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (*leading, *shape), dtype, endpoint=True)

    return Evidence(
        vectors=of(np.int8, 6),
        vector_scales=of(np.float32),
        text=of(np.int8, 5),
        text_scales=of(np.float32),
        previous_items=of(np.int32, 3),
        previous_weights=of(np.uint8, 3),
        cooccurring_items=of(np.int32, 3),
        cooccurring_weights=of(np.uint8, 3),
        categories=of(np.uint8, 2),
        words=of(np.uint16, 4),
        word_weights=of(np.uint8, 4),
        log_popularity=of(np.float32),
    )


@pytest.fixture
def given() -> tuple[np.ndarray, np.ndarray, Evidence]:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(1, ROWS)).astype(np.float32)
    scores[0, 0] = -np.inf
    return rng.permutation(ROWS).astype(np.int32)[None, :], scores, records(1, ROWS)


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_joined_is_parted_again(given, whole: bool) -> None:
    handover = Handover.of(records(20))
    joined = handover.join(*given, whole=whole)
    assert len(joined) == (3 if whole else 1)
    candidates, evidence = jax.jit(lambda joined: handover.part(joined, whole=whole))(joined)
    items, scores, _ = given
    is_item = items > 0
    np.testing.assert_array_equal(candidates.items, items)
    np.testing.assert_array_equal(candidates.scores, np.where(is_item, scores, 0.0))
    np.testing.assert_array_equal(candidates.present, is_item)
    np.testing.assert_array_equal(candidates.ranks, np.arange(ROWS)[None])
    for each in fields(Evidence):
        found, sent = getattr(evidence, each.name), getattr(given[2], each.name)
        assert found.dtype == sent.dtype
        if whole or each.name == "log_popularity":
            np.testing.assert_array_equal(found, sent)
        else:
            assert found.size == 0


def test_arrays_of_jax_and_arrays_with_gaps_are_joined_like_others(given) -> None:
    handover = Handover.of(records(20))
    items, scores, evidence = given
    expected = handover.join(*given, whole=True)
    with_gaps = jax.tree.map(lambda rows: np.repeat(rows, 2, axis=1)[:, ::2], evidence)
    others = (jax.device_put(items), scores.astype(np.float64), with_gaps)
    for ours, theirs in zip(expected, handover.join(*others, whole=True), strict=True):
        np.testing.assert_array_equal(ours, theirs)
