"""Popularity, co-occurrence and EASE: by hand and against the closed form."""

import numpy as np
import pytest

from cda4rec_jax.baselines import CooccurrenceConfig, EASEConfig, catalogue_ranks
from cda4rec_jax.baselines.cooccurrence import BACK_OFF, fit_cooccurrence
from cda4rec_jax.baselines.counting import decayed_histories, train_counts
from cda4rec_jax.baselines.ease import fit_ease
from cda4rec_jax.baselines.popularity import fit_popularity
from cda4rec_jax.data import Split
from cda4rec_jax.evaluation.accuracy import popularity_ranks

# The last two events of each are targets, so training sees [1 2 3], [2 3], [1 3 3] and [4].
HISTORIES = [[1, 2, 3, 5, 5], [2, 3, 5, 5], [1, 3, 3, 5, 5], [4, 5, 5]]


def history_before_validation(corpus, users, stored_events=8):
    return corpus.histories(users, corpus.target_positions(Split.VALIDATION)[users], stored_events)


@pytest.mark.parametrize("split", [Split.VALIDATION, Split.TEST])
def test_popularity_ranks_as_evaluation_does(corpus, split):
    users = np.arange(corpus.interactions.num_users)
    positions = corpus.target_positions(split)
    expected = popularity_ranks(train_counts(corpus.interactions), corpus.interactions, users, positions)
    np.testing.assert_array_equal(catalogue_ranks(fit_popularity(corpus), corpus, users, positions), expected)


def test_counts_are_those_of_training_events(corpus_of):
    np.testing.assert_array_equal(train_counts(corpus_of(HISTORIES, 5).interactions), [0, 2, 2, 4, 1, 0])


def test_histories_decay_with_age_and_a_repeated_item_counts_by_its_newest_event(corpus_of):
    corpus = corpus_of(HISTORIES, 5)
    history = history_before_validation(corpus, np.array([0, 2, 3]))
    found = decayed_histories(history, 5, history_length=8, decay=0.5).toarray()
    np.testing.assert_array_equal(found, [[0, 0.25, 0.5, 1, 0, 0], [0, 0.25, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]])
    found = decayed_histories(history, 5, history_length=2, decay=0.5).toarray()
    np.testing.assert_array_equal(found, [[0, 0, 0.5, 1, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]])


def test_cooccurrence_by_hand(corpus_of):
    config = CooccurrenceConfig(window=2, shrinkage=2.0, history_decay=0.5)
    fitted = fit_cooccurrence(corpus_of(HISTORIES, 5), config)
    followed = fitted.followed.toarray()
    # 1 is followed by 2 once at gap 1; by 3 at gap 2 (twice) and gap 1 (once); counts of items 1 to 3 are 2, 2 and 4.
    assert followed[1, 2] == pytest.approx(1 / 4)
    assert followed[1, 3] == pytest.approx((1 / 2 + 1 / 2 + 1) / np.sqrt(4 * 6))
    assert followed[2, 3] == pytest.approx(2 / np.sqrt(4 * 6))
    assert followed[3, 3] == pytest.approx(1 / 6)
    assert fitted.num_parameters == np.count_nonzero(followed) == 4


def test_cooccurrence_scores_sum_over_the_decayed_history(corpus_of):
    corpus = corpus_of(HISTORIES, 5)
    fitted = fit_cooccurrence(corpus, CooccurrenceConfig(window=1, history_decay=0.5))
    followed = fitted.followed.toarray()
    scores = fitted.score(history_before_validation(corpus, np.array([0])))[0]
    expected = 0.25 * followed[1] + 0.5 * followed[2] + followed[3] + BACK_OFF * np.array([0, 2, 2, 4, 1, 0]) / 4
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert scores[4] > scores[5], "without evidence the more popular item comes first"


def test_a_window_without_an_event_is_refused(corpus_of):
    with pytest.raises(ValueError, match="window is 0"):
        fit_cooccurrence(corpus_of(HISTORIES, 5), CooccurrenceConfig(window=0))


def test_ease_is_the_closed_form(corpus_of):
    corpus = corpus_of(HISTORIES, 5)
    seen = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0]], float)
    precision = np.linalg.inv(seen.T @ seen + 0.5 * np.eye(5))
    expected = np.eye(5) - precision @ np.diag(1 / np.diag(precision))
    weights = fit_ease(corpus, EASEConfig(regularisation=0.5)).weights
    np.testing.assert_allclose(weights[1:, 1:], expected, atol=1e-6)
    assert not weights[0].any() and not weights[:, 0].any()


def test_ease_minimises_its_objective(corpus_of):
    seen = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0]], float)
    weights = fit_ease(corpus_of(HISTORIES, 5), EASEConfig(regularisation=0.5)).weights[1:, 1:].astype(float)

    def objective(b):
        return np.sum((seen - seen @ b) ** 2) + 0.5 * np.sum(b**2)

    rng = np.random.default_rng(0)
    for _ in range(20):
        other = weights + 0.05 * rng.normal(size=weights.shape) * (1 - np.eye(5))
        assert objective(other) > objective(weights)


def test_ease_with_decay_weighs_the_newest_events_most(corpus_of):
    corpus = corpus_of(HISTORIES, 5)
    plain, decayed = (fit_ease(corpus, EASEConfig(history_decay=decay)) for decay in (1.0, 0.5))
    history = history_before_validation(corpus, np.array([0]))
    weights = plain.weights
    np.testing.assert_allclose(plain.score(history)[0], weights[1] + weights[2] + weights[3], rtol=1e-5)
    np.testing.assert_allclose(decayed.score(history)[0], 0.25 * weights[1] + 0.5 * weights[2] + weights[3], rtol=1e-5)


def test_ease_without_regularisation_is_refused(corpus_of):
    with pytest.raises(ValueError, match="regularisation is 0"):
        fit_ease(corpus_of(HISTORIES, 5), EASEConfig(regularisation=0.0))
