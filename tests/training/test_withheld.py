"""Which training events are withheld from the trunks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cda4rec_jax.data import read_interactions
from cda4rec_jax.data.splits import train_lengths
from cda4rec_jax.errors import UserError
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.presets import preset
from cda4rec_jax.training import train_run
from cda4rec_jax.training.batches import MIN_EVENTS_KEPT, withheld_events


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    interactions = read_interactions("synthetic:users=80,items=64")
    return Corpus(interactions=interactions, text=np.zeros((interactions.num_items + 1, 1), np.float32))


@pytest.mark.parametrize("per_user", (1, 3, 1_000))
def test_they_are_the_newest_of_each_user_and_leave_some_for_the_trunks(corpus: Corpus, per_user: int) -> None:
    found, lengths = withheld_events(corpus.interactions, 1.0, per_user, seed=0), train_lengths(corpus.interactions)
    np.testing.assert_array_equal(found.counts, np.minimum(per_user, lengths - MIN_EVENTS_KEPT))
    expected = [(user, length - 1 - back) for user, length in enumerate(lengths) for back in range(found.counts[user])]
    assert list(zip(found.users, found.positions, strict=True)) == expected
    assert len(found) == found.counts.sum()


def test_a_share_of_the_users_has_them(corpus: Corpus) -> None:
    found = withheld_events(corpus.interactions, 0.5, 2, seed=0)
    assert 0.3 < np.mean(found.counts > 0) < 0.7
    assert set(found.users) == set(np.flatnonzero(found.counts))
    assert len(withheld_events(corpus.interactions, 0.0, 2, seed=0)) == 0


def test_neither_statistics_nor_targets_of_training_know_them(corpus: Corpus) -> None:
    counts = withheld_events(corpus.interactions, 1.0, 2, seed=0).counts
    known = train_lengths(corpus.interactions) - counts
    assert corpus.statistics(counts).train_counts.sum() == known.sum()
    np.testing.assert_array_equal(corpus.training_histories(counts).lengths, known)


def test_data_without_an_event_to_withhold_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    rows = [f"{user},{(user + event) % 30},5,{event}" for user in range(30) for event in range(4)]
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]))
    with pytest.raises(UserError, match=r"short has no event that can be withheld.*users with 5 events or more.*--preset sasrec"):
        train_run(str(tmp_path / "short"), replace(preset("tiny"), k_core=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
