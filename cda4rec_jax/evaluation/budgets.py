"""Budgets of a planner: what it is to be calibrated on, and what a calibrated planner uses of other requests.

What a request spends depends on its context and not on the models' answers. So budgets are taken over many contexts of each event, each
with a cache and a consent of its own: those of ``PlanRecords`` share them, and a mean over them is as uncertain as one over few users.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.array_typing import PlanLogits, PlanMask, PlanValues
from cda4rec_jax.evaluation.answers import Logits, happened_latency_ms
from cda4rec_jax.pipeline.decisions import Requests
from cda4rec_jax.planner.budgets import Calibration, KnownRequests, Limited, priced_units

BUDGET_DRAWS = 16  # contexts of each event


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """A budget, the price that was calibrated on validation requests, and what it uses there and on the split of the report."""

    name: str  # such as calls=3
    unit: str
    limit: float
    requests_per_day: float
    multiplier: float  # in logits of the planner per unit; 0 where it keeps the budget anyway
    unlimited: float  # what the planner uses without a price, on validation
    on_validation: float
    on_split: float

    @property
    def relative_error(self) -> float:
        """What the split uses above (or, at a price, below) the limit, relative to it; 0 within the limit without a price."""
        if self.multiplier == 0 and self.on_split <= self.limit:
            return 0.0
        return self.on_split / max(self.limit, 1e-9) - 1.0

    def line(self) -> str:
        """In words."""
        return (
            f"{self.name} ({self.unit}): {self.unlimited:.4g} without, {self.on_validation:.4g} on validation, {self.on_split:.4g} on "
            f"this split ({self.relative_error:+.1%}); price {self.multiplier:.4g} logits"
        )


def known_requests(requests: Iterable[Requests], logits: Logits, limited: Limited) -> KnownRequests:
    """Batches of requests, as a planner with these ``logits`` scores them, in one."""
    found, last_resort = [], 0
    for batch in requests:
        found.append(_scored(batch, logits=logits, limited=limited))
        last_resort = batch.predicted.space.last_resort  # every batch has the same plans
    scores, mask, units, spent = (np.concatenate([np.asarray(leaf) for leaf in leaves]) for leaves in zip(*found, strict=True))
    return KnownRequests(logits=scores, mask=mask, units=units, spent=spent, last_resort=last_resort)


@partial(jax.jit, static_argnames=("logits", "limited"))
def _scored(requests: Requests, *, logits: Logits, limited: Limited) -> tuple[PlanLogits, PlanMask, PlanValues, PlanValues]:
    """Logits, mask, priced units, and what is really spent: latency as ``realised_utility`` has it, where a failed link costs a timeout."""
    units = jnp.asarray(priced_units(limited, requests.predicted))
    spent = happened_latency_ms(requests) if limited is Limited.P95_MS else priced_units(limited, requests.realised)
    scores = logits(requests.context, requests.predicted, requests.mask)
    return scores, requests.mask, units, jnp.broadcast_to(spent, units.shape)


def budget_row(calibration: Calibration, known: KnownRequests) -> BudgetRow:
    """What the calibrated planner uses of its budget in other requests."""
    budget = calibration.budget
    return BudgetRow(
        name=budget.name,
        unit=budget.limited.unit,
        limit=budget.limit,
        requests_per_day=budget.requests_per_day,
        multiplier=calibration.multiplier,
        unlimited=calibration.unlimited,
        on_validation=calibration.used,
        on_split=known.used(budget, calibration.multiplier),
    )
