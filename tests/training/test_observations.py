"""What is kept of requests for the planner-only steps is what a joint step would have seen."""

from pathlib import Path

import jax
import numpy as np
import pytest

from cda4rec_jax.agents.device import candidate_features, without_structure
from cda4rec_jax.agents.device.features import CLOUD_FEATURES, FEATURES
from cda4rec_jax.data.splits import train_lengths
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import load_corpus
from cda4rec_jax.training import RunConfig, StepConfig, Trainer
from cda4rec_jax.training.observations import KeptObservations


@pytest.fixture(scope="module")
def trainer(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """At the start of what ``tiny_run`` trained."""
    run = RunDirectory.open(tiny_run)
    config, exposure = run.read_config("run", RunConfig), tuple(run.read_json("exposure")["exposure"])
    folder = RunDirectory.create(tmp_path_factory.mktemp("observations") / "run", {}, run.kind)
    return Trainer(load_corpus(run), StepConfig(system=config.system, train=config.train), config.packing, exposure, folder)


@pytest.fixture(scope="module")
def kept(trainer: Trainer) -> KeptObservations:
    return trainer._keep_observations()


def test_each_is_given_once_before_any_comes_again(kept: KeptObservations):
    turns = [kept.batch(step, 7) for step in range(-(-2 * len(kept) // 7))]
    users = np.concatenate([batch.history.user_indices for batch in turns])[: 2 * len(kept)]
    first, second = users[: len(kept)], users[len(kept) :]
    assert np.array_equal(np.sort(first), np.sort(second)) and not np.array_equal(first, second)
    assert len(set(first)) == len(kept) > 7
    assert np.array_equal(kept.batch(3, 7).history.user_indices, turns[3].history.user_indices)


def test_they_are_the_withheld_events_with_the_features_of_their_candidates(trainer: Trainer, kept: KeptObservations):
    batch = kept.batch(0, 16)
    users, corpus = np.asarray(batch.history.user_indices), trainer.population.corpus
    last = train_lengths(corpus.interactions)[users] - 1
    assert np.array_equal(batch.history.targets, corpus.interactions.items[corpus.interactions.offsets[users] + last])
    assert np.array_equal(batch.history.total_lengths, last) and np.any(batch.context.cache_age_events > 0)
    popularity = np.asarray(trainer.population.catalogue(trainer.weights()).evidence.log_popularity)
    assert {"full", "recent", "profile", "reuse"} == batch.views.keys()
    for view in batch.views.values():
        assert view.features.dtype == np.float16
        column = view.features[..., FEATURES.index("popularity")]
        np.testing.assert_allclose(column[view.allowed], popularity[view.items[view.allowed]], rtol=1e-3)
        assert not any(np.isin(view.items[row][view.allowed[row]], batch.history.seen[row]).any() for row in range(16))


def test_features_without_structure_are_those_of_a_request_that_skipped_it():
    features = jax.random.normal(jax.random.key(0), (2, 3, len(FEATURES)))
    skipped = candidate_features(features[..., : len(CLOUD_FEATURES)], None)
    np.testing.assert_array_equal(without_structure(features), skipped)
