"""Is one system better than another on these users? Paired bootstrap intervals, clustered by user."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_RESAMPLES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean over users of ``value - baseline``, and the percentile interval of that mean over resampled users."""

    mean_difference: float
    low: float
    high: float
    confidence: float
    num_users: int
    num_resamples: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_intervals(
    values: Float[np.ndarray, "q u n"],
    baseline: Float[np.ndarray, "#q u n"],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """Intervals of ``q`` systems against one baseline (or one each) on the same ``u`` users with ``n`` contexts each.

    The unit of resampling is the user: contexts of a user are averaged first, since they are not independent. All systems see the
    same resamples. Percentile bootstrap (Efron, 1979); the interval does not depend on the order of the systems.

    Args:
      values: Per system, user and context; for instance ndcg@10 or utility.
      baseline: The same for the baseline; a leading axis of 1 serves all systems. Zeros give intervals of the means themselves.
      num_resamples: Bootstrap resamples of the users.
      confidence: Mass of the interval, in (0, 1).
      seed: The same seed gives the same resamples.

    Raises:
      ValueError: No user, a NaN, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1.")
    differences = (np.asarray(values, np.float64) - np.asarray(baseline, np.float64)).mean(axis=2).T
    num_users = differences.shape[0]
    if num_users == 0:
        raise ValueError("no users; expected at least one.")
    if np.isnan(differences).any():
        raise ValueError("values or baseline hold NaN; expected a number for each system, user and context.")
    means = differences.mean(axis=0)
    resampled = resampled_means(differences - means[None], num_resamples=num_resamples, seed=seed) + means[None]
    tail = (1 - confidence) / 2
    lows, highs = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return [
        Interval(
            mean_difference=float(mean),
            low=float(low),
            high=float(high),
            confidence=confidence,
            num_users=num_users,
            num_resamples=num_resamples,
        )
        for mean, low, high in zip(means, lows, highs, strict=True)
    ]


def paired_interval(
    values: Float[np.ndarray, "u n"],
    baseline: Float[np.ndarray, "u n"],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """``paired_intervals`` of a single system."""
    options = {"num_resamples": num_resamples, "confidence": confidence, "seed": seed}
    return paired_intervals(values[None], baseline[None], **options)[0]


def resampled_means(columns: Float[np.ndarray, "u q"], *, num_resamples: int = 2000, seed: int = 0) -> Float[np.ndarray, "r q"]:
    """Means of each column over users drawn with replacement: what intervals of any function of means are made of.

    All columns see the same resamples, so that ratios and differences of them are paired.
    """
    # counts @ columns, a block of resamples at a time.
    rng = np.random.default_rng(seed)
    num_users = columns.shape[0]
    blocks = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        drawn = rng.integers(0, num_users, (size, num_users))
        counts = np.empty((size, num_users))
        for row, users in enumerate(drawn):
            counts[row] = np.bincount(users, minlength=num_users)
        blocks.append(counts @ columns)
    return np.concatenate(blocks) / num_users
