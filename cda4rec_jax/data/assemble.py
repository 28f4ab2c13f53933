"""From raw events and texts, in whatever order a file has them, to ``Interactions``."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Int64

from cda4rec_jax.data.interactions import MIN_EVENTS, Finding, Interactions
from cda4rec_jax.errors import UserError

MOST_SECONDS = 1e11  # in the year 5138: larger timestamps count smaller units
UNITS = (("milliseconds", 1e3), ("microseconds", 1e6), ("nanoseconds", 1e9))


@dataclass(frozen=True, kw_only=True)
class ItemText:
    """What is known about an item besides who took it."""

    title: str = ""
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class RawEvents:
    """Events in file order; users and items are codes into their lists of ids."""

    user_ids: list[str]
    item_ids: list[str]
    users: Int64[np.ndarray, "events"]
    items: Int64[np.ndarray, "events"]
    timestamps: Float64[np.ndarray, "events"]


@dataclass(frozen=True, kw_only=True)
class RawTexts:
    """Texts and attributes by external id, for any users and items, and what was odd about them."""

    items: dict[str, ItemText] = field(default_factory=dict)
    attribute_names: tuple[str, ...] = ()
    users: dict[str, tuple[str, ...]] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sizes of a dataset."""

    users: int
    items: int
    interactions: int

    def line(self) -> str:
        """The three counts as text."""
        return f"{self.users:,} users, {self.items:,} items, {self.interactions:,} interactions"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Interactions as read, how much there was in the source, and what was dropped or odd."""

    interactions: Interactions
    found: Counts
    findings: tuple[Finding, ...]


def counts(interactions: Interactions) -> Counts:
    """Sizes of interactions."""
    return Counts(users=interactions.num_users, items=interactions.num_items, interactions=interactions.num_interactions)


def item_order_key(item_id: str) -> bytes:
    """Sort key of items: a hash, because ids of real files often follow first appearance or popularity."""
    return hashlib.blake2b(item_id.encode(), digest_size=16).digest()


def assemble(name: str, events: RawEvents, texts: RawTexts) -> Reading:
    """Sorts, indexes and joins. Events are sorted by timestamp within a user; events of equal time keep the order of the file.

    Timestamps in milliseconds or smaller units become seconds. Users with fewer than 3 events are dropped, then items without events.
    Users are ordered by id, items by a hash of their id.

    Raises:
        UserError: if there is no event, only one user, or no two users with at least 3 events.
    """
    events_per_user = np.bincount(events.users, minlength=len(events.user_ids))
    _check_size(name, events_per_user)
    keep_user = events_per_user >= MIN_EVENTS
    kept = keep_user[events.users]
    kept_items = np.bincount(events.items[kept], minlength=len(events.item_ids)) > 0
    users = sorted(np.flatnonzero(keep_user).tolist(), key=lambda code: events.user_ids[code])
    items = sorted(np.flatnonzero(kept_items).tolist(), key=lambda code: item_order_key(events.item_ids[code]))
    user_index = np.zeros(len(events.user_ids), np.int64)
    user_index[users] = np.arange(len(users))
    item_index = np.zeros(len(events.item_ids), np.int32)
    item_index[items] = np.arange(1, len(items) + 1, dtype=np.int32)
    order = np.lexsort((events.timestamps[kept], user_index[events.users[kept]]))  # stable: ties keep the order of the file
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(events_per_user[users], dtype=np.int64)])
    seconds, converted = _in_seconds(events.timestamps)
    timestamps = seconds[kept][order]
    position = np.arange(len(timestamps), dtype=np.float64) - np.repeat(offsets[:-1], np.diff(offsets))
    user_ids = tuple(events.user_ids[code] for code in users)
    item_ids = tuple(events.item_ids[code] for code in items)
    unknown = ItemText()
    item_texts = [texts.items.get(item_id, unknown) for item_id in item_ids]
    no_values = ("",) * len(texts.attribute_names)
    values = [texts.users.get(user_id, no_values) for user_id in user_ids]
    interactions = Interactions(
        name=name,
        user_ids=user_ids,
        item_ids=item_ids,
        offsets=offsets,
        items=item_index[events.items[kept]][order],
        timestamps=timestamps,
        has_timestamps=not np.array_equal(timestamps, position),
        titles=tuple(text.title for text in item_texts),
        categories=tuple(text.categories for text in item_texts),
        user_attributes={name: tuple(row[j] for row in values) for j, name in enumerate(texts.attribute_names)},
    )
    found = Counts(users=len(events.user_ids), items=len(set(events.item_ids).union(texts.items)), interactions=len(events.users))
    findings = texts.findings + converted + _findings(events, texts, keep_user, interactions)
    return Reading(interactions=interactions, found=found, findings=findings)


def _in_seconds(timestamps: Float64[np.ndarray, "events"]) -> tuple[Float64[np.ndarray, "events"], tuple[Finding, ...]]:
    """Most events decide on the unit: a few that are far off are nobody's."""
    typical = float(np.median(np.abs(timestamps)))
    for name, per_second in UNITS:
        if MOST_SECONDS < typical <= MOST_SECONDS * per_second:
            reason = f"they count {name}, and are kept in seconds"
            finding = Finding(action="converted", subject="timestamps", count=len(timestamps), reason=reason)
            return timestamps / per_second, (finding,)
    return timestamps, ()


