"""What generated the synthetic events, and the exact next-item distribution that follows from it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, Int64

from cda4rec_jax.data.synthetic.catalogue import NUM_SHELVES, Catalogue
from cda4rec_jax.data.synthetic.config import SyntheticConfig


@dataclass(frozen=True, kw_only=True)
class People:
    """Users of the synthetic world and their sessions; session s of user u is row ``session_offsets[u] + s``."""

    attribute_names: tuple[str, ...]  # "gender=female", ...
    attribute_vectors: Float64[np.ndarray, "u a"]  # the true values as one-hot groups, also where the data shows ""
    mean_interests: Float64[np.ndarray, "u shelves"]  # logits
    styles: Float64[np.ndarray, "u styles"]
    session_offsets: Int64[np.ndarray, "users_plus_1"]
    interests: Float64[np.ndarray, "sessions shelves"]  # probability of each shelf: the long-term interests at the session
    intents: Int64[np.ndarray, "sessions"]  # shelf that the session is about, drawn from the interests
    event_sessions: Int64[np.ndarray, "events"]  # row of the session of each event
    starts_session: Bool[np.ndarray, "events"]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The parameters behind the events. Item rows are by item_index, shelves as in ``catalogue.SHELVES``.

    Event by event, item j has probability proportional to (0 for items that the user has had, or that are not on offer)

    ``follow share_j(last item) + (intent [shelf_j = intent] + taste interest(shelf_j)) a_j(u) + popular attraction_j``

    with ``a_j(u) = attraction_j^.7 exp(style_strength style_u . style_j)``, normalised over the open items of the shelf.
    ``follow`` is ``follow_share`` within a session, a third of it at a session's first event and 0 at a user's; ``taste`` and
    ``popular`` are ``taste_share`` and ``popular_share``; ``intent`` is the rest to 1.
    """

    config: SyntheticConfig
    catalogue: Catalogue
    people: People
    offsets: Int64[np.ndarray, "users_plus_1"]
    items: Int32[np.ndarray, "events"]
    timestamps: Float64[np.ndarray, "events"]

    def next_item_probabilities(
        self, user_indices: Int[np.ndarray, "b"], positions: Int[np.ndarray, "b"]
    ) -> Float64[np.ndarray, "b i"]:
        """Distribution of the event at ``positions`` given all earlier ones, the time, and the truth; rows sum to 1.

        Within a session its intent is known; at the first event of a session, before anything shows it, it is summed out. No
        slate of k items has a higher expected hit_rate than the top k of a row, not even one made with this knowledge; what a
        model can learn lies below it, since a model has to infer interests and intent from events.

        Raises:
          IndexError: a position is not that of an event of its user.
        """
        lengths = self.offsets[user_indices + 1] - self.offsets[user_indices]
        if np.any((positions < 0) | (positions >= lengths)):
            raise IndexError(f"positions must lie in 0..events - 1, got {positions.min()}..{positions.max()}")
        events = self.offsets[user_indices] + positions
        closed = self.catalogue.closed_at(self.timestamps[events])
        for row, event in enumerate(events):
            closed[row, self.items[event - positions[row] : event]] = True
        last_items = np.where(positions > 0, self.items[events - 1], 0)
        follow, shelf_shares = event_shares(self.config, self.people, events, last_items > 0, intent_known=False)
        attraction = personal_attraction(self.config, self.catalogue, self.people.styles[user_indices])
        weights = event_weights(self.config, self.catalogue, attraction, closed, last_items, follow, shelf_shares)
        return weights / weights.sum(axis=1, keepdims=True)


def personal_attraction(
    config: SyntheticConfig, catalogue: Catalogue, styles: Float64[np.ndarray, "b styles"]
) -> Float64[np.ndarray, "b i"]:
    """``attraction^.7 exp(style_strength style_u . style_j)``: what a user makes of the items of one shelf."""
    return catalogue.attraction[None, :] ** 0.7 * np.exp(config.style_strength * styles @ catalogue.styles.T)


def event_shares(
    config: SyntheticConfig, people: People, events: Int[np.ndarray, "b"], has_last: Bool[np.ndarray, "b"], *, intent_known: bool
) -> tuple[Float64[np.ndarray, "b"], Float64[np.ndarray, "b shelves"]]:
    """Probability that each event follows up on the last item, and its probability of coming from each shelf.

    ``intent_known`` False sums the intent out at the first event of a session, where nothing has shown it yet.
    """
    starts = people.starts_session[events]
    follow = config.follow_share * np.where(starts, 1 / 3, 1.0) * has_last
    intent = 1 - follow - config.taste_share - config.popular_share
    sessions = people.event_sessions[events]
    interests = people.interests[sessions]
    aims = np.eye(NUM_SHELVES)[people.intents[sessions]]
    if not intent_known:
        aims = np.where(starts[:, None], interests, aims)
    return follow, intent[:, None] * aims + config.taste_share * interests


def event_weights(
    config: SyntheticConfig,
    catalogue: Catalogue,
    attraction: Float64[np.ndarray, "b i"],
    closed: Bool[np.ndarray, "b i"],
    last_items: Int[np.ndarray, "b"],
    follow: Float64[np.ndarray, "b"],
    shelf_shares: Float64[np.ndarray, "b shelves"],
) -> Float64[np.ndarray, "b i"]:
    """The sum in ``Truth``'s docstring: proportional to the probability of each item, 0 where ``closed``."""
    open_attraction = np.where(closed, 0.0, attraction)
    shelf_members = np.eye(NUM_SHELVES)[catalogue.shelves] * (catalogue.shelves >= 0)[:, None]
    totals = np.maximum(open_attraction @ shelf_members, 1e-300)
    weights = (shelf_shares / totals)[:, catalogue.shelves] * open_attraction
    weights += config.popular_share * catalogue.attraction[None, :]
    np.put_along_axis(
        weights,
        catalogue.successors[last_items],
        np.take_along_axis(weights, catalogue.successors[last_items], axis=1)
        + follow[:, None] * catalogue.successor_shares[last_items],
        axis=1,
    )
    return np.where(closed, 0.0, weights)
