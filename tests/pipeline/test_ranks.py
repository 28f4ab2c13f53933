"""Ranks of targets and slates: by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.array_typing import Array
from cda4rec_jax.data import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.conditions import plan_ranks
from cda4rec_jax.messages import EgressLevel, Placement
from cda4rec_jax.metrics import MISS_RANK, ndcg
from cda4rec_jax.pipeline.full_ranking import in_batches, ranks_of_unseen
from cda4rec_jax.pipeline.outcomes import (
    GROUPS,
    SMOOTH_RANK_TEMPERATURE,
    Scores,
    View,
    fusion_losses,
    plan_group,
    plan_slates,
    target_ranks,
)
from cda4rec_jax.pipeline.population import BATCH_USERS
from cda4rec_jax.pipeline.subtasks import rank_slate, unseen
from cda4rec_jax.planner import PLANS, PlanSpace, fresh_plan, plan_index
from cda4rec_jax.runs.artifacts import load_trained

COMMITTED = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"


def views_and_scores(items, allowed, scores, places=None) -> tuple[dict[str, View], Scores]:
    """The same view for every group of plans; the last items are resident ones, as many as have ``places``."""
    places = np.zeros((len(items), 0), np.int32) if places is None else places
    features = jnp.zeros((*np.shape(items), 1))
    view = View(items=jnp.asarray(items), allowed=jnp.asarray(allowed), features=features, places=jnp.asarray(places))
    return {group.view: view for group in GROUPS}, {group: jnp.asarray(scores) for group in GROUPS}


def test_a_tie_counts_against_the_target():
    views, scores = views_and_scores([[4, 2, 9]], [[True, True, True]], [[1.0, 1.0, 0.5]])
    assert np.all(np.asarray(target_ranks(scores, views, jnp.asarray([2]))) == 2)


def test_items_already_seen_are_no_candidates():
    views, scores = views_and_scores([[4, 2, 9]], [[False, True, True]], [[3.0, 2.0, 1.0]])
    assert np.all(np.asarray(target_ranks(scores, views, jnp.asarray([2]))) == 1)


def test_a_target_that_was_not_retrieved_is_a_miss():
    views, scores = views_and_scores([[4, 2, 9]], [[True, True, True]], [[3.0, 2.0, 1.0]])
    assert np.all(np.asarray(target_ranks(scores, views, jnp.asarray([7]))) == MISS_RANK)


def test_a_smaller_number_of_candidates_is_a_prefix():
    items = np.arange(1, 121)[None]
    views, scores = views_and_scores(items, np.ones((1, 120), bool), np.linspace(0, 1, 120, dtype=np.float32)[None])
    ranks = np.asarray(target_ranks(scores, views, jnp.asarray([50])))[0]
    assert ranks[plan_index("fresh-full-20-device")] == MISS_RANK
    assert ranks[plan_index("fresh-full-100-device")] == 51  # items 51 to 100 score above it
    assert ranks[plan_index("fresh-full-500-device")] == 71


def test_a_resident_item_is_ranked_by_the_device_wherever_the_candidates_end():
    items = np.concatenate([np.arange(1, 121), [50, 200]])[None]  # item 50 is the 50th candidate as well
    scores = np.concatenate([np.linspace(1, 0, 120), [0.9, 0.2]]).astype(np.float32)[None]
    views, scores = views_and_scores(items, np.ones((1, 122), bool), scores, [[49, 120]])
    for target, few, many, cloud in ((50, 13, 50, 50), (200, 22, 97, MISS_RANK), (110, MISS_RANK, MISS_RANK, MISS_RANK)):
        ranks = np.asarray(target_ranks(scores, views, jnp.asarray([target])))[0]
        assert ranks[plan_index("fresh-full-20-device")] == few
        assert ranks[plan_index("fresh-full-100-device")] == ranks[plan_index("local-reuse-device")] == many
        assert ranks[plan_index("cloud-full-cloud")] == cloud


def test_slates_and_ranks_agree():
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(np.arange(1, 41)) for _ in range(5)])
    items = np.concatenate([items, items[:, 15:18], np.arange(41, 46) + np.zeros((5, 1), int)], axis=1)
    places = np.concatenate([np.arange(15, 18), np.full(5, 40)]) + np.zeros((5, 1), int)
    allowed = rng.random((5, 48)) < 0.7
    allowed[:, 40:43] = allowed[:, 15:18]
    views, scores = views_and_scores(items, allowed, rng.normal(size=(5, 48)).astype(np.float32), places)
    slates = np.asarray(plan_slates(scores, views, 10))
    ranks = {item: np.asarray(target_ranks(scores, views, jnp.full(5, item))) for item in range(1, 46)}
    for user in range(5):
        for plan in range(len(PLANS)):
            assert len(set(slates[user, plan])) == 10
            for place, item in enumerate(slates[user, plan]):
                assert ranks[item][user, plan] == place + 1


def test_the_fusion_loss_is_the_cross_entropy_of_the_allowed_candidates():
    views, scores = views_and_scores([[4, 2, 9]], [[True, True, False]], [[1.0, 2.0, 50.0]])
    losses, present = fusion_losses(scores, views, jnp.asarray([4]))
    assert np.all(np.asarray(present))
    np.testing.assert_allclose(losses, np.full((1, len(PLANS)), np.log(np.e + np.e**2) - 1), rtol=1e-5)


def test_the_fusion_loss_rewards_the_smoothed_ndcg_of_the_allowed_candidates():
    views, scores = views_and_scores([[4, 2, 9, 3]], [[True, True, False, True]], [[1.0, 2.0, 50.0, 0.5]])
    plain, present = fusion_losses(scores, views, jnp.asarray([4]))
    rewarded, still_present = fusion_losses(scores, views, jnp.asarray([4]), ndcg_weight=3.0)
    rank = 1 + sum(1 / (1 + np.exp(-difference / SMOOTH_RANK_TEMPERATURE)) for difference in (2.0 - 1.0, 0.5 - 1.0))
    np.testing.assert_allclose(plain - rewarded, np.full((1, len(PLANS)), 3 / np.log2(1 + rank)), rtol=1e-5)
    np.testing.assert_array_equal(present, still_present)


def test_the_smoothed_ndcg_is_the_ndcg_of_scores_far_apart():
    scores = 100.0 * np.random.default_rng(0).permutation(40)[None].astype(np.float32)
    views, grouped = views_and_scores(np.arange(1, 41)[None], np.ones((1, 40), bool), scores)
    targets, weight = jnp.asarray([17]), 1e4
    losses = [fusion_losses(grouped, views, targets, ndcg_weight=given)[0] for given in (0.0, weight)]
    quality = ndcg(np.asarray(target_ranks(grouped, views, targets)), 40)
    assert 0.1 < np.mean(np.asarray(quality)) < 0.9
    np.testing.assert_allclose((losses[0] - losses[1]) / weight, quality, rtol=1e-3)


def test_a_miss_sends_no_gradient_and_a_hit_a_finite_one():
    items, allowed = np.asarray([[4, 2, 9], [5, 6, 7]]), np.ones((2, 3), bool)
    views, scores = views_and_scores(items, allowed, np.zeros((2, 3), np.float32))

    def total(moved: Array) -> Array:
        moved_scores = {group: given + moved for group, given in scores.items()}
        losses, present = fusion_losses(moved_scores, views, jnp.asarray([4, 1]), ndcg_weight=15.0)
        return jnp.sum(jnp.where(present, losses, 0.0))

    gradient = np.asarray(jax.grad(total)(jnp.zeros((2, 3))))
    assert np.all(np.isfinite(gradient)) and gradient[0, 0] < 0 < gradient[0, 1]
    np.testing.assert_array_equal(gradient[1], 0.0)


def test_every_plan_ranks_its_own_pool_with_its_own_scores():
    generator, names = np.random.default_rng(0), sorted({group.view for group in GROUPS})
    views, scores, resident = {}, {}, 40
    for name in names:
        candidates = np.stack([generator.permutation(300)[:250] + 1 for _ in range(8)])
        held = np.stack([generator.permutation(300)[:resident] + 1 for _ in range(8)])
        places = np.full(held.shape, 250)
        for user, column in np.ndindex(held.shape):
            places[user, column] = next(iter(np.flatnonzero(candidates[user] == held[user, column])), 250)
        items = np.concatenate([candidates, held], axis=1)
        allowed = jnp.asarray(generator.random((8, 301)) < 0.9)[np.arange(8)[:, None], items]
        features = jnp.zeros((*items.shape, 1))
        views[name] = View(items=jnp.asarray(items), allowed=allowed, features=features, places=jnp.asarray(places))
    for group in GROUPS:
        scores[group] = jnp.asarray(generator.normal(size=views[group.view].items.shape), jnp.float32)
    targets = jnp.full(8, 7)
    ranks = np.asarray(target_ranks(scores, views, targets))
    losses, present = (np.asarray(found) for found in fusion_losses(scores, views, targets))
    views = jax.tree.map(np.asarray, views)
    assert 0.2 < np.mean(present) < 0.9
    for number, plan in enumerate(PLANS):
        view, logits = views[plan_group(plan).view], np.asarray(scores[plan_group(plan)], np.float64)
        for user in range(8):
            pool, limit = {}, plan.num_candidates
            columns = list(range(min(limit, 250)))
            columns += [column for column in range(250, 250 + resident) if plan.ranking is Placement.DEVICE]
            for column in columns:
                if view.allowed[user, column]:
                    pool.setdefault(int(view.items[user, column]), logits[user, column])  # the cloud's copy comes first
            assert present[user, number] == (7 in pool)
            left = np.asarray(list(pool.values()))
            expected = (np.sum(left >= pool[7]), np.log(np.exp(left).sum()) - pool[7]) if 7 in pool else (MISS_RANK, 0.0)
            assert ranks[user, number] == expected[0]
            np.testing.assert_allclose(losses[user, number], expected[1], rtol=1e-4, atol=1e-5)


def test_a_slate_is_padded_where_too_few_candidates_remain():
    slate = rank_slate(jnp.asarray([[5, 6, 7]]), jnp.asarray([[1.0, 3.0, 2.0]]), jnp.asarray([[True, False, True]]), 4)
    np.testing.assert_array_equal(slate.items, [[7, 5, 0, 0]])
    np.testing.assert_array_equal(np.isfinite(np.asarray(slate.scores)), [[True, True, False, False]])


def test_padding_and_history_are_not_unseen():
    np.testing.assert_array_equal(unseen(jnp.asarray([[0, 3, 4]]), jnp.asarray([[3, 0, 0]]), 5), [[False, False, True]])


def test_full_catalogue_rank_skips_padding_and_seen_items():
    scores = jnp.asarray([[99.0, 5.0, 4.0, 3.0, 3.0]])
    assert ranks_of_unseen(scores, jnp.asarray([[1, 0]]), jnp.asarray([3]))[0] == 3  # items 2 and 4 (a tie)
    assert ranks_of_unseen(scores, jnp.asarray([[1, 3]]), jnp.asarray([3]))[0] == MISS_RANK  # as in the slate of every plan


@pytest.mark.parametrize("where", ["cloud/decoder", "cloud/items"])
def test_ranks_of_an_agent_that_diverged_are_refused(where: str) -> None:
    trained = load_trained(COMMITTED)
    broken = diverged(trained.weights, where)
    users = np.arange(5)
    asked = users, trained.corpus.target_positions(Split.TEST)[users]
    assert trained.population.full_ranks(trained.weights, *asked).min() >= 1
    with pytest.raises(UserError, match=r"5 of 5 users have scores that are NaN.*train with a lower --learning-rate"):
        trained.population.full_ranks(broken, *asked)


@pytest.mark.parametrize("where", ["cloud/decoder", "device/head/bias"])
def test_ranks_of_plans_whose_scores_are_no_numbers_are_refused(where: str) -> None:
    trained = load_trained(COMMITTED)
    broken = diverged(trained.weights, where)
    users = np.arange(5)
    positions = trained.corpus.target_positions(Split.TEST)[users]
    with pytest.raises(UserError, match="5 of 5 users have scores that are NaN"):
        trained.population.records(broken, trained.world(), users, positions, draws=1)
    with pytest.raises(UserError, match="5 of 5 users have scores that are NaN"):
        plan_ranks(replace(trained, weights=broken), users, positions)


def diverged(weights: Any, where: str) -> Any:
    """The weights with NaN in all that is trained below ``where``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full_like(leaf, np.nan) if is_trained_below(where, path, leaf) else leaf, weights
    )


