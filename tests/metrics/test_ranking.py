"""Definitions of the ranking metrics by hand-computed fractions, agreement with ir-measures, and what ties and NaN do."""

import ir_measures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cda4rec_jax.metrics import MISS_RANK, check_no_nan, hit_rate, mrr, ndcg, target_rank

jitted_target_rank = jax.jit(target_rank)
RANKS = np.array([1, 2, 3, 4, MISS_RANK])


def rank(scores, target, candidates=None):
    is_target = jnp.arange(len(scores)) == target
    mask = None if candidates is None else jnp.array(candidates)
    return int(target_rank(jnp.array(scores, jnp.float32), is_target, mask))


def test_hit_rate_is_one_up_to_k():
    np.testing.assert_array_equal(hit_rate(RANKS, 3), [1, 1, 1, 0, 0])


def test_ndcg_is_the_logarithmic_discount_up_to_k():
    np.testing.assert_allclose(ndcg(RANKS, 3), [1, 1 / np.log2(3), 1 / 2, 0, 0], rtol=1e-6)


def test_mrr_is_the_inverse_rank_up_to_k():
    np.testing.assert_allclose(mrr(RANKS, 3), [1, 1 / 2, 1 / 3, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("metric", [hit_rate, ndcg, mrr])
def test_metrics_keep_the_shape_of_ranks_and_work_under_jit(metric):
    ranks = jnp.arange(1, 7).reshape(2, 3)
    np.testing.assert_allclose(jax.jit(metric, static_argnums=1)(ranks, 4), metric(ranks, 4), rtol=1e-6)
    assert metric(ranks, 4).shape == (2, 3)


@pytest.mark.parametrize("metric", [hit_rate, ndcg, mrr])
def test_k_below_one_raises(metric):
    with pytest.raises(ValueError, match="k is 0"):
        metric(RANKS, 0)


def test_rank_counts_strictly_better_items():
    assert rank([0.1, 0.9, 0.5, 0.7], target=1) == 1
    assert rank([0.1, 0.9, 0.5, 0.7], target=2) == 3


def test_a_tie_never_goes_to_the_target():
    assert rank([0.5, 0.5, 0.5, 0.1], target=1) == 3
    assert rank([0.0, 0.0, 0.0, 0.0], target=0) == 4


def test_removed_items_are_not_counted():
    assert rank([0.9, 0.8, 0.5, 0.7], target=2, candidates=[False, True, True, True]) == 3


def test_a_target_that_is_no_candidate_is_a_miss():
    assert rank([0.9, 0.8, 0.5], target=1, candidates=[True, False, True]) == MISS_RANK
    assert rank([0.9, 0.8, 0.5], target=7) == MISS_RANK


def test_a_nan_score_raises_on_the_host():
    with pytest.raises(ValueError, match="1 NaN of 3"):
        rank([0.9, float("nan"), 0.5], target=0)
    with pytest.raises(ValueError, match="fused scores has 2 NaN of 4"):
        check_no_nan(np.array([np.nan, 1, np.nan, 2]), "fused scores")


def test_a_nan_score_under_jit_never_helps_the_target():
    ranks = jitted_target_rank(jnp.array([[0.9, jnp.nan, 0.5], [0.9, jnp.nan, 0.5]]), jnp.array([[1, 0, 0], [0, 1, 0]], bool))
    np.testing.assert_array_equal(ranks, [2, 3])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_rank_is_the_worst_position_that_an_order_of_equals_can_give(scores, data):
    target = data.draw(st.integers(0, len(scores) - 1))
    worst_order = sorted(range(len(scores)), key=lambda j: (-scores[j], j == target))
    slots = np.arange(12)
    padded = np.pad(np.array(scores, np.float32), (0, 12 - len(scores)), constant_values=9)
    assert int(jitted_target_rank(padded, slots == target, slots < len(scores))) == 1 + worst_order.index(target)


@pytest.mark.parametrize("k", [5, 10, 20])
def test_metrics_agree_with_ir_measures(k):
    rng = np.random.default_rng(k)
    users, items = 40, 30
    scores = rng.normal(size=(users, items)).astype(np.float32)
    targets = rng.integers(0, items, users)
    ranks = target_rank(jnp.array(scores), jnp.array(np.arange(items)[None] == targets[:, None]))
    qrels = [ir_measures.Qrel(str(u), str(targets[u]), 1) for u in range(users)]
    run = [ir_measures.ScoredDoc(str(u), str(i), float(scores[u, i])) for u in range(users) for i in range(items)]
    ours = {ir_measures.Success @ k: hit_rate, ir_measures.nDCG @ k: ndcg, ir_measures.RR @ k: mrr}
    theirs = ir_measures.calc_aggregate(list(ours), qrels, run)
    for measure, metric in ours.items():
        np.testing.assert_allclose(np.mean(metric(ranks, k)), theirs[measure], rtol=1e-5, err_msg=str(measure))
