"""Budgets as constraints: a budget goes in, the price that keeps it comes out.

A ``Budgeted`` planner adds a price to what the budget limits: ``logit_p - multiplier * units_p``, the Lagrangian of "the most utility
within the budget" (Everett, 1963, doi 10.1287/opre.11.3.399). For each request a higher multiplier never makes the chosen units more, so
the multiplier is found by bisection on requests whose outcome is known, and holds on others as far as they are alike.

| budget | limits | units that are priced |
|---|---|---|
| ``calls`` | mean over users of the share of requests that ask the cloud, times requests per day | 1 for a plan that uses the link |
| ``p95_ms`` | the quantile .95 of realised latency over requests | predicted latency |
| ``exposure`` | mean exposure of a request | exposure |

Choices are the argmax, so nothing is sampled, and a quantile is that of the latencies themselves.
"""

import enum
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from cda4rec_jax.array_typing import PlanLogits, PlanMask, PlanValues
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context
from cda4rec_jax.planner.costs import PlanCosts

REQUESTS_PER_DAY = 10.0  # of one user, where nothing else is said: what turns calls per request into calls per day
TOLERANCE = 1e-3  # of the limit: bisection stops when the budget is used up to so much
MAX_STEPS = 60


class Limited(enum.StrEnum):
    """What a budget limits."""

    CALLS = "calls"
    P95_MS = "p95_ms"
    EXPOSURE = "exposure"

    @property
    def unit(self) -> str:
        """Of the limit, in words."""
        units = {"calls": "mean cloud calls per user and day", "p95_ms": "ms at the quantile .95", "exposure": "mean exposure"}
        return units[self]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """At most ``limit`` of it. ``requests_per_day`` is an assumption on users that only calls need.

    Raises:
      UserError: a limit that is negative or not finite, or no requests; a share above 1.
    """

    limited: Limited
    limit: float
    requests_per_day: float = REQUESTS_PER_DAY

    def __post_init__(self):
        if not 0 <= self.limit < float("inf") or not 0 < self.requests_per_day < float("inf"):
            raise UserError(
                f"a budget of {self.limit} {self.limited.unit} at {self.requests_per_day} requests a day: expected a finite limit of at "
                "least 0 and more than 0 requests"
            )
        if self.limited is Limited.EXPOSURE and self.limit > 1:
            raise UserError(f"a budget of exposure={self.limit:g} limits nothing: it is a share of what a history tells, 0 to 1")

    @classmethod
    def parse(cls, text: str, requests_per_day: float = REQUESTS_PER_DAY) -> "Budget":
        """From ``calls=3``, ``p95_ms=250`` or ``exposure=0.2``. Raises UserError where it reads otherwise, or as the class does."""
        name, _, value = text.partition("=")
        try:
            limited, limit = Limited(name), float(value)
        except ValueError as error:
            examples = "calls=3 (a user and day), p95_ms=250 or exposure=0.2"
            raise UserError(f"a budget of {text!r} cannot be read: expected NAME=NUMBER such as {examples}") from error
        return cls(limited=limited, limit=limit, requests_per_day=requests_per_day)

    @property
    def name(self) -> str:
        """As it is parsed."""
        return f"{self.limited}={self.limit:g}"

    def used(self, spent: Float[np.ndarray, "n"]) -> float:
        """How much of it ``n`` requests use, in the unit of the limit, from what each of them spends."""
        if self.limited is Limited.P95_MS:
            return float(np.quantile(spent, 0.95))
        mean = float(np.mean(spent, dtype=np.float64))
        return mean * self.requests_per_day if self.limited is Limited.CALLS else mean


def priced_units(limited: Limited, costs: PlanCosts) -> PlanValues:
    """Units of every plan that a budget's multiplier prices, [b, p]; known before the request."""
    if limited is Limited.P95_MS:
        return costs.latency_ms
    return costs.exposure if limited is Limited.EXPOSURE else (costs.uplink_bytes > 0).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Budgeted:
    """A planner that pays ``multiplier``, in its own logits, for each unit of what is limited."""

    planner: Any  # a Planner
    limited: Limited
    multiplier: float

    def logits(self, context: Context, costs: PlanCosts, mask: PlanMask) -> PlanLogits:
        """Scores [b, p] of the planner less the price; -inf where it or ``mask`` forbids."""
        scores = self.planner.logits(context, costs, mask)
        return jnp.where(mask, scores - self.multiplier * priced_units(self.limited, costs), -jnp.inf)


@dataclass(frozen=True, kw_only=True)
class KnownRequests:
    """``n`` requests with what a planner says of them and what each plan would really spend. NumPy arrays."""

    logits: Float[np.ndarray, "n p"]
    mask: Bool[np.ndarray, "n p"]
    units: Float[np.ndarray, "n p"]  # ``priced_units`` of the predicted costs
    spent: Float[np.ndarray, "n p"]  # realised: 1 for a call, ms, or exposure
    last_resort: int  # the plan that is taken where no allowed one has a score, as ``policy.choose`` has it

    def used(self, budget: Budget, multiplier: float) -> float:
        """What the choices under this multiplier use of the budget; at infinity every request takes the fewest units that it can."""
        usable = self.mask & (self.logits > -np.inf)
        if multiplier == float("inf"):
            fewest = np.where(usable, self.units, np.inf).min(axis=1, keepdims=True)
            usable, multiplier = usable & (self.units <= fewest), 0.0
        scores = self.logits.astype(np.float64) - multiplier * self.units.astype(np.float64)
        choices = np.where(usable.any(axis=1), np.where(usable, scores, -np.inf).argmax(axis=1), self.last_resort)
        return budget.used(np.take_along_axis(self.spent, choices[:, None], axis=1)[:, 0])


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The price that keeps a budget, and what it uses on the requests that it was found on."""

    budget: Budget
    multiplier: float  # logits per unit; 0 where the planner keeps the budget anyway
    used: float
    unlimited: float  # what the planner would use without a price
    least: float  # the closest value to 0 that any price reaches


def calibrate(known: KnownRequests, budget: Budget) -> Calibration:
    """The lowest multiplier that keeps the budget on known requests, by bisection.

    Raises:
      UserError: no price keeps it; the message names the closest value that one does.
    """
    unlimited, least = known.used(budget, 0.0), known.used(budget, float("inf"))
    if unlimited <= budget.limit:
        return Calibration(budget=budget, multiplier=0.0, used=unlimited, unlimited=unlimited, least=least)
    if least > budget.limit:
        raise UserError(
            f"no planner of this system keeps a budget of {budget.limit:g} {budget.limited.unit}: these requests need at least "
            f"{least:.4g}. Ask for a little more than that."
        )
    low, high = 0.0, 1.0
    while (used := known.used(budget, high)) > budget.limit:
        low, high = high, 2.0 * high
    for _ in range(MAX_STEPS):
        if used >= (1.0 - TOLERANCE) * budget.limit:
            break
        middle = 0.5 * (low + high)
        found = known.used(budget, middle)
        if found > budget.limit:
            low = middle
        else:
            high, used = middle, found
    return Calibration(budget=budget, multiplier=high, used=used, unlimited=unlimited, least=least)
