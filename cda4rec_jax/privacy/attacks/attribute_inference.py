"""Can a personal attribute be guessed from what was released? An attack by ridge regression, trained on other users.

The attacker knows the attribute, the whole history and the release of half of the users, and guesses the attribute of the other half;
then the halves swap. A guess is the value with the highest score: its share among the attacker's users plus ridge regression of the
value's indicator on the release (``attacks.ridge``). The strength is the one with the least squared error on the attacker's own held
users (the Brier score, which only true shares minimise), and infinite strength, the majority whatever was released, is among the choices.

Two numbers tell how much leaks. The gain is the accuracy above that of always guessing the majority. The area under the ROC curve, one
value against the rest and weighted by share, is .5 for guesses that know nothing, also where a majority leaves no room for a gain.

The release must not hold the attribute itself: what is told needs no inference, and is reported as told.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cda4rec_jax.errors import UserError
from cda4rec_jax.privacy.attacks.ridge import Release, Ridge, design, multi_hot, right_singular_vectors

UNKNOWN = -1  # value of users who have not disclosed the attribute; they take no part
MIN_USERS = 40


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Settings of the attack.

    Attributes:
        rank: released ids are read in the space of so many singular vectors of the attacker's histories.
        ridge_strengths: candidates, relative to the number of training users; the majority is always one more.
        max_victims: users attacked in each half; all users of the other half train.
        holdout: share of the attacker's users on whom the strength is chosen.
        resamples: of the bootstrap over victims.
        seed: of halves, singular vectors and resamples.
    """

    rank: int = 64
    ridge_strengths: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    max_victims: int = 2_000
    holdout: float = 0.2
    resamples: int = 200
    seed: int = 0