def is_trained_below(where: str, path: tuple, leaf: np.ndarray) -> bool:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.startswith(where) and np.issubdtype(leaf.dtype, np.floating)


def test_users_that_fill_a_batch_do_not_count_in_the_moments_of_features():
    trained = load_trained(COMMITTED)
    users = np.arange(3)
    found = [
        trained.population.feature_moments(
            trained.weights, trained.world(), chosen, trained.corpus.target_positions(Split.VALIDATION)[chosen]
        )
        for chosen in (users, np.tile(users, BATCH_USERS))
    ]
    for few, full in zip(*found, strict=True):
        np.testing.assert_allclose(few, full, rtol=1e-3, atol=1e-3)


def test_batches_have_one_shape_and_cover_everything_in_order():
    batches = in_batches(7, 3)
    assert [list(batch) for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]


def test_a_plan_of_50_candidates_answers_between_those_of_20_and_of_100():
    space = PlanSpace(plans=(*PLANS, fresh_plan(EgressLevel.FULL, 50, Placement.DEVICE)))
    generator = np.random.default_rng(0)
    items = np.stack([generator.permutation(120) + 1 for _ in range(200)])
    views, scores = views_and_scores(items, generator.random((200, 120)) < 0.9, generator.random((200, 120), np.float32))
    ranks = np.asarray(target_ranks(scores, views, jnp.full(200, 7), space))
    few, own, many = (ranks[:, space.index(f"fresh-full-{count}-device")] for count in (20, 50, 100))
    found = [column < MISS_RANK for column in (few, own, many)]
    assert found[0].sum() < found[1].sum() < found[2].sum()
    assert np.all(found[0] <= found[1]) and np.all(found[1] <= found[2])
    assert np.all(few[found[0]] <= own[found[0]]) and np.all(own[found[1]] <= many[found[1]])
    np.testing.assert_array_equal(ranks[:, :32], target_ranks(scores, views, jnp.full(200, 7)))
