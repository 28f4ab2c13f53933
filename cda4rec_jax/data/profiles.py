"""The profile of a history, in the only form in which it may leave a device, and the prefix vector that an agent reads.

Training builds prefixes with NumPy while it packs, a request builds them with JAX on the device: the functions here take either, through
the array API, so that both speak of the same numbers.
"""

from typing import Any

from cda4rec_jax.messages import EgressLevel

PROFILE_CATEGORIES = 8  # shares that a profile names
SHARE_STEPS = 15  # 4 bits
_PARTS_OF_EVENT = 60  # an event's item has up to 6 categories, and 60 is a multiple of 1 to 6
LENGTH_BUCKETS = (5, 20, 100)  # upper edges; a fourth bucket holds all longer histories


def quantise_shares(category_counts: Any) -> Any:
    """Top 8 category shares in 4 bits: ``round(15 sqrt(share))``, uint8 [..., g], 0 for all other categories.

    The square root spends the 16 steps on small shares, where they tell users apart. Ties go to the lower category index.

    Args:
        category_counts: float [..., g], events of each category (an event with several categories counts a part in each).
    """
    xp = category_counts.__array_namespace__()
    # Whole numbers are summed and compared without error, so no order of summing decides a tie.
    parts = xp.round(_PARTS_OF_EVENT * category_counts).astype(xp.float32)
    shares = parts / xp.maximum(xp.sum(parts, axis=-1, keepdims=True), xp.ones_like(parts[..., :1]))
    order = xp.argsort(-shares, axis=-1, stable=True)
    place = xp.argsort(order, axis=-1, stable=True)
    steps = xp.round(SHARE_STEPS * xp.sqrt(shares))
    return xp.where(place < PROFILE_CATEGORIES, steps, xp.zeros_like(steps)).astype(xp.uint8)


def length_bucket(num_events: Any) -> Any:
    """Bucket 0-3 of a number of events: up to 5, up to 20, up to 100, more."""
    return sum((num_events > edge).astype("int32") for edge in LENGTH_BUCKETS)


def prefix_size(num_categories: int, num_attributes: int) -> int:
    """Number of features of ``prefix_features``."""
    return num_categories + len(LENGTH_BUCKETS) + 1 + num_attributes + EgressLevel.FULL


def prefix_features(category_shares: Any, bucket: Any, attributes: Any, level: Any) -> Any:
    """What an agent's prefix token says: decoded shares, length bucket, attributes and level, float32 [..., f].

    Args:
        category_shares: uint8 [..., g] of ``quantise_shares``.
        bucket: int [...] of ``length_bucket``.
        attributes: float [..., a]; zero where the level does not release them.
        level: int [...], PROFILE to FULL.
    """
    xp = category_shares.__array_namespace__()
    shares = (category_shares.astype(xp.float32) / SHARE_STEPS) ** 2
    buckets = bucket[..., None] == xp.arange(len(LENGTH_BUCKETS) + 1).reshape((1,) * bucket.ndim + (-1,))
    levels = level[..., None] == xp.arange(1, EgressLevel.FULL + 1).reshape((1,) * level.ndim + (-1,))
    parts = [shares, buckets.astype(xp.float32), attributes.astype(xp.float32), levels.astype(xp.float32)]
    return xp.concatenate(parts, axis=-1)
