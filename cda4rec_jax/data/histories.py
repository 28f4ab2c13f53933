"""Private histories before one event of each user, as rectangles of NumPy arrays."""

import numpy as np
from jaxtyping import Float, Int

from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.messages import HistoryBatch

SESSION_GAP_HOURS = 1.0  # a longer pause starts a new session


def history_batch(
    interactions: Interactions,
    attributes: Float[np.ndarray, "users a"],
    users: Int[np.ndarray, "b"],
    positions: Int[np.ndarray, "b"],
    *,
    stored_events: int,
    seen_width: int | None = None,
) -> HistoryBatch:
    """Each user's past before the event at ``positions`` (0 is the user's first event), which is the target.

    Args:
        attributes: one row per user of the dataset.
        positions: the user's number of events where the next event is not known; its target is then 0.
        stored_events: ``l``, newest events that the device keeps at hand.
        seen_width: columns of ``seen``; None takes the longest past of the batch.

    Raises:
        ValueError: a position lies outside its user's events, or ``seen_width`` is too small.
    """
    lengths = np.diff(interactions.offsets)[users]
    if np.any((positions < 0) | (positions > lengths)):
        raise ValueError("a position lies outside its user's events")
    longest = int(positions.max(initial=0))
    seen_width = max(longest, 1) if seen_width is None else seen_width
    if longest > seen_width:
        raise ValueError(f"seen_width is {seen_width}, and a user has {longest} past events")
    begins = interactions.offsets[users]
    padded = np.concatenate([interactions.items, np.zeros(1, np.int32)])
    known = np.minimum(positions, stored_events)

    def stretch(starts: np.ndarray, sizes: np.ndarray, width: int) -> np.ndarray:
        place = np.arange(width)[None, :]
        real = place < sizes[:, None]
        index = np.where(real, (begins + starts)[:, None] + place, len(interactions.items))
        return padded[index]

    known_target = positions < lengths
    target_index = np.where(known_target, begins + positions, len(interactions.items))
    sessions, hours = _session_facts(interactions, begins, positions, known_target)
    return HistoryBatch(
        user_indices=users.astype(np.int32),
        event_ids=(begins + positions).astype(np.int32),
        items=stretch(positions - known, known, stored_events),
        lengths=known.astype(np.int32),
        total_lengths=positions.astype(np.int32),
        seen=stretch(np.zeros_like(positions), positions, seen_width),
        session_counts=sessions,
        hours_since_last=hours,
        has_timestamps=np.full(len(users), float(interactions.has_timestamps), np.float32),
        attributes=attributes[users],
        targets=padded[target_index],
    )


def _session_facts(
    interactions: Interactions, begins: np.ndarray, positions: np.ndarray, known_target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sessions of each past, and hours from its last event to the request (the time of the target; 0 where there is none)."""
    if not interactions.has_timestamps:
        return np.zeros(len(begins), np.float32), np.zeros(len(begins), np.float32)
    gaps = np.diff(interactions.timestamps, prepend=interactions.timestamps[:1])
    opened = np.concatenate([[0], np.cumsum(gaps > SESSION_GAP_HOURS * 3600)])
    past = positions > 0
    last = begins + np.maximum(positions, 1) - 1
    sessions = np.where(past, 1 + opened[last + 1] - opened[begins + 1], 0)
    request = np.where(known_target, begins + positions, last)
    hours = np.where(past, (interactions.timestamps[request] - interactions.timestamps[last]) / 3600, 0)
    return sessions.astype(np.float32), hours.astype(np.float32)


def attribute_columns(
    user_attributes: dict[str, tuple[str, ...]], num_users: int, *, max_values: int = 24
) -> tuple[Float[np.ndarray, "users a"], tuple[str, ...]]:
    """One column per (attribute, value), 1 where a user has it; and their names ``attribute=value``.

    Numbers with many values (an age in years) are cut into deciles first. An attribute that still has more than ``max_values`` values
    (a zip code) says more about who somebody is than about what they like, and is left out.
    """
    columns, names = [], []
    for attribute, values in sorted(user_attributes.items()):
        values = _deciles(values) if len(set(values)) > max_values else values
        found = sorted(set(values) - {""})
        if len(found) > max_values:
            continue
        for value in found:
            columns.append(np.array([own == value for own in values], np.float32))
            names.append(f"{attribute}={value}")
    matrix = np.stack(columns, axis=1) if columns else np.zeros((num_users, 0), np.float32)
    return matrix, tuple(names)


def _deciles(values: tuple[str, ...]) -> tuple[str, ...]:
    """Values as deciles where all of them are numbers of at most 3 digits; otherwise unchanged."""
    known = [value for value in values if value]
    if not all(value.replace(".", "", 1).isdigit() and float(value) < 1000 for value in known):
        return values
    edges = np.quantile(np.array(known, float), np.linspace(0, 1, 11)[1:-1])
    return tuple(f"decile {np.searchsorted(edges, float(value)) + 1}" if value else "" for value in values)
