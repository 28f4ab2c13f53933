"""The attack finds a planted attribute, and finds nothing where there is nothing."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cda4rec_jax.errors import UserError
from cda4rec_jax.privacy.attacks.attribute_inference import UNKNOWN, AttributeInference, InferenceConfig, roc_area
from cda4rec_jax.privacy.attacks.ridge import Release, whole

NUM_USERS, NUM_ITEMS, VALUES = 400, 90, 3
QUICK = InferenceConfig(rank=32, resamples=60)


@pytest.fixture(scope="module")
def world():
    """Users who have one value of three, and take two thirds of their items from the third of the catalogue that goes with it."""
    rng = np.random.default_rng(0)
    values = rng.choice(VALUES, NUM_USERS, p=[0.5, 0.3, 0.2])
    histories = []
    for value in values:
        own = np.arange(NUM_ITEMS) % VALUES == value
        weights = np.where(own, 4.0, 1.0)
        histories.append(1 + rng.choice(NUM_ITEMS, 12, replace=False, p=weights / weights.sum()))
    return values, np.arange(0, 12 * NUM_USERS + 1, 12), np.concatenate(histories).astype(np.int32)


@pytest.fixture(scope="module")
def attack(world):
    return AttributeInference(*world, num_items=NUM_ITEMS, config=QUICK)


@pytest.fixture(scope="module")
def raw(world):
    return whole(*world[1:])


def test_raw_histories_betray_the_planted_attribute(attack, raw):
    found = attack.attack(raw)
    assert attack.majority_accuracy == pytest.approx(0.5, abs=0.06)
    assert found.accuracy == pytest.approx(attack.majority_accuracy + found.gain.mean)
    assert found.gain.low > 0.15 and found.auc.low > 0.8
    assert found.gain.low <= found.gain.mean <= found.gain.high and found.num_victims == NUM_USERS


def test_shuffled_releases_tell_nothing(attack, raw):
    found = attack.attack(raw.shuffled(0))
    assert found.gain.low <= 0.0 <= found.gain.high + 0.02
    assert found.auc.mean == pytest.approx(0.5, abs=0.06)


def test_silence_is_guessed_by_the_majority(attack):
    nothing = Release(features=np.zeros((NUM_USERS, 0), np.float32), items=np.zeros((NUM_USERS, 0), np.int32))
    found = attack.attack(nothing)
    assert found.accuracy == attack.majority_accuracy
    assert (found.gain.mean, found.gain.low, found.gain.high, found.auc.mean) == (0.0, 0.0, 0.0, 0.5)


def test_more_released_ids_betray_more(attack, raw):
    few = Release(features=raw.features, items=raw.items[:, :2])
    assert 0.5 < attack.attack(few).auc.mean < attack.attack(raw).auc.mean


def test_a_feature_that_is_the_attribute_gives_it_away(attack, world):
    values = world[0]
    told = Release(features=np.eye(VALUES, dtype=np.float32)[values], items=np.zeros((NUM_USERS, 0), np.int32))
    assert attack.attack(told).accuracy == 1.0


def test_users_who_have_not_disclosed_it_take_no_part(world, raw):
    values, offsets, items = world
    some = np.where(np.arange(NUM_USERS) % 4 == 0, UNKNOWN, values)
    found = AttributeInference(some, offsets, items, NUM_ITEMS, QUICK).attack(raw)
    assert found.num_victims == NUM_USERS * 3 // 4


def test_the_area_is_that_of_scikit_learn_and_half_for_ties():
    rng = np.random.default_rng(1)
    truth = np.eye(3)[rng.integers(0, 3, 80)]
    scores = rng.normal(size=(80, 3)).round(1) + truth
    assert roc_area(scores, truth) == pytest.approx(roc_auc_score(truth, scores, average="weighted"))
    assert roc_area(np.ones((80, 3)), truth) == pytest.approx(0.5)
    assert roc_area(scores, np.eye(3)[np.zeros(80, int)]) == 0.5


def test_too_few_users_or_values_are_the_users_to_mend(world):
    values, offsets, items = world
    with pytest.raises(UserError, match="1 known values"):
        AttributeInference(np.zeros(NUM_USERS, int), offsets, items, NUM_ITEMS)
    with pytest.raises(UserError, match="10 users"):
        AttributeInference(np.where(np.arange(NUM_USERS) < 10, values, UNKNOWN), offsets, items, NUM_ITEMS)
