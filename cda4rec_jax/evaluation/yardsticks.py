"""Yardsticks of decisions: regret, equality with the context oracle, the gap to it that is closed, and why a gap is small.

Sums and counts are kept by user, so that every number is a ratio of means over users with an interval clustered by user.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array
from cda4rec_jax.evaluation.accuracy import HISTORY_STARTS, groups_of
from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, Link
from cda4rec_jax.metrics import resampled_means
from cda4rec_jax.pipeline.planners import context_cells
from cda4rec_jax.pipeline.population import PlanRecords

COLD_SHARE = 0.1  # of the users: those with the shortest histories
Members = Bool[np.ndarray, "draws n"]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """``sum(numerator) / sum(denominator)`` over users; [n] each. With counts below it is a mean over requests."""

    numerator: Float[np.ndarray, "n"]
    denominator: Float[np.ndarray, "n"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A ratio over users with its 95% percentile bootstrap interval over users; None where there are no requests."""

    mean: float | None
    low: float | None
    high: float | None
    users: int  # with a request in it


def estimate_ratios(ratios: Mapping[Key, Ratio], *, num_resamples: int = 2000, seed: int = 0) -> dict[Key, Estimate]:
    """Every ratio with its interval, over the same resamples of the same users.

    A denominator may be a difference that is not sure to be positive: then the interval says so by its width.
    """
    names = list(ratios)
    over = np.stack([ratios[name].numerator for name in names], axis=1)
    under = np.stack([ratios[name].denominator for name in names], axis=1)
    means = resampled_means(np.concatenate([over, under], axis=1), num_resamples=num_resamples, seed=seed)
    found = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = means[:, : len(names)] / means[:, len(names) :]
    for column, name in enumerate(names):
        total, users = under[:, column].sum(), int(np.count_nonzero(under[:, column]))
        if total == 0:
            found[name] = Estimate(mean=None, low=None, high=None, users=0)
            continue
        usable = drawn[np.isfinite(drawn[:, column]), column]
        low, high = np.quantile(usable, [0.025, 0.975])
        found[name] = Estimate(mean=float(over[:, column].sum() / total), low=float(low), high=float(high), users=users)
    return found


