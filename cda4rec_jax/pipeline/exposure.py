"""Exposure of each egress level: the history-recovery attack on exactly what the pipeline releases."""

import jax
import numpy as np

from cda4rec_jax.data.profiles import prefix_features
from cda4rec_jax.data.splits import train_histories, train_lengths
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.subtasks import release, released_items
from cda4rec_jax.pipeline.system import SystemConfig
from cda4rec_jax.privacy.attacks.history_recovery import ExposureReport, Release, exposure_by_level

MAX_ATTACKED_USERS = 8000  # seeded sample; enough for a standard error of recall below .005


def measure_exposure(corpus: Corpus, config: SystemConfig, seed: int = 0) -> ExposureReport:
    """Attacks the abstracts of training histories at every level that releases anything."""
    interactions = corpus.interactions
    users = np.random.default_rng(seed).permutation(interactions.num_users)[:MAX_ATTACKED_USERS]
    history = corpus.histories(users, train_lengths(interactions)[users], config.stored_events)
    categories = corpus.categories.multi_hot
    weights = categories / np.maximum(categories.sum(axis=1, keepdims=True), 1.0)
    releases = {}
    for level in (EgressLevel.PROFILE, EgressLevel.RECENT, EgressLevel.FULL):
        features, items = [], []
        for start in range(0, len(users), 512):
            part = jax.tree.map(lambda column, rows=slice(start, start + 512): column[rows], history)
            levels = np.full(len(part.lengths), int(level), np.int32)
            abstract = release(
                part,
                weights,
                levels,
                np.zeros_like(levels),
                max_items=released_items(level, config.history_length),
                history_length=config.history_length,
                profile_events=config.profile_events,
            )
            seen = prefix_features(abstract.category_shares, abstract.length_bucket, abstract.attributes, abstract.level)
            features.append(np.asarray(seen))
            items.append(np.asarray(abstract.items))
        releases[level] = Release(features=np.concatenate(features), items=np.concatenate(items))
    offsets, events = train_histories(interactions)
    lengths = np.diff(offsets)[users]
    own = np.concatenate([events[offsets[user] : offsets[user + 1]] for user in users])
    own_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return exposure_by_level(releases, own_offsets, own, interactions.num_items)
