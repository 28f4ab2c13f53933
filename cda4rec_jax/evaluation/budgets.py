"""Budgets of a planner: calibrated on validation requests, and what they use of others."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.array_typing import PlanLogits, PlanValues
from cda4rec_jax.evaluation.answers import BLOCK_USERS, Logits, happened_latency_ms
from cda4rec_jax.pipeline.decisions import Requests
from cda4rec_jax.pipeline.full_ranking import in_batches
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.planner.budgets import Budget, Calibration, KnownRequests, Limited, calibrate, priced_units


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


def known_requests(records: PlanRecords, logits: Logits, limited: Limited) -> KnownRequests:
    """All requests of ``records`` in all their contexts, as a planner with these ``logits`` scores them."""
    draws, num_users = records.requests.failed.shape
    blocks = []
    for index in in_batches(num_users, min(BLOCK_USERS, num_users)):
        size = len(np.unique(index))
        requests = jax.tree.map(lambda leaf, index=index: leaf[:, index].reshape(-1, *leaf.shape[2:]), records.requests)
        found = _scored(requests, logits=logits, limited=limited)
        blocks.append([np.asarray(leaf).reshape(draws, len(index), -1)[:, :size] for leaf in found])
    scores, units, spent = (np.concatenate(parts, axis=1).reshape(draws * num_users, -1) for parts in zip(*blocks, strict=True))
    mask = np.asarray(records.requests.mask).reshape(draws * num_users, -1)
    return KnownRequests(logits=scores, mask=mask, units=units, spent=spent)


@partial(jax.jit, static_argnames=("logits", "limited"))
def _scored(requests: Requests, *, logits: Logits, limited: Limited) -> tuple[PlanLogits, PlanValues, PlanValues]:
    """Logits, priced units, and what is really spent: latency as ``realised_utility`` counts it, where a failed link costs a timeout."""
    units = jnp.asarray(priced_units(limited, requests.predicted))
    spent = happened_latency_ms(requests) if limited is Limited.P95_MS else priced_units(limited, requests.realised)
    return logits(requests.context, requests.predicted, requests.mask), units, jnp.broadcast_to(spent, units.shape)


def calibrated(validation: PlanRecords, logits: Logits, budget: Budget) -> Calibration:
    """The price of ``budget`` on validation requests. Raises UserError where no price keeps it."""
    return calibrate(known_requests(validation, logits, budget.limited), budget)


def budget_row(calibration: Calibration, records: PlanRecords, logits: Logits) -> BudgetRow:
    """What the calibrated planner uses of its budget on the requests of ``records``."""
    budget = calibration.budget
    known = known_requests(records, logits, budget.limited)
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
