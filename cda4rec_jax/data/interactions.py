"""The one type that every data source becomes, and the k-core that thins it out."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from cda4rec_jax.errors import UserError

MIN_EVENTS = 3  # leave-one-out needs a training event, a validation target and a test target


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about the data that its owner should know: what was dropped, or kept although odd, and why."""

    action: str
    subject: str
    count: int
    reason: str
    examples: tuple[str, ...] = ()

    def line(self) -> str:
        """One line of text, for example ``dropped 2 users: fewer than 3 events (u1, u2)``."""
        shown = ", ".join(self.examples)
        more = ", ..." if 0 < len(self.examples) < self.count else ""
        return f"{self.action} {self.count:,} {self.subject}: {self.reason}" + (f" ({shown}{more})" if shown else "")


@dataclass(frozen=True, kw_only=True, eq=False)
class Interactions:
    """Who interacted with what, and when. Columnar; users are contiguous, and each user's events are oldest first.

    Item index j in 1..num_items stands for ``item_ids[j - 1]``; 0 is padding and never an item. The arrays are read-only. The
    order of ``item_ids`` must not follow first appearance or popularity, since an index must say nothing about time.

    Attributes:
        name: of the dataset; no part of the fingerprint.
        user_ids, item_ids: external ids, unique.
        offsets: [u + 1]; the events of user j are ``offsets[j]:offsets[j + 1]``.
        items: [N] item index of each event.
        timestamps: [N] unix seconds, or 0, 1, 2, ... per user where the source knows only an order.
        has_timestamps: False where ``timestamps`` is only an order.
        titles, categories: one per item; empty where unknown.
        user_attributes: attribute name -> one value per user, "" where unknown; may be empty.

    Raises:
        ValueError: if the columns contradict each other.
    """

    name: str
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    offsets: Int64[np.ndarray, "offsets"]
    items: Int32[np.ndarray, "events"]
    timestamps: Float64[np.ndarray, "events"]
    has_timestamps: bool
    titles: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]
    user_attributes: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for column in ("offsets", "items", "timestamps"):
            view = getattr(self, column).view()
            view.flags.writeable = False
            object.__setattr__(self, column, view)
        _check_columns(self)

    @property
    def num_users(self) -> int:
        """Users, each with at least one event."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Catalogue items, padding not counted."""
        return len(self.item_ids)

    @property
    def num_interactions(self) -> int:
        """Events of all users."""
        return len(self.items)

    def history(self, user_index: int) -> Int32[np.ndarray, "l"]:
        """Item indices of one user's events, oldest first: a read-only view."""
        return self.items[self.offsets[user_index] : self.offsets[user_index + 1]]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over everything but the name: equal data has an equal fingerprint on every machine."""
        digest = hashlib.sha256()
        for array, dtype in ((self.offsets, "<i8"), (self.items, "<i4"), (self.timestamps, "<f8")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).data)
        attributes = sorted(self.user_attributes.items())
        texts = (self.has_timestamps, self.user_ids, self.item_ids, self.titles, self.categories, attributes)
        digest.update(json.dumps(texts).encode())
        return digest.hexdigest()


def _check_columns(data: Interactions) -> None:
    offsets, items, timestamps = data.offsets, data.items, data.timestamps
    if len(offsets) != data.num_users + 1 or offsets[0] != 0 or offsets[-1] != len(items) or np.any(np.diff(offsets) < 1):
        raise ValueError(f"offsets must rise from 0 to {len(items)} (events) in {data.num_users} steps, one for each user")
    if len(timestamps) != len(items):
        raise ValueError(f"{len(items)} items but {len(timestamps)} timestamps: expected one for each event")
    if len(items) and (items.min() < 1 or items.max() > data.num_items):
        raise ValueError(f"item indices must lie in 1..{data.num_items}, found {items.min()}..{items.max()}")
    if len(data.titles) != data.num_items or len(data.categories) != data.num_items:
        raise ValueError(f"expected {data.num_items} titles and categories, found {len(data.titles)} and {len(data.categories)}")
    for name, values in data.user_attributes.items():
        if len(values) != data.num_users:
            raise ValueError(f"user attribute {name!r} has {len(values)} values, expected {data.num_users}")
    if len(set(data.user_ids)) != data.num_users or len(set(data.item_ids)) != data.num_items:
        raise ValueError("user_ids and item_ids must each be unique")
    if not np.isfinite(timestamps).all():
        raise ValueError("timestamps must be finite")
    backwards = np.diff(timestamps) < 0
    backwards[offsets[1:-1] - 1] = False
    if backwards.any():
        raise ValueError("the events of a user must be in chronological order")


def select_events(data: Interactions, keep: Bool[np.ndarray, "events"]) -> Interactions:
    """The interactions with only the kept events, and only the users and items that still have one; orders do not change."""
    user_of_event = np.repeat(np.arange(data.num_users), np.diff(data.offsets))[keep]
    events_per_user = np.bincount(user_of_event, minlength=data.num_users)
    users = np.flatnonzero(events_per_user)
    items_left = np.unique(data.items[keep])
    new_index = np.zeros(data.num_items + 1, np.int32)
    new_index[items_left] = np.arange(1, len(items_left) + 1, dtype=np.int32)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(events_per_user[users], dtype=np.int64)])
    timestamps = data.timestamps[keep]
    if not data.has_timestamps:
        timestamps = np.arange(len(timestamps), dtype=np.float64) - np.repeat(offsets[:-1], np.diff(offsets))
    return replace(
        data,
        user_ids=tuple(data.user_ids[j] for j in users),
        item_ids=tuple(data.item_ids[j - 1] for j in items_left),
        offsets=offsets,
        items=new_index[data.items[keep]],
        timestamps=timestamps,
        titles=tuple(data.titles[j - 1] for j in items_left),
        categories=tuple(data.categories[j - 1] for j in items_left),
        user_attributes={name: tuple(values[j] for j in users) for name, values in data.user_attributes.items()},
    )


def before_last(data: Interactions, events: Int64[np.ndarray, "users"]) -> Interactions:
    """The interactions as they were before the last ``events[u]`` of each user. Users and items stay, also an item without events.

    Raises:
        ValueError: a user would keep fewer than ``MIN_EVENTS`` events.
    """
    lengths = np.diff(data.offsets) - events
    if np.any(events < 0) or np.any(lengths < MIN_EVENTS):
        raise ValueError(f"a user would keep {lengths.min()} events: expected at least {MIN_EVENTS} of each")
    place = np.arange(data.num_interactions) - np.repeat(data.offsets[:-1], np.diff(data.offsets))
    kept = place < np.repeat(lengths, np.diff(data.offsets))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return replace(data, offsets=offsets, items=data.items[kept], timestamps=data.timestamps[kept])


def k_core(data: Interactions, k: int) -> tuple[Interactions, tuple[Finding, ...]]:
    """The largest part in which every item has at least k events and every user at least max(k, 3).

    Users and items below it are dropped in turns until none is left. Repeated events count each time.

    Returns:
        the part (the same object where nothing is dropped), and what was dropped.

    Raises:
        UserError: if k is below 1, or fewer than two users remain.
    """
    if k < 1:
        raise UserError(f"k-core needs k of at least 1, got {k}: use 1 to keep every item")
    user_of_event = np.repeat(np.arange(data.num_users), np.diff(data.offsets))
    keep = np.ones(data.num_interactions, np.bool_)
    while True:
        users = np.bincount(user_of_event[keep], minlength=data.num_users)
        items = np.bincount(data.items[keep], minlength=data.num_items + 1)
        weak = keep & ((users[user_of_event] < max(k, MIN_EVENTS)) | (items[data.items] < k))
        if not weak.any():
            break
        keep &= ~weak
    if keep.all():
        return data, ()
    users_left = np.unique(user_of_event[keep])
    if len(users_left) < 2:
        raise UserError(
            f"{data.name}: the {k}-core keeps {len(users_left)} of {data.num_users:,} users, expected at least 2: "
            "use a smaller k-core"
        )
    core = select_events(data, keep)
    reason = f"outside the {k}-core"
    counts = (
        ("users", data.num_users - core.num_users),
        ("items", data.num_items - core.num_items),
        ("interactions", data.num_interactions - core.num_interactions),
    )
    return core, tuple(
        Finding(action="dropped", subject=subject, count=count, reason=reason) for subject, count in counts if count
    )
