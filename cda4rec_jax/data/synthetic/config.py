"""Knobs of the synthetic world."""

from dataclasses import dataclass

from cda4rec_jax.errors import UserError

MIN_ITEMS = 64  # two for each of the 32 shelves


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Sizes and strengths.

    The defaults give about 70,000 events. Of the last event of each user, knowing the truth finds .57 in a slate of 10, item
    counts of histories and of what followed what .31, and the 10 most popular unseen items .06.

    Attributes:
        seed: of everything; equal configs give equal worlds.
        num_users, num_items: sizes of the world.
        median_events: of a user; lengths are log-normal.
        sigma_events: standard deviation of the logarithm of a user's length.
        min_events, max_events: bounds of a user's length; nobody sees more than a third of the catalogue either.
        session_events: mean events of a session (geometric).
        popularity_exponent: Zipf exponent of the items' attraction.
        launched_late: share of items that appear only during the simulated year.
        retired: share of items, of those that were always there, that are taken off the shelves during the simulated year.
        num_successors: items that complement an item.
        follow_share: probability that an event within a session follows up on the last item; a third of it across sessions.
        taste_share: probability that an event ignores the session's intent and comes from the long-term interests.
        popular_share: probability that an event comes from what is popular. The session's intent has the rest.
        attribute_strength: standard deviation of what one private attribute adds to an interest.
        personal_strength: standard deviation of the personal part of an interest.
        style_strength: how much the match of style and item counts against the item's attraction.
        drift: share of the deviation from the user's mean interests that is new in every session.
        undisclosed: share of attribute values that the data shows as unknown.
    """

    seed: int = 0
    num_users: int = 2000
    num_items: int = 600
    median_events: float = 29.0
    sigma_events: float = 0.6
    min_events: int = 8
    max_events: int = 150
    session_events: float = 4.0
    popularity_exponent: float = 0.75
    launched_late: float = 0.2
    retired: float = 0.0
    num_successors: int = 6
    follow_share: float = 0.25
    taste_share: float = 0.25
    popular_share: float = 0.15
    attribute_strength: float = 0.7
    personal_strength: float = 1.0
    style_strength: float = 1.0
    drift: float = 0.1
    undisclosed: float = 0.05

    def __post_init__(self) -> None:
        problems = []
        if self.num_users < 2:
            problems.append(f"{self.num_users} users: expected at least 2")
        if self.num_items < MIN_ITEMS:
            problems.append(f"{self.num_items} items: expected at least {MIN_ITEMS}")
        if not 3 <= self.min_events <= self.max_events:
            problems.append(f"events per user {self.min_events}..{self.max_events}: expected a range from 3 upwards")
        if self.session_events < 1 or self.median_events <= 0 or self.num_successors < 1:
            problems.append("session_events and num_successors must be at least 1, and median_events positive")
        shares = (
            self.follow_share,
            self.taste_share,
            self.popular_share,
            self.launched_late,
            self.retired,
            self.drift,
            self.undisclosed,
        )
        if min(shares) < 0 or max(shares) > 1 or self.follow_share + self.taste_share + self.popular_share > 1:
            problems.append("shares must lie in 0..1, and follow, taste and popular together must not exceed 1")
        strengths = (
            self.attribute_strength,
            self.personal_strength,
            self.style_strength,
            self.sigma_events,
            self.popularity_exponent,
        )
        if self.seed < 0 or min(strengths) < 0 or max(strengths) > 5:
            problems.append("seed must not be negative, and strengths, sigma_events and popularity_exponent must lie in 0..5")
        if self.launched_late + self.retired > 0.9:
            problems.append("launched_late and retired together must not exceed .9: some items must always be there")
        if self.popular_share <= 0:
            problems.append("popular_share must be positive: it keeps every open item possible")
        if problems:
            raise UserError("the synthetic world cannot be made: " + "; ".join(problems))
