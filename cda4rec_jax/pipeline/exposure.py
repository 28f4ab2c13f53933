"""Exposure of each egress level: attacks on exactly what the pipeline releases."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from cda4rec_jax.data.profiles import prefix_features
from cda4rec_jax.data.splits import train_histories, train_lengths
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.request import compiled_release
from cda4rec_jax.pipeline.subtasks import released_items
from cda4rec_jax.pipeline.system import SystemConfig
from cda4rec_jax.planner.plan_space import RELEASING_LEVELS
from cda4rec_jax.privacy.attacks.attribute_inference import UNKNOWN, AttributeInference, Inference, InferenceConfig
from cda4rec_jax.privacy.attacks.history_recovery import ExposureReport, exposure_by_level
from cda4rec_jax.privacy.attacks.ridge import Release, whole

MAX_ATTACKED_USERS = 8000  # seeded sample; enough for a standard error of recall below .005


@dataclass(frozen=True, kw_only=True)
class AttackedUsers:
    """The users that are attacked: what they release at every level, and what they keep for themselves.

    Attributes:
        users: [u] their rows in the data.
        releases: by level, of their training histories.
        offsets, items: the whole training histories, user j's being ``items[offsets[j]:offsets[j+1]]``.
    """

    users: Int[np.ndarray, "u"]
    releases: Mapping[EgressLevel, Release]
    offsets: np.ndarray
    items: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AttributeExposure:
    """What becomes known of one attribute.

    Attributes:
        name: of the attribute.
        num_values: values that it has in the data.
        majority_accuracy: accuracy of guessing the most common value.
        told: for each level, whether a release of that level simply says it, where the user has disclosed it.
        inferred: for each level, from all else that it releases (at FULL also the other attributes).
        null: the same with releases shuffled among users; should gain nothing.
        raw: from the whole history, the positive control.
    """

    name: str
    num_values: int
    majority_accuracy: float
    told: dict[EgressLevel, bool]
    inferred: dict[EgressLevel, Inference]
    null: dict[EgressLevel, Inference]
    raw: Inference


def measure_exposure(corpus: Corpus, config: SystemConfig, seed: int = 0) -> ExposureReport:
    """Recovery of training histories from the abstracts of every level that releases anything: what planners weigh.

    What can be inferred of attributes (``measure_attributes``) is reported and not weighed: it has no common scale with histories.
    """
    attacked = attacked_users(corpus, config, seed)
    return exposure_by_level(attacked.releases, attacked.offsets, attacked.items, corpus.interactions.num_items)


def measure_attributes(corpus: Corpus, attacked: AttackedUsers, seed: int = 0) -> list[AttributeExposure]:
    """Inference of every attribute that models read, in the form in which they read it, from every level.

    Raises:
        UserError: too few users have disclosed an attribute.
    """
    config = InferenceConfig(seed=seed)
    matrix, columns = corpus.attributes
    owners = np.asarray([column.partition("=")[0] for column in columns])
    first = corpus.prefix_size - EgressLevel.FULL - len(columns)  # prefix_features ends with attributes, then the level
    found = []
    for name in dict.fromkeys(owners.tolist()):
        own = np.flatnonzero(owners == name)
        shown = matrix[attacked.users][:, own]
        values = np.where(shown.any(axis=1), shown.argmax(axis=1), UNKNOWN)
        attack = AttributeInference(values, attacked.offsets, attacked.items, corpus.interactions.num_items, config)
        hidden = {level: _without(one, first + own) for level, one in attacked.releases.items()}
        found.append(
            AttributeExposure(
                name=name,
                num_values=len(own),
                majority_accuracy=attack.majority_accuracy,
                told={level: level is EgressLevel.FULL for level in hidden},
                inferred={level: attack.attack(one) for level, one in hidden.items()},
                null={level: attack.attack(one.shuffled(seed)) for level, one in hidden.items()},
                raw=attack.attack(whole(attacked.offsets, attacked.items)),
            )
        )
    return found


def attacked_users(corpus: Corpus, config: SystemConfig, seed: int = 0) -> AttackedUsers:
    """A seeded sample of users, and the abstracts of their training histories at every level that releases anything."""
    interactions = corpus.interactions
    users = np.random.default_rng(seed).permutation(interactions.num_users)[:MAX_ATTACKED_USERS]
    history = corpus.histories(users, train_lengths(interactions)[users], config.stored_events)
    categories = corpus.categories.multi_hot
    weights = categories / np.maximum(categories.sum(axis=1, keepdims=True), 1.0)
    releases = {}
    for level in RELEASING_LEVELS:
        features, items = [], []
        for start in range(0, len(users), 512):
            part = jax.tree.map(lambda column, rows=slice(start, start + 512): column[rows], history)
            levels = np.full(len(part.lengths), int(level), np.int32)
            abstract = compiled_release(
                part,
                weights,
                levels,
                np.zeros_like(levels),
                max_items=released_items(level, config.history_length),
                history_length=config.history_length,
                profile_events=config.profile_events,
            )
            told = (abstract.category_shares, abstract.length_bucket, abstract.attributes, abstract.level)
            features.append(prefix_features(*map(np.asarray, told)))
            items.append(np.asarray(abstract.items))
        releases[level] = Release(features=np.concatenate(features), items=np.concatenate(items))
    offsets, events = train_histories(interactions)
    lengths = np.diff(offsets)[users]
    return AttackedUsers(
        users=users,
        releases=releases,
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        items=np.concatenate([events[offsets[user] : offsets[user + 1]] for user in users]),
    )


def _without(released: Release, columns: Int[np.ndarray, "n"]) -> Release:
    """The release with nothing said in some columns of its features."""
    features = released.features.copy()
    features[:, columns] = 0.0
    return Release(features=features, items=released.items)
