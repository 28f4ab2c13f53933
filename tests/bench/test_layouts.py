"""Packed and padded rows hold the same segments."""

import numpy as np
import pytest

from cda4rec_jax.bench.layouts import Segment, both_layouts, gathered, num_real_tokens, packed_rows, padded_rows, segments_of


def make_segment(tokens: int, first: int) -> Segment:
    targets = np.arange(first, first + tokens, dtype=np.int32)
    items = np.concatenate([np.zeros(1, np.int32), targets[:-1]])
    return Segment(item_indices=items, targets=targets, prefix=np.array([first, 0.5], np.float32))


SEGMENTS = [make_segment(3, 10), make_segment(1, 20), make_segment(2, 30)]


def as_lists(segments: list[Segment]) -> list[tuple]:
    return [(one.item_indices.tolist(), one.targets.tolist(), one.prefix.tolist()) for one in segments]


def test_segments_come_back_from_packed_and_from_padded_rows() -> None:
    packed = packed_rows([SEGMENTS[:2], SEGMENTS[2:]], 5)
    padded = padded_rows(SEGMENTS, 4)
    assert as_lists(segments_of(packed)) == as_lists(segments_of(padded)) == as_lists(SEGMENTS)
    assert packed.targets.tolist() == [[10, 11, 12, 20, 0], [30, 31, 0, 0, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 2, 0], [1, 1, 0, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 0, 0]]
    assert packed.prefix_rows.tolist() == [[1, 0, 0, 2, 0], [3, 0, 0, 0, 0]]
    assert padded.item_indices.tolist() == [[0, 10, 11, 0], [0, 0, 0, 0], [0, 30, 0, 0]]
    assert num_real_tokens(packed) == num_real_tokens(padded) == 6


def test_gathered_knows_the_places_of_the_real_tokens() -> None:
    batch = gathered(padded_rows(SEGMENTS, 4), capacity=8)
    assert batch.positions.tolist() == [0, 1, 2, 4, 8, 9, 0, 0]
    assert batch.targets.tolist() == [10, 11, 12, 20, 30, 31, 0, 0]
    with pytest.raises(ValueError, match="6 real tokens do not fit into 5"):
        gathered(padded_rows(SEGMENTS, 4), capacity=5)


def test_both_layouts_hold_equally_many_segments_a_batch() -> None:
    packed = [packed_rows([SEGMENTS], 6), packed_rows([[make_segment(4, 40), make_segment(2, 50)]], 6)]
    batches = both_layouts(packed, 4)
    assert [batch.rows.targets.shape for batch in batches.padded] == [(2, 4), (2, 4)], "5 segments in 2 batches, one left out"
    assert as_lists(segments_of(batches.padded[1].rows)) == as_lists([SEGMENTS[2], make_segment(4, 40)])
    assert batches.packed_fill == 1.0 and batches.padded_fill == (4 + 6) / 16