_DEFAULT = InferenceConfig()


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95% interval over victims."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How well an attribute was guessed from one kind of release.

    Attributes:
        accuracy: share of the victims whose value was guessed.
        gain: that share less the share of those whom guessing the majority gets right.
        auc: area under the ROC curve.
        num_victims: users over whom the means are taken.
    """

    accuracy: float
    gain: Estimate
    auc: Estimate
    num_victims: int


@dataclass(frozen=True, kw_only=True)
class _Half:
    """One half of the users as attackers."""

    fitted: np.ndarray
    held: np.ndarray
    victims: np.ndarray
    shares: np.ndarray  # [values] among the fitted users
    basis: np.ndarray | None  # [i, rank]; None: the catalogue is small enough as it is


class AttributeInference:
    """The attack on one attribute; every release of the same users is attacked alike.

    Args:
        values: int [u], 0, 1, ... for the values, UNKNOWN where the user has not disclosed it.
        offsets: int [u+1]; user j's history is ``items[offsets[j]:offsets[j+1]]``.
        items: int [N] item indices from 1 on.
        num_items: catalogue size.
        config: of the attack.

    Raises:
        UserError: too few users with a known value, or all with the same.
    """

    def __init__(
        self, values: np.ndarray, offsets: np.ndarray, items: np.ndarray, num_items: int, config: InferenceConfig = _DEFAULT
    ):
        self._config, self._num_items = config, num_items
        known = np.flatnonzero(values != UNKNOWN)
        if len(known) < MIN_USERS or len(np.unique(values[known])) < 2:
            raise UserError(
                f"{len(known)} users with {len(np.unique(values[known]))} known values of the attribute; the attack needs at least "
                f"{MIN_USERS} users and 2 values"
            )
        self._indicators = (values[:, None] == np.arange(values.max() + 1)[None, :]).astype(np.float32)
        self._values = values
        private = multi_hot(offsets, items, num_items)
        parts = np.array_split(np.random.default_rng(config.seed).permutation(known), 2)
        self._halves = []
        for attackers, others in (parts, parts[::-1]):
            num_held = max(1, int(len(attackers) * config.holdout))
            fitted = attackers[num_held:]
            basis = None
            if num_items > config.rank:
                rank = min(config.rank, len(fitted))
                basis = right_singular_vectors(private[fitted], rank, config.seed)
            self._halves.append(
                _Half(
                    fitted=fitted,
                    held=attackers[:num_held],
                    victims=others[: config.max_victims],
                    shares=self._indicators[fitted].mean(axis=0),
                    basis=basis,
                )
            )

    @cached_property
    def majority_accuracy(self) -> float:
        """Share of the victims whose value is the most common one among the attacker's users."""
        return float(np.concatenate([self._right(half, half.shares[None, :]) for half in self._halves]).mean())

    def attack(self, release: Release) -> Inference:
        """Guess the attribute of every victim from this release of all ``u`` users, in their order."""
        scores = [self._scores(release, half) for half in self._halves]
        right = [self._right(half, found) for half, found in zip(self._halves, scores, strict=True)]
        majority = [self._right(half, half.shares[None, :]) for half in self._halves]
        truths = [self._indicators[half.victims] for half in self._halves]
        gains = [ours - theirs for ours, theirs in zip(right, majority, strict=True)]

        def gain(rows: list[np.ndarray]) -> float:
            return float(np.concatenate([part[row] for part, row in zip(gains, rows, strict=True)]).mean())

        def auc(rows: list[np.ndarray]) -> float:
            # Scores of the two attackers are on scales of their own.
            parts = zip(scores, truths, rows, strict=True)
            return float(np.mean([roc_area(found[row], truth[row]) for found, truth, row in parts]))

        return Inference(
            accuracy=float(np.concatenate(right).mean()),
            gain=self._estimate(gain),
            auc=self._estimate(auc),
            num_victims=sum(len(part) for part in right),
        )

    def _scores(self, release: Release, half: _Half) -> np.ndarray:
        """Score of every value for each victim, float32 [v, values]."""
        released = release.multi_hot(self._num_items)

        def rows(users: np.ndarray) -> np.ndarray:
            return design(release.features[users], released[users], half.basis)

        ridge = Ridge(rows(half.fitted), self._indicators[half.fitted] - half.shares[None, :])
        truth = self._indicators[half.held]

        def squared_error(strength: float) -> float:
            return float(np.square(half.shares[None, :] + ridge.guess(rows(half.held), strength) - truth).sum(axis=1).mean())

        strength = min((np.inf, *self._config.ridge_strengths), key=squared_error)
        return half.shares[None, :] + ridge.guess(rows(half.victims), strength)

    def _right(self, half: _Half, scores: np.ndarray) -> np.ndarray:
        return (scores.argmax(axis=1) == self._values[half.victims]).astype(np.float64)

    def _estimate(self, statistic: Callable[[list[np.ndarray]], float]) -> Estimate:
        """The statistic of all victims, and its percentile bootstrap over victims, drawn within each half."""
        sizes = [len(half.victims) for half in self._halves]
        rng = np.random.default_rng([self._config.seed, 2])
        drawn = [statistic([rng.integers(0, size, size) for size in sizes]) for _ in range(self._config.resamples)]
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Estimate(mean=statistic([np.arange(size) for size in sizes]), low=float(low), high=float(high))


def roc_area(scores: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve, one value against the rest, weighted by the values' shares; ties count half.

    area(value) = (sum of ranks of the n1 users who have it - n1 (n1 + 1) / 2) / (n1 n0)

    Args:
        scores: float [v, values].
        truth: float [v, values], 1 at each user's value.

    Returns:
        .5 where no value divides the users.
    """
    # Not at the head of the module: importing it takes as long as all other SciPy, and every command would wait for it.
    from scipy.stats import rankdata

    have = truth.sum(axis=0)
    divides = (have > 0) & (have < len(truth))
    if not divides.any():
        return 0.5
    truth, have = truth[:, divides], have[divides]
    ranks = rankdata(scores[:, divides], axis=0)
    areas = ((ranks * truth).sum(axis=0) - have * (have + 1) / 2) / (have * (len(truth) - have))
    return float(np.average(areas, weights=have))
