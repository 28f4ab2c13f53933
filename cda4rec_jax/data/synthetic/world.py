"""Users, their sessions and their events: the synthetic world."""

from dataclasses import dataclass

import numpy as np

from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.data.synthetic.catalogue import (
    DAY_SECONDS,
    NUM_SHELVES,
    NUM_STYLES,
    SHELVES_PER_DEPARTMENT,
    START_SECONDS,
    YEAR_DAYS,
    Catalogue,
    make_catalogue,
)
from cda4rec_jax.data.synthetic.config import SyntheticConfig
from cda4rec_jax.data.synthetic.truth import People, Truth, event_shares, event_weights, personal_attraction

ATTRIBUTES: dict[str, dict[str, float]] = {  # attribute -> value -> share of users
    "gender": {"female": 0.49, "male": 0.46, "other": 0.05},
    "age_band": {"18-24": 0.18, "25-34": 0.27, "35-49": 0.28, "50-64": 0.17, "65+": 0.1},
    "region": {"north": 0.3, "south": 0.25, "east": 0.25, "west": 0.2},
}
_CHUNK_ENTRIES = 1 << 18  # users x items that are stepped together: their weights stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class World:
    """Interactions as any data source gives them, and the truth behind them (same user and item indices)."""

    interactions: Interactions
    truth: Truth


def synthetic_world(config: SyntheticConfig) -> World:
    """Simulates the world of a config; equal configs give equal worlds.

    Users have private attributes that shift their interests in the 32 shelves and their style. Around that mean the interests
    drift from session to session; every session has an intent, one shelf. Each event follows up on the last item (a directed
    complement), or comes from the intent's shelf, from the long-term interests, or from what is popular: ``Truth`` has the
    formula. Nobody has an item twice, and nothing is seen before its launch or once it has retired. Gaps are log-normal: minutes
    within a session (at most 20), days between sessions (at least 4 hours), shorter for users with more events. An item that was
    launched late may have no events at all.
    """
    children = np.random.SeedSequence(config.seed).spawn(5)
    catalogue_rng, people_rng, time_rng, event_rng, retirement_rng = (np.random.default_rng(child) for child in children)
    catalogue = make_catalogue(config, catalogue_rng, retirement_rng)
    offsets, starts_session = _lengths_and_sessions(config, time_rng)
    timestamps = _timestamps(offsets, starts_session, time_rng)
    people, attributes = _people(config, offsets, starts_session, people_rng)
    items = _simulate(config, catalogue, people, offsets, timestamps, event_rng)
    user_width, item_width = len(str(config.num_users)), len(str(config.num_items))
    interactions = Interactions(
        name="synthetic",
        user_ids=tuple(f"user-{index:0{user_width}}" for index in range(1, config.num_users + 1)),
        item_ids=tuple(f"item-{index:0{item_width}}" for index in range(1, config.num_items + 1)),
        offsets=offsets,
        items=items,
        timestamps=timestamps,
        has_timestamps=True,
        titles=catalogue.titles,
        categories=catalogue.categories,
        user_attributes=attributes,
    )
    truth = Truth(
        config=config, catalogue=catalogue, people=people, offsets=offsets, items=interactions.items, timestamps=timestamps
    )
    return World(interactions=interactions, truth=truth)


