import numpy as np
import pytest

from cda4rec_jax.data.synthetic import SyntheticConfig, World, synthetic_world
from cda4rec_jax.data.synthetic.catalogue import DEPARTMENTS, START_SECONDS, next_shelf
from cda4rec_jax.errors import UserError

_HOUR = 3600.0


@pytest.fixture(scope="module")
def world() -> World:
    return synthetic_world(SyntheticConfig(num_users=600, num_items=300, seed=3))


def _last_targets(world: World) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data = world.interactions
    return np.arange(data.num_users), np.diff(data.offsets) - 1, data.items[data.offsets[1:] - 1]


def _hits(scores: np.ndarray, targets: np.ndarray, k: int = 10) -> np.ndarray:
    target_scores = np.take_along_axis(scores, targets[:, None].astype(np.int64), axis=1)
    return (scores >= target_scores).sum(axis=1) <= k


def _popularity_scores(world: World) -> np.ndarray:
    data = world.interactions
    _, positions, targets = _last_targets(world)
    counts = np.bincount(data.items, minlength=data.num_items + 1) - np.bincount(targets, minlength=data.num_items + 1)
    scores = np.tile(counts.astype(np.float64), (data.num_users, 1))
    for user, position in enumerate(positions):
        scores[user, data.history(user)[:position]] = -1
    return scores


def test_equal_configs_give_equal_worlds_and_another_seed_another():
    small = SyntheticConfig(num_users=30, num_items=64)
    first, second = synthetic_world(small).interactions, synthetic_world(small).interactions
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != synthetic_world(SyntheticConfig(num_users=30, num_items=64, seed=1)).interactions.fingerprint


def test_nobody_has_an_item_twice_and_nothing_is_seen_before_its_launch(world):
    data = world.interactions
    assert all(len(set(data.history(user).tolist())) == len(data.history(user)) for user in range(data.num_users))
    assert np.all(world.truth.catalogue.launch_seconds[data.items] <= data.timestamps)
    assert np.any(world.truth.catalogue.launch_seconds > START_SECONDS)


def test_retired_items_are_gone_and_the_other_draws_stay():
    stays = synthetic_world(SyntheticConfig(num_users=60, num_items=80))
    churn = synthetic_world(SyntheticConfig(num_users=60, num_items=80, retired=0.5))
    data, catalogue = churn.interactions, churn.truth.catalogue
    assert np.isfinite(catalogue.retire_seconds).sum() == 40 and not np.isfinite(stays.truth.catalogue.retire_seconds).any()
    assert np.all(data.timestamps < catalogue.retire_seconds[data.items])
    assert data.titles == stays.interactions.titles and np.array_equal(data.timestamps, stays.interactions.timestamps)
    assert np.all(catalogue.launch_seconds[np.isfinite(catalogue.retire_seconds)] == 0)
    closed = catalogue.closed_at(data.timestamps[-1:])[0]
    probabilities = churn.truth.next_item_probabilities(np.array([59]), np.diff(data.offsets)[59:] - 1)[0]
    assert closed.any() and not probabilities[closed].any() and probabilities.sum() == pytest.approx(1)


def test_lengths_lie_in_their_bounds(world):
    lengths = np.diff(world.interactions.offsets)
    assert lengths.min() >= 8
    assert lengths.max() <= 100  # a third of the catalogue
    assert 25 < np.median(lengths) < 33


def test_gaps_are_minutes_within_sessions_and_hours_between_them(world):
    data, starts = world.interactions, world.truth.people.starts_session
    first = np.zeros(data.num_interactions, bool)
    first[data.offsets[:-1]] = True
    gaps = np.diff(data.timestamps, prepend=0)
    assert gaps[~starts].min() >= 1
    assert gaps[~starts].max() <= _HOUR / 3
    assert gaps[starts & ~first].min() >= 4 * _HOUR
    np.testing.assert_array_equal(data.timestamps, np.round(data.timestamps))


def test_titles_are_unique_and_categories_are_department_and_shelf(world):
    data = world.interactions
    assert len(set(data.titles)) == data.num_items
    assert all(shelf in DEPARTMENTS[department] for department, shelf in data.categories)