def estimate_quotient(top: Ratio, bottom: Ratio, *, num_resamples: int = 2000, seed: int = 0) -> Estimate:
    """``top / bottom`` of two ratios over the same users, such as two means over different requests; see ``estimate_ratios``."""
    parts = (top.numerator, top.denominator, bottom.numerator, bottom.denominator)
    columns = np.stack(parts, axis=1)
    users = int(np.count_nonzero(top.denominator))
    over, counted, under, counted_under = columns.sum(axis=0)
    if not counted or not counted_under or not under:
        return Estimate(mean=None, low=None, high=None, users=0)
    means = resampled_means(columns, num_resamples=num_resamples, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = (means[:, 0] / means[:, 1]) / (means[:, 2] / means[:, 3])
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
    return Estimate(mean=float(over / counted / (under / counted_under)), low=float(low), high=float(high), users=users)


def mean_over(values: Float[np.ndarray, "draws n"], members: Members) -> Ratio:
    """Mean of ``values`` over the requests that are ``members``."""
    return Ratio(numerator=np.where(members, values, 0.0).sum(axis=0, dtype=np.float64), denominator=members.sum(axis=0) * 1.0)


def gap_closed(
    policy: Float[np.ndarray, "draws n"],
    floor: Float[np.ndarray, "draws n"],
    ceiling: Float[np.ndarray, "draws n"],
    members: Members,
) -> Ratio:
    """Share of the way from ``floor`` to ``ceiling`` that ``policy`` goes: (policy - floor) / (ceiling - floor), of utilities."""
    return Ratio(
        numerator=mean_over(np.subtract(policy, floor, dtype=np.float64), members).numerator,
        denominator=mean_over(np.subtract(ceiling, floor, dtype=np.float64), members).numerator,
    )


def mean_of_ratios(found: list[Ratio]) -> Ratio:
    """The ratio of the means over several runs on the same users."""
    return Ratio(
        numerator=np.mean([one.numerator for one in found], axis=0),
        denominator=np.mean([one.denominator for one in found], axis=0),
    )


def request_groups(context: Context) -> dict[str, dict[str, Members]]:
    """Requests [draws, n] by history length, tier, link, consent, kept embedding, and cold users."""
    length = np.asarray(context.history_length)
    cold = np.quantile(length[0], COLD_SHARE, method="lower")
    by_length = groups_of(length[0].astype(np.int64), HISTORY_STARTS)  # the same in every context of an event
    kept = np.asarray(context.cache_level) > EgressLevel.NOTHING
    return {
        "history length": {label: np.broadcast_to(members, length.shape) for label, members in by_length.items()},
        "tier": _by_value(context.tier, DeviceTier),
        "link": _by_value(context.link, Link),
        "consent": _by_value(context.consent, EgressLevel),
        "kept embedding": {"none": ~kept, "kept": kept},
        "cold users": {f"cold (up to {cold:.0f} events)": length <= cold, "others": length > cold},
    }


def _by_value(values: Array, kinds: type[DeviceTier] | type[Link] | type[EgressLevel]) -> dict[str, Members]:
    return {kind.name.lower(): np.asarray(values) == kind for kind in kinds}


@dataclass(frozen=True, kw_only=True)
class QualityParts:
    """Where the quality of plans varies, over the requests with a kept embedding, in which all plans mean something.

    q_ip = mean + request_i + plan_p + r_ip. What a request's target is like as a whole (``request``) moves no decision. ``plan`` is what
    plug-in knows. Of r, ``cell`` is what a planner can know from the oracle's cells, and the rest is seen only afterwards.

    Attributes:
        request, plan, interaction: mean squares of the three parts; they sum to the variance of q.
        cell: part of ``interaction`` that the cells' means of other users explain: mean of (cell mean of r on one half of the users
            times r on the other). It has no bias from noise, and may come out negative.
        policy, oracle: part of ``interaction`` that what a planner believes predicts: mean of r^2 - (r - believed)^2. It pays for errors,
            so it is negative for a belief that is worse than none.
    """

    request: Ratio
    plan: Ratio
    interaction: Ratio
    cell: Ratio
    policy: Ratio
    oracle: Ratio


def quality_parts(
    records: PlanRecords,
    policy: Float[np.ndarray, "n p"],
    oracle: Float[np.ndarray, "n p"],
    *,
    seed: int = 0,
) -> QualityParts:
    """The parts of the variance of quality; ``policy`` and ``oracle`` are what these planners believe of each user's first context."""
    first: Context = jax.tree.map(lambda leaf: leaf[0], records.requests.context)
    counted = np.asarray(first.cache_level) > EgressLevel.NOTHING
    quality = np.asarray(records.quality, np.float64)[counted]
    request = quality.mean(axis=1, keepdims=True) - quality.mean()
    plan = quality.mean(axis=0, keepdims=True) - quality.mean()
    rest = quality - quality.mean() - request - plan
    folds = np.random.default_rng(seed).permutation(len(quality)) % 2
    cell = _other_half_means(rest, context_cells(first)[counted], folds)
    parts = {
        "request": request**2,
        "plan": plan * (quality - quality.mean() - request),
        "interaction": rest**2,
        "cell": cell * rest,
        "policy": rest**2 - (rest - _centred(policy[counted])) ** 2,
        "oracle": rest**2 - (rest - _centred(oracle[counted])) ** 2,
    }
    found = {}
    for name, values in parts.items():
        numerator = np.zeros(len(counted))
        numerator[counted] = values.mean(axis=1)
        found[name] = Ratio(numerator=numerator, denominator=counted * 1.0)
    return QualityParts(**found)


def _centred(values: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n p"]:
    """Without the means of rows and columns."""
    wide = np.asarray(values, np.float64)
    return wide - wide.mean(axis=1, keepdims=True) - wide.mean(axis=0, keepdims=True) + wide.mean()


def _other_half_means(
    values: Float[np.ndarray, "n p"], cells: Int[np.ndarray, "n"], folds: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n p"]:
    """Mean of each request's cell over the other half of the requests; 0 where it has none there."""
    found = np.zeros_like(values)
    for fold in (0, 1):
        own, other = folds == fold, folds != fold
        total, count = np.zeros((cells.max() + 1, values.shape[1])), np.zeros((cells.max() + 1, 1))
        np.add.at(total, cells[other], values[other])
        np.add.at(count, cells[other], 1.0)
        found[own] = (total / np.maximum(count, 1.0))[cells[own]]
    return found