def _check_size(name: str, events_per_user: Int64[np.ndarray, "users"]) -> None:
    if not events_per_user.sum():
        raise UserError(f"{name}: there are no interactions, expected at least two users with {MIN_EVENTS} events each")
    long_enough = int((events_per_user >= MIN_EVENTS).sum())
    if len(events_per_user) < 2:
        raise UserError(
            f"{name}: all interactions are of one user, expected at least two users: nothing can be learned across users"
        )
    if long_enough < 2:
        raise UserError(
            f"{name}: {long_enough} of {len(events_per_user):,} users have {MIN_EVENTS} or more events, expected at least two: "
            "leave-one-out needs an event to train on, one to validate and one to test"
        )


def _findings(events: RawEvents, texts: RawTexts, keep_user: np.ndarray, interactions: Interactions) -> tuple[Finding, ...]:
    short = np.flatnonzero(~keep_user)
    kept_items = set(interactions.item_ids)
    orphaned = sorted(set(events.item_ids) - kept_items)
    unseen = sorted(set(texts.items).difference(events.item_ids))
    untitled = [item for item, title in zip(interactions.item_ids, interactions.titles, strict=True) if not title]
    strangers = sorted(set(texts.users).difference(events.user_ids))
    pairs = np.repeat(np.arange(interactions.num_users, dtype=np.int64), np.diff(interactions.offsets))
    pairs = pairs * (interactions.num_items + 1) + interactions.items
    repeats = len(pairs) - len(np.unique(pairs))
    lost = len(events.users) - interactions.num_interactions
    rows = (
        ("dropped", "users", len(short), f"fewer than {MIN_EVENTS} events", [events.user_ids[code] for code in short[:3]]),
        ("dropped", "interactions", lost, f"of users with fewer than {MIN_EVENTS} events", []),
        ("dropped", "items", len(orphaned), f"only users with fewer than {MIN_EVENTS} events took them", orphaned),
        ("dropped", "items", len(unseen), "in the item file, but without an interaction", unseen),
        ("dropped", "users", len(strangers), "in the user file, but without an interaction", strangers),
        ("kept", "items", len(untitled), "without a title: the title is empty", untitled),
        ("kept", "interactions", repeats, "repeats of an item that the user had before", []),
    )
    return tuple(
        Finding(action=action, subject=subject, count=count, reason=reason, examples=tuple(examples[:3]))
        for action, subject, count, reason, examples in rows
        if count
    )
