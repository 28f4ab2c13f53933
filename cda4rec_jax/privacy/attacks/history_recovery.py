"""How much of a private history can be read off what was released: an attack by ridge regression, trained on other users.

The attacker holds the whole histories and the releases of half of the users, learns to map a release to the multi-hot vector of
the history's items, and attacks the other half; then the halves swap. It ranks the catalogue for every victim, released ids
first, and is measured by

    recall@k = |top k  ∩  items of the history| / min(k, |items of the history|)

so that knowing everything gives exactly 1. Ridge strength is chosen on the attacker's own users, and infinite strength (the
popularity ranking, whatever was released) is among the choices: a release that tells nothing gives the recall of popularity.
Ids are ranked first only where most of them are in the histories of the attacker's own users.

Controls accompany every figure. Positive: the whole history as release must give 1, and by the regression alone, which has to do
without its ids as it does at PROFILE, much more than popularity. Null: the same releases, shuffled among the users, must give the
recall of popularity.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.privacy.attacks.ridge import Release, Ridge, design, multi_hot, right_singular_vectors, silent, whole

_MIN_USERS = 20  # some to train on, others to attack
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Settings of the attack.

    Attributes:
        k: length of the attacker's list.
        rank: catalogues above this size are attacked in the space of so many singular vectors of the attacker's own histories.
        ridge_strengths: candidates, relative to the number of training users; the popularity ranking is always one more.
        max_victims: users attacked in each half, drawn at random; all users of the other half train.
        holdout: share of the attacker's users on whom the strength is chosen.
        max_holdout: most users in that share.
        seed: of the halves, the draws and the shuffling.
    """

    k: int = 20
    rank: int = 128
    ridge_strengths: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    max_victims: int = 1_000
    holdout: float = 0.2
    max_holdout: int = 300
    seed: int = 0


_DEFAULT = AttackConfig()


@dataclass(frozen=True, kw_only=True)
class ExposureReport:
    """Recall of the attack at each level, its controls, and the exposure that the planner pays for.

    Attributes:
        recall: mean recall@k for each level that was attacked.
        null_recall: the same with releases shuffled among users; should be near ``nothing_recall``.
        nothing_recall: A_NOTHING, of the popularity ranking.
        raw_recall: A_raw, of the attack on whole histories; 1 if the attack works.
        regressed_recall: of the regression alone on whole histories, whose ids are not ranked first; far above ``nothing_recall`` if it
            works.
        exposure: one value for each EgressLevel, (A_level - A_NOTHING) / (A_raw - A_NOTHING) clipped to [0, 1]; 0 at NOTHING.
        num_victims: users over whom the means are taken.
    """

    recall: dict[EgressLevel, float]
    null_recall: dict[EgressLevel, float]
    nothing_recall: float
    raw_recall: float
    regressed_recall: float
    exposure: tuple[float, float, float, float]
    num_victims: int


def exposure_by_level(
    releases: Mapping[EgressLevel, Release],
    offsets: np.ndarray,
    items: np.ndarray,
    num_items: int,
    config: AttackConfig = _DEFAULT,
) -> ExposureReport:
    """Attack every level, with all controls.

    Clipping: a level whose attack does worse than popularity has exposure 0 (telling something cannot tell less than nothing; the
    attacker may ignore it), and 1 is the whole history. A level that is not in ``releases`` counts as exposed as the most exposed
    lower one.

    Args:
        releases: what leaves at each level, for the same ``u`` users in the same order.
        offsets: int [u+1]; user j's history is ``items[offsets[j]:offsets[j+1]]``.
        items: int [N] item indices from 1 on; repeats are allowed, order does not matter.
        num_items: catalogue size.
        config: of the attack.

    Raises:
        UserError: fewer than 20 users, a catalogue of at most k items, or histories that popularity alone recovers.
    """
    private = multi_hot(offsets, items, num_items)
    halves = _split(private, config)
    nothing = float(_attack(silent(private.get_shape()[0]), private, halves, config).mean())
    raw = float(_attack(whole(offsets, items), private, halves, config).mean())
    regressed = float(_attack(whole(offsets, items), private, halves, config, rank_ids=False).mean())
    if raw <= nothing:
        raise UserError(f"popularity alone recovers the histories (recall@{config.k} {nothing:.3f}); use a larger catalogue")
    recall: dict[EgressLevel, float] = {}
    null: dict[EgressLevel, float] = {}
    exposure = [0.0]
    for level in (EgressLevel.PROFILE, EgressLevel.RECENT, EgressLevel.FULL):
        if level not in releases:
            exposure.append(max(exposure))
            continue
        recall[level] = float(_attack(releases[level], private, halves, config).mean())
        null[level] = float(_attack(releases[level].shuffled(config.seed), private, halves, config).mean())
        exposure.append(float(np.clip((recall[level] - nothing) / (raw - nothing), 0.0, 1.0)))
    return ExposureReport(
        recall=recall,
        null_recall=null,
        nothing_recall=nothing,
        raw_recall=raw,
        regressed_recall=regressed,
        exposure=(exposure[0], exposure[1], exposure[2], exposure[3]),
        num_victims=sum(len(half.victims) for half in halves),
    )


