"""Fronts of gain against cost, and the hypervolume that they dominate."""

import numpy as np
from jaxtyping import Bool, Float


def pareto_front(costs: Float[np.ndarray, "m"], gains: Float[np.ndarray, "m"]) -> Bool[np.ndarray, "m"]:
    """Points that no other point beats: none has at most their cost and a higher gain, or less cost and at least their gain."""
    no_dearer, no_worse = costs[None, :] <= costs[:, None], gains[None, :] >= gains[:, None]
    better = (costs[None, :] < costs[:, None]) | (gains[None, :] > gains[:, None])
    return ~np.any(no_dearer & no_worse & better, axis=1, keepdims=True)[:, 0]


def hypervolume(
    costs: Float[np.ndarray, "*r m"], gains: Float[np.ndarray, "*r m"], *, cost_reference: float, gain_reference: float
) -> Float[np.ndarray, "*r"]:
    """Area that ``m`` points dominate below ``cost_reference`` and above ``gain_reference``, in 2-D.

    The integral over cost c from the cheapest point to the reference of (highest gain among points of cost at most c) minus
    ``gain_reference``. Points beyond a reference add nothing. Leading axes are kept: resamples, for instance.
    """
    order = np.argsort(costs, axis=-1)
    costs = np.minimum(np.take_along_axis(costs, order, axis=-1), cost_reference)
    best = np.maximum.accumulate(np.take_along_axis(gains, order, axis=-1), axis=-1)
    ends = np.concatenate([costs[..., 1:], np.full((*costs.shape[:-1], 1), cost_reference)], axis=-1)
    return np.asarray(np.sum((ends - costs) * np.maximum(best - gain_reference, 0.0), axis=-1))
