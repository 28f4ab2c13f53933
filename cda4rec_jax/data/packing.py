"""Packing of training histories into rows in which every token is real.

A segment is a stretch ``[start, stop)`` of one user's training events that are predicted: a prefix token predicts the first, each item
token the next. Segments of one row do not see each other. An epoch holds every user's whole training history once at level FULL, and,
for the cloud agent, a share of users again at RECENT and single targets at PROFILE, so that each egress level is trained exactly as a
request will use it.
"""

from dataclasses import dataclass

import numpy as np

from cda4rec_jax.data.profiles import length_bucket, prefix_features, prefix_size, quantise_shares
from cda4rec_jax.messages import EgressLevel, SequenceBatch


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How histories become rows."""

    history_length: int  # item tokens that an agent reads at FULL
    row_tokens: int  # at least history_length + 1
    recent_length: int = 10  # item tokens at RECENT
    recent_share: float = 0.3  # share of users packed again at RECENT in each epoch; 0 trains FULL only
    profile_targets: float = 1.0  # targets per user and epoch at PROFILE
    profile_events: int = 100  # newest events that a profile summarises
    padded: bool = False  # one segment in each row, the rest of it padding, as most implementations have it: an ablation

    def __post_init__(self):
        if self.row_tokens < self.history_length + 1:
            raise ValueError(f"row_tokens {self.row_tokens} must be at least history_length + 1 = {self.history_length + 1}")

    @property
    def segments_per_row(self) -> int:
        return 1 if self.padded else max(4, self.row_tokens // 4)


@dataclass(frozen=True, kw_only=True)
class Histories:
    """Training events of all users, and what prefixes are made of."""

    offsets: np.ndarray  # int64 [u + 1]
    items: np.ndarray  # int32 [N]
    lengths: np.ndarray  # int64 [u]: events of each user that may be targets; the rest is held out
    item_categories: np.ndarray  # float32 [i, g], multi-hot
    attributes: np.ndarray  # float32 [u, a]

    def category_counts(self) -> np.ndarray:
        """Running sum over all events, float64 [N + 1, g]; differences of it are the counts of any stretch.

        In float32 the thirds and sixths of items with several categories would be lost behind a few hundred thousand events.
        """
        weights = self.item_categories / np.maximum(self.item_categories.sum(axis=1, keepdims=True), 1.0)
        counts = np.zeros((len(self.items) + 1, weights.shape[1]))
        np.cumsum(weights[self.items], axis=0, dtype=np.float64, out=counts[1:])
        return counts


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Stretches of targets, one entry each."""

    users: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    levels: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return self.stops - self.starts


def draw_segments(histories: Histories, config: PackingConfig, rng: np.random.Generator, *, all_levels: bool) -> Segments:
    """The segments of one epoch; window borders are drawn anew, so that no event always lacks its context."""
    users = np.flatnonzero(histories.lengths > 0)
    parts = [_windows(users, histories.lengths[users], config.history_length + 1, EgressLevel.FULL, rng)]
    if all_levels and config.recent_share > 0:
        chosen = users[rng.random(len(users)) < config.recent_share]
        parts.append(_windows(chosen, histories.lengths[chosen], config.recent_length + 1, EgressLevel.RECENT, rng))
        count = round(config.profile_targets * len(users))
        chosen = rng.choice(users, count)
        starts = (rng.random(count) * histories.lengths[chosen]).astype(np.int64)
        parts.append((chosen, starts, starts + 1, np.full(count, EgressLevel.PROFILE)))
    merged = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Segments(users=merged[0], starts=merged[1], stops=merged[2], levels=merged[3])