def history_recovery(
    release: Release, offsets: np.ndarray, items: np.ndarray, num_items: int, config: AttackConfig = _DEFAULT
) -> np.ndarray:
    """Recall@k of the attack for every victim, float64 [number of victims].

    Halves and victims depend on the seed and the number of users only: two releases of the same users are attacked alike.

    Arguments and errors are those of ``exposure_by_level``, for one release.
    """
    private = multi_hot(offsets, items, num_items)
    return _attack(release, private, _split(private, config), config)


@dataclass(frozen=True, kw_only=True)
class _Half:
    """One half of the users as attackers: what they know before they see any release."""

    fitted: np.ndarray  # users on whom ridge regression is fitted
    held: np.ndarray  # users on whom its strength is chosen
    victims: np.ndarray  # users of the other half
    popularity: np.ndarray  # [i] share of the fitted users who have the item
    basis: np.ndarray | None  # [i, rank]; None: the catalogue is small enough as it is
    target: np.ndarray  # [fitted, rank] or [fitted, i]: their histories less the mean history


def check_size(num_users: int, num_items: int, config: AttackConfig = _DEFAULT) -> None:
    """Raise UserError where data is too small to attack, and so to train both agents on, whose planner weighs exposure."""
    if num_users < _MIN_USERS or num_items <= config.k:
        raise UserError(
            f"{num_users:,} users and {num_items:,} items are too few for both agents: what each egress level gives away is measured "
            f"on them, which takes at least {_MIN_USERS} users and {config.k + 1} items. Use a smaller --k-core or more data, or train "
            "the baseline (--preset sasrec)"
        )


def _split(private: sparse.csr_matrix, config: AttackConfig) -> list[_Half]:
    num_users, num_items = private.get_shape()
    check_size(num_users, num_items, config)
    parts = np.array_split(np.random.default_rng(config.seed).permutation(num_users), 2)
    halves = []
    for attackers, others in (parts, parts[::-1]):
        num_held = min(max(1, int(len(attackers) * config.holdout)), config.max_holdout)
        held, fitted = attackers[:num_held], attackers[num_held:]
        known = private[fitted]
        basis = None
        if num_items > config.rank:
            rank = min(config.rank, len(fitted))
            basis = right_singular_vectors(known, rank, config.seed)
        reduced = known.toarray() if basis is None else np.asarray(known @ basis)
        halves.append(
            _Half(
                fitted=fitted,
                held=held,
                victims=others[: config.max_victims],
                popularity=np.asarray(known.mean(axis=0)).ravel().astype(np.float32),
                basis=basis,
                target=reduced - reduced.mean(axis=0, keepdims=True),
            )
        )
    return halves


def _attack(
    release: Release, private: sparse.csr_matrix, halves: list[_Half], config: AttackConfig, *, rank_ids: bool = True
) -> np.ndarray:
    """Recall@k of each half's victims, one after the other. Ids that can be trusted are ranked first, unless ``rank_ids`` is off."""
    released = release.multi_hot(private.get_shape()[1])
    return np.concatenate([_attack_half(release.features, released, private, half, config, rank_ids) for half in halves])


def _attack_half(
    features: np.ndarray,
    released: sparse.csr_matrix,
    private: sparse.csr_matrix,
    half: _Half,
    config: AttackConfig,
    rank_ids: bool,
) -> np.ndarray:
    """Fit on some of the attacker's users, choose the ridge strength on the rest, attack the other half."""
    ridge = Ridge(design(features[half.fitted], released[half.fitted], half.basis), half.target)
    true_ids = released[half.fitted].multiply(private[half.fitted]).sum()
    trusts_ids = bool(rank_ids and released.nnz and true_ids > 0.5 * released[half.fitted].sum())

    def recall(users: np.ndarray, strength: float) -> np.ndarray:
        guess = ridge.guess(design(features[users], released[users], half.basis), strength)
        return _recall(guess, released[users] if trusts_ids else None, private[users], half, config.k)

    strengths = (np.inf, *config.ridge_strengths)
    chosen = int(np.argmax([recall(half.held, strength).mean() for strength in strengths]))
    return recall(half.victims, strengths[chosen])


def _recall(guess: np.ndarray, known: sparse.csr_matrix | None, private: sparse.csr_matrix, half: _Half, k: int) -> np.ndarray:
    """Recall@k of ranking by popularity + guess, with known ids first; float64 [u]."""
    found = []
    for start in range(0, len(guess), _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores = guess[rows] if half.basis is None else guess[rows] @ half.basis.T
        scores = scores + half.popularity[None, :]
        if known is not None:
            ids = known[rows].tocoo()
            scores[ids.row, ids.col] = np.inf
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        truth = private[rows].toarray()
        hits = np.take_along_axis(truth, top, axis=1).sum(axis=1)
        found.append(hits / np.minimum(k, np.maximum(truth.sum(axis=1), 1)))
    return np.concatenate(found).astype(np.float64)
