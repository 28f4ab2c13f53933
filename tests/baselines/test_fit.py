"""Every baseline learns something; the trainer keeps its word; all are ranked by one rule."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.baselines import (
    BASELINES,
    BERT4RecConfig,
    CooccurrenceConfig,
    EASEConfig,
    FitConfig,
    GRU4RecConfig,
    GSASRecConfig,
    HSTUConfig,
    LSC4RecConfig,
    PopularityConfig,
    Recommender,
    SASRecBCEConfig,
    TransformerConfig,
    catalogue_ranks,
)
from cda4rec_jax.baselines.gru4rec import fit_gru4rec
from cda4rec_jax.baselines.lsc4rec import LSC4Rec, fuse
from cda4rec_jax.data import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.metrics import ndcg
from cda4rec_jax.training import Progress

FIT = FitConfig(epochs=10, rows_per_batch=16, learning_rate=1e-2, evaluations_per_epoch=0.5)
SIZES: dict[str, Any] = {
    "width": 16,
    "num_layers": 1,
    "history_length": 15,
    "row_tokens": 16,
    "dropout_rate": 0.1,
    "id_scale": 1.0,
    "fit": FIT,
}
TRANSFORMER: dict[str, Any] = SIZES | {"mlp_hidden": 16}
CONFIGS = {
    "popularity": PopularityConfig(),
    "cooccurrence": CooccurrenceConfig(),
    "ease": EASEConfig(regularisation=20.0),
    "gru4rec": GRU4RecConfig(**SIZES, hidden=16),
    "sasrec-bce": SASRecBCEConfig(**TRANSFORMER),
    "gsasrec": GSASRecConfig(**TRANSFORMER, num_negatives=16),
    "bert4rec": BERT4RecConfig(**TRANSFORMER),
    "hstu": HSTUConfig(**SIZES),
    "lsc4rec": LSC4RecConfig(
        cloud=TransformerConfig(**TRANSFORMER),
        device=TransformerConfig(**dict(TRANSFORMER, width=8)),
        num_candidates=40,
        weight_steps=4,
    ),
}


@pytest.fixture(scope="module")
def fitted(corpus) -> Callable[[str], Recommender]:
    """``fitted(name)``: each baseline is trained once."""
    made: dict[str, Recommender] = {}

    def get(name: str) -> Recommender:
        if name not in made:
            made[name] = BASELINES[name](corpus, CONFIGS[name])
        return made[name]

    return get


def test_every_baseline_has_a_config_here():
    assert set(CONFIGS) == set(BASELINES)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_ranks_better_than_chance(fitted, corpus, name):
    users = np.arange(corpus.interactions.num_users)
    positions = corpus.target_positions(Split.TEST)
    recommender = fitted(name)
    ranks = catalogue_ranks(recommender, corpus, users, positions)
    seen = [len(set(corpus.interactions.history(user)[:end]) - {0}) for user, end in enumerate(positions)]
    open_items = corpus.interactions.num_items - np.array(seen)
    places = np.arange(1, 11)
    by_chance = np.array([np.sum(1 / np.log2(1 + places[places <= count])) / max(count, 1) for count in open_items])
    assert ranks.min() >= 1 and np.all(ranks <= open_items + 1)
    assert np.mean(ndcg(ranks, 10)) > 1.3 * by_chance.mean()
    assert isinstance(recommender, Recommender) and recommender.num_parameters > 0


@pytest.mark.parametrize("name", BASELINES)
def test_scores_have_a_column_for_every_item(fitted, corpus, name):
    recommender = fitted(name)
    history = corpus.histories(np.arange(5), np.array([0, 1, 1, 2, 1]), recommender.history_length)
    scores = np.asarray(recommender.score(history))
    assert scores.shape == (5, corpus.interactions.num_items + 1) and not np.isnan(scores).any()


def test_the_list_of_the_cloud_bounds_the_fusion(fitted, corpus):
    recommender = fitted("lsc4rec")
    assert isinstance(recommender, LSC4Rec) and 0.0 <= recommender.cloud_weight <= 1.0
    history = corpus.histories(np.arange(4), np.ones(4, int), recommender.history_length)
    scores, cloud = np.asarray(recommender.score(history)), np.asarray(recommender.cloud.score(history))
    for row, own in zip(scores, cloud, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(row)), np.sort(np.argsort(-own[1:])[:40] + 1))


def test_fused_scores_by_hand():
    cloud, device = jnp.asarray([[9.0, 4.0, 2.0, -5.0]]), jnp.asarray([[0.0, 1.0, 7.0, 99.0]])
    for weight, expected in ((1.0, [1.0, -1.0]), (0.0, [-1.0, 1.0]), (0.75, [0.5, -0.5])):
        found = np.asarray(fuse(cloud, device, weight, num_candidates=2))[0]
        np.testing.assert_allclose(found[1:3], expected, atol=1e-6)
        assert np.isneginf(found[[0, 3]]).all()


def test_progress_is_reported_and_the_best_weights_are_kept(corpus):
    heard: list[Progress] = []
    config = replace(CONFIGS["gru4rec"], fit=replace(FIT, evaluations_per_epoch=1.0, validation_users=60, patience=10))
    recommender = fit_gru4rec(corpus, config, heard.append)
    validations = [progress.validation["ndcg@10"] for progress in heard if progress.validation]
    losses = [progress.values["loss"] for progress in heard if progress.values]
    assert len(validations) == 10 and losses[-1] < losses[0]
    users = np.sort(np.random.default_rng(0).permutation(corpus.interactions.num_users)[:60])
    ranks = catalogue_ranks(recommender, corpus, users, corpus.target_positions(Split.VALIDATION)[users])
    assert float(np.mean(ndcg(ranks, 10))) == pytest.approx(max(validations))


def test_training_stops_at_its_limit_of_time_and_without_progress(corpus):
    heard: list[Progress] = []
    config = replace(CONFIGS["gru4rec"], fit=replace(FIT, max_seconds=1e-6))
    fit_gru4rec(corpus, config, heard.append)
    assert [progress.step for progress in heard if progress.validation] == [1]
    heard.clear()
    config = replace(config, fit=replace(FIT, learning_rate=0.0, evaluations_per_epoch=1.0, patience=2))
    fit_gru4rec(corpus, config, heard.append)
    assert len([progress for progress in heard if progress.validation]) == 3, "the first is the best, and two are not better"


def test_a_loss_that_is_not_finite_ends_training(corpus):
    config = replace(CONFIGS["gru4rec"], id_scale=float("nan"))
    with pytest.raises(UserError, match="the loss is nan at step 10: train with a lower learning_rate"):
        fit_gru4rec(corpus, config)
    # An evaluation may come before a loss is looked at, and the loss of a step is that of the weights before it.
    config = replace(config, fit=replace(FIT, max_seconds=1e-6))
    with pytest.raises(UserError, match=r"NaN or infinite.* train with a lower --learning-rate"):
        fit_gru4rec(corpus, config)


def test_the_same_seed_gives_the_same_weights(fitted, corpus):
    again = fit_gru4rec(corpus, CONFIGS["gru4rec"])
    jax.tree.map(np.testing.assert_array_equal, again.weights[0], fitted("gru4rec").weights[0])


def test_scores_that_are_no_numbers_are_refused(corpus):
    class Broken:
        history_length = 3
        num_parameters = 0

        def score(self, history):
            return jnp.full((len(history.items), corpus.interactions.num_items + 1), jnp.nan)

    with pytest.raises(UserError, match="3 of 3 users have scores that are NaN"):
        catalogue_ranks(Broken(), corpus, np.arange(3), np.ones(3, int))