def _windows(users: np.ndarray, lengths: np.ndarray, size: int, level: EgressLevel, rng: np.random.Generator) -> tuple:
    """Stretches of at most ``size`` that tile each user's events; a user that fits into one window stays whole."""
    first = np.where(lengths <= size, size, rng.integers(1, size + 1, len(users)))
    counts = 1 + np.maximum(0, -(-(lengths - first) // size))
    owner = np.repeat(np.arange(len(users)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.where(number == 0, 0, first[owner] + (number - 1) * size)
    stops = np.minimum(first[owner] + number * size, lengths[owner])
    return users[owner], starts, stops, np.full(len(owner), int(level))


def pack(sizes: np.ndarray, row_tokens: int, segments_per_row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best-fit packing in the given order.

    Returns:
        For each segment: its row, its first token in that row, its number in that row (0, 1, ...).
    """
    by_space: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    used: list[int] = []
    held: list[int] = []
    rows = np.empty(len(sizes), np.int64)
    firsts = np.empty(len(sizes), np.int64)
    numbers = np.empty(len(sizes), np.int64)
    for j, size in enumerate(sizes.tolist()):
        for space in range(size, row_tokens + 1):
            if by_space[space]:
                row = by_space[space].pop()
                break
        else:
            row = len(used)
            used.append(0)
            held.append(0)
        rows[j], firsts[j], numbers[j] = row, used[row], held[row]
        used[row] += size
        held[row] += 1
        if used[row] < row_tokens and held[row] < segments_per_row:
            by_space[row_tokens - used[row]].append(row)
    return rows, firsts, numbers


class PackedEpoch:
    """All rows of one epoch, shuffled; ``batch`` cuts them into ``SequenceBatch`` of equal shape."""

    def __init__(
        self,
        histories: Histories,
        category_counts: np.ndarray,
        config: PackingConfig,
        rng: np.random.Generator,
        *,
        all_levels: bool,
    ):
        drawn = draw_segments(histories, config, rng, all_levels=all_levels)
        order = rng.permutation(len(drawn.users))
        segments = Segments(
            users=drawn.users[order], starts=drawn.starts[order], stops=drawn.stops[order], levels=drawn.levels[order]
        )
        rows, firsts, numbers = pack(segments.sizes, config.row_tokens, config.segments_per_row)
        self.num_rows = int(rows.max()) + 1
        rows = rng.permutation(self.num_rows)[rows]
        by_row = np.lexsort((numbers, rows))
        self._config, self._histories, self._category_counts = config, histories, category_counts
        self._segments = Segments(
            users=segments.users[by_row],
            starts=segments.starts[by_row],
            stops=segments.stops[by_row],
            levels=segments.levels[by_row],
        )
        self._rows, self._firsts, self._numbers = rows[by_row], firsts[by_row], numbers[by_row]
        self._row_starts = np.searchsorted(self._rows, np.arange(self.num_rows + 1))
        self.num_targets = int(segments.sizes.sum())

    def batch(self, first_row: int, num_rows: int) -> SequenceBatch:
        """Rows ``[first_row, first_row + num_rows)`` as NumPy arrays; rows past the last are padding."""
        low, high = (int(self._row_starts[min(row, self.num_rows)]) for row in (first_row, first_row + num_rows))
        users, starts = self._segments.users[low:high], self._segments.starts[low:high]
        sizes = self._segments.sizes[low:high]
        rows, firsts, numbers = self._rows[low:high] - first_row, self._firsts[low:high], self._numbers[low:high]
        shape = (num_rows, self._config.row_tokens)
        segment = np.repeat(np.arange(high - low), sizes)
        position = np.arange(len(segment)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        cell = (rows[segment], firsts[segment] + position)
        event = self._histories.offsets[users][segment] + starts[segment] + position
        prefix_rows = rows * self._config.segments_per_row + numbers + 1
        values = {
            "item_indices": np.where(position == 0, 0, self._histories.items[np.maximum(event - 1, 0)]),
            "segment_ids": numbers[segment] + 1,
            "positions": position,
            "targets": self._histories.items[event],
            "prefix_rows": np.where(position == 0, prefix_rows[segment], 0),
        }
        packed = {name: np.zeros(shape, np.int32) for name in values}
        for name, value in values.items():
            packed[name][cell] = value
        return SequenceBatch(prefixes=self._prefixes(low, high, prefix_rows, num_rows), **packed)  # pyright: ignore[reportArgumentType]

    def _prefixes(self, low: int, high: int, prefix_rows: np.ndarray, num_rows: int) -> np.ndarray:
        users, starts = self._segments.users[low:high], self._segments.starts[low:high]
        levels = self._segments.levels[low:high]
        begin = self._histories.offsets[users]
        events = np.minimum(starts, self._config.profile_events)
        counts = self._category_counts[begin + starts] - self._category_counts[begin + starts - events]
        attributes = self._histories.attributes[users] * (levels == EgressLevel.FULL)[:, None]
        features = prefix_features(quantise_shares(counts), length_bucket(events), attributes, levels)
        num_features = prefix_size(counts.shape[1], attributes.shape[1])
        prefixes = np.zeros((num_rows * self._config.segments_per_row + 1, num_features), np.float32)
        prefixes[prefix_rows] = features
        return prefixes