def test_popularity_is_skewed(world):
    counts = np.sort(np.bincount(world.interactions.items, minlength=world.interactions.num_items + 1)[1:])[::-1]
    assert counts[: len(counts) // 5].sum() > 0.35 * counts.sum()


def test_probabilities_are_a_distribution_over_items_that_are_open(world):
    data = world.interactions
    users, positions, targets = _last_targets(world)
    probabilities = world.truth.next_item_probabilities(users, positions)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert not probabilities[:, 0].any()
    assert probabilities[users, targets].min() > 0
    for user in range(20):
        assert not probabilities[user, data.history(user)[:-1]].any()


def test_the_truth_is_calibrated(world):
    users, positions, targets = _last_targets(world)
    probabilities = world.truth.next_item_probabilities(users, positions)
    expected = np.sort(probabilities, axis=1)[:, -10:].sum(axis=1).mean()
    assert _hits(probabilities, targets).mean() == pytest.approx(expected, abs=0.06)


def test_the_oracle_is_far_above_popularity(world):
    users, positions, targets = _last_targets(world)
    oracle = _hits(world.truth.next_item_probabilities(users, positions), targets).mean()
    assert oracle > 0.45
    assert oracle > 4 * _hits(_popularity_scores(world), targets).mean()


def test_complements_are_directed(world):
    data, starts = world.interactions, world.truth.people.starts_session
    shelves = world.truth.catalogue.shelves[data.items]
    within = np.flatnonzero(~starts[1:])
    forward = (shelves[within + 1] == next_shelf(shelves[within])).mean()
    backward = (next_shelf(shelves[within + 1]) == shelves[within]).mean()
    assert forward > 2 * backward


def test_a_session_is_about_its_intent(world):
    people = world.truth.people
    shelves = world.truth.catalogue.shelves[world.interactions.items]
    rng = np.random.default_rng(0)
    assert (shelves == people.intents[people.event_sessions]).mean() > 0.3
    assert (shelves == rng.permutation(people.intents)[people.event_sessions]).mean() < 0.1


def test_interests_drift_but_stay_the_users_own(world):
    people = world.truth.people
    first = people.session_offsets[:-1]
    long = np.diff(people.session_offsets) > 10

    def distance(a, b):
        return np.abs(people.interests[a] - people.interests[b]).sum(axis=1).mean()

    later = distance(first[long], first[long] + 10)
    assert 0 < distance(first[long], first[long] + 1) < later < distance(first[long], np.roll(first[long], 1))


def test_attributes_tell_interests(world):
    people = world.truth.people
    half = len(people.mean_interests) // 2
    weights = np.linalg.lstsq(people.attribute_vectors[:half], people.mean_interests[:half], rcond=None)[0]
    error = np.square(people.attribute_vectors[half:] @ weights - people.mean_interests[half:]).mean()
    assert error < 0.7 * people.mean_interests[half:].var(axis=0).mean()


def test_some_attribute_values_are_unknown_and_the_others_are_true(world):
    people = world.truth.people
    for name, values in world.interactions.user_attributes.items():
        assert 0 < values.count("") < 0.15 * len(values)
        for user, value in enumerate(values):
            assert value == "" or people.attribute_vectors[user, people.attribute_names.index(f"{name}={value}")] == 1


def test_the_first_event_of_a_session_does_not_know_its_intent():
    truth = synthetic_world(SyntheticConfig(num_users=40, num_items=64)).truth
    users, positions = np.arange(40), np.zeros(40, np.int64)
    before = truth.next_item_probabilities(users, positions)
    truth.people.intents[:] = (truth.people.intents + 7) % 32
    np.testing.assert_array_equal(truth.next_item_probabilities(users, positions), before)


def test_a_position_that_is_no_event_is_refused(world):
    with pytest.raises(IndexError, match="positions"):
        world.truth.next_item_probabilities(np.array([0]), np.array([1000]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_users": 1}, "1 users: expected at least 2"),
        ({"num_items": 10}, "10 items: expected at least 64"),
        ({"min_events": 20, "max_events": 10}, "expected a range"),
        ({"follow_share": 0.9}, "must not exceed 1"),
        ({"popular_share": 0.0}, "must be positive"),
        ({"seed": -1}, "seed must not be negative"),
        ({"session_events": 0.5}, "at least 1"),
    ],
)
def test_worlds_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SyntheticConfig(**changes)