def _lengths_and_sessions(config: SyntheticConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.round(config.median_events * np.exp(config.sigma_events * rng.normal(size=config.num_users)))
    lengths = np.clip(lengths, config.min_events, min(config.max_events, config.num_items // 3)).astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    starts_session = rng.random(offsets[-1]) < 1 / config.session_events
    starts_session[offsets[:-1]] = True
    return offsets, starts_session


def _timestamps(offsets: np.ndarray, starts_session: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unix seconds, whole and strictly rising within a user. Users join during the first 70% of the year."""
    lengths = np.diff(offsets)
    activity = np.repeat((lengths / np.median(lengths)) ** 0.5, lengths)
    days = 4.0 / activity * np.exp(0.9 * rng.normal(size=len(starts_session)))
    minutes = 3.0 * np.exp(0.8 * rng.normal(size=len(starts_session)))
    gaps = np.where(starts_session, np.maximum(days * DAY_SECONDS, 4 * 3600), np.clip(minutes * 60, 1, 20 * 60))
    gaps[offsets[:-1]] = DAY_SECONDS * rng.uniform(0, 0.7 * YEAR_DAYS, size=len(lengths))
    elapsed = np.cumsum(np.ceil(gaps))
    before = np.concatenate([np.zeros(1), elapsed[offsets[1:-1] - 1]])
    return START_SECONDS + elapsed - np.repeat(before, lengths)


def _people(
    config: SyntheticConfig, offsets: np.ndarray, starts_session: np.ndarray, rng: np.random.Generator
) -> tuple[People, dict[str, tuple[str, ...]]]:
    """Users and their sessions, and the attributes as the data shows them."""
    columns, shown = [], {}
    for name, shares in ATTRIBUTES.items():
        values = rng.choice(len(shares), size=config.num_users, p=list(shares.values()))
        hidden = rng.random(config.num_users) < config.undisclosed
        columns.append(np.eye(len(shares))[values])
        shown[name] = tuple("" if hide else list(shares)[value] for value, hide in zip(values, hidden, strict=True))
    vectors = np.concatenate(columns, axis=1)
    effects = config.attribute_strength * _interests(vectors.shape[1], rng)
    means = vectors @ effects + config.personal_strength * _interests(config.num_users, rng)
    style_effects = rng.normal(size=(vectors.shape[1], NUM_STYLES))
    styles = 0.5 * (vectors @ style_effects + rng.normal(size=(config.num_users, NUM_STYLES)))
    sessions = np.cumsum(starts_session) - 1
    session_offsets = np.concatenate([np.zeros(1, np.int64), sessions[offsets[1:] - 1] + 1])
    logits = np.repeat(means, np.diff(session_offsets), axis=0) + config.personal_strength * _drift(config, session_offsets, rng)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    people = People(
        attribute_names=tuple(f"{name}={value}" for name, shares in ATTRIBUTES.items() for value in shares),
        attribute_vectors=vectors,
        mean_interests=means,
        styles=styles,
        session_offsets=session_offsets,
        interests=probabilities,
        intents=_draw(probabilities, rng.random(len(probabilities))),
        event_sessions=sessions,
        starts_session=starts_session,
    )
    return people, shown


def _interests(num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Unit-variance logits of the shelves; half of the variance is common to a department."""
    broad = rng.normal(size=(num_rows, NUM_SHELVES // SHELVES_PER_DEPARTMENT)).repeat(SHELVES_PER_DEPARTMENT, axis=1)
    return (broad + rng.normal(size=(num_rows, NUM_SHELVES))) / np.sqrt(2)


def _drift(config: SyntheticConfig, session_offsets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Deviation of every session's interests from the user's mean: a stationary random walk of unit variance."""
    noise = _interests(int(session_offsets[-1]), rng)
    kept = 1 - config.drift
    deviations = noise.copy()
    sessions = np.diff(session_offsets)
    for number in range(1, sessions.max()):
        rows = session_offsets[:-1][sessions > number] + number
        deviations[rows] = kept * deviations[rows - 1] + np.sqrt(1 - kept**2) * noise[rows]
    return deviations


def _simulate(
    config: SyntheticConfig,
    catalogue: Catalogue,
    people: People,
    offsets: np.ndarray,
    timestamps: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Item of every event. Users are independent, so many are stepped together."""
    items = np.zeros(len(timestamps), np.int32)
    uniforms = rng.random(len(timestamps))
    lengths = np.diff(offsets)
    step = max(1, _CHUNK_ENTRIES // (config.num_items + 1))
    # Users of similar length share a chunk, so that few rows idle at its end.
    by_length = np.argsort(lengths, kind="stable")
    for chunk in np.split(by_length, np.arange(step, config.num_users, step)):
        attraction = personal_attraction(config, catalogue, people.styles[chunk])
        seen = np.zeros(attraction.shape, bool)
        for position in range(lengths[chunk].max()):
            rows = np.flatnonzero(lengths[chunk] > position)
            events = offsets[chunk[rows]] + position
            last_items = items[events - 1] if position else np.zeros(len(rows), np.int32)
            closed = seen[rows] | catalogue.closed_at(timestamps[events])
            follow, shelf_shares = event_shares(config, people, events, last_items > 0, intent_known=True)
            weights = event_weights(config, catalogue, attraction[rows], closed, last_items, follow, shelf_shares)
            items[events] = _draw(weights, uniforms[events])
            seen[rows, items[events]] = True
    return items


def _draw(weights: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """One column per row, with probability proportional to its weight; never a column of weight 0."""
    cumulative = weights.cumsum(axis=1)
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(axis=1)
