"""What a user is told with a slate: the plan and its reasons, expected against actual time, and what left the device."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console

from cda4rec_jax.messages import EgressLevel, Plan
from cda4rec_jax.planner import PlanTerms
from cda4rec_jax.runtime.recommend.planning import LINK_NAMES, Choice, Situation
from cda4rec_jax.runtime.recommend.waterfall import Stage


@dataclass(frozen=True, kw_only=True)
class SlateItem:
    """One recommended item."""

    rank: int
    item_id: str
    title: str
    score: float


@dataclass(frozen=True, kw_only=True)
class ReleasedField:
    """One field of what left the device: what it tells, and the lowest level at which it may leave."""

    name: str
    tells: str
    payload_bytes: int
    level: EgressLevel


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A slate, and everything about how it came to be.

    Attributes:
        user_id, num_events, recent_titles: whose slate it is: number of events, and the titles of the newest.
        k, items: length that was asked for, and the items, best first; fewer where fewer candidates were left.
        situation: link, device and consent.
        cache_level, cache_age_events: of the embedding that the device kept; NOTHING where it kept none.
        choice: the plan with the terms of its logit, against those of the runner-up.
        plan, executed_plan: they differ where something went wrong on the way.
        planned_for: name of the cost profile that the choice was made with.
        stages: expected and actual times: compute as measured on this machine, transfers from the link model.
        latency_ms, predicted_ms: of the whole request, from the same sources.
        real_delay: the link's time was waited for; otherwise it was computed.
        released: the fields that left, from the ledger, and the frame around them.
        uplink_bytes, downlink_bytes: on the wire.
        flags: of the trace.
    """

    user_id: str
    num_events: int
    recent_titles: tuple[str, ...]
    k: int
    items: tuple[SlateItem, ...]
    situation: Situation
    cache_level: EgressLevel
    cache_age_events: int
    choice: Choice
    plan: Plan
    executed_plan: Plan
    planned_for: str
    stages: tuple[Stage, ...]
    latency_ms: float
    predicted_ms: float
    real_delay: bool
    released: tuple[ReleasedField, ...]
    uplink_bytes: int
    downlink_bytes: int
    flags: tuple[str, ...]

    def to_json(self) -> str:
        """The same as one JSON object: indented text, enums by name, units in the names."""
        decision = self.choice.decision
        value = {
            "user": {"id": self.user_id, "num_events": self.num_events, "recent_titles": self.recent_titles},
            "k": self.k,
            "slate": [dataclasses.asdict(item) for item in self.items],
            "situation": {
                "link": LINK_NAMES[self.situation.link],
                "device": self.situation.tier.name.lower(),
                "consent": self.situation.consent.name.lower(),
                "cache_level": self.cache_level.name.lower(),
                "cache_age_events": self.cache_age_events,
            },
            "plan": {
                "name": self.plan.name,
                "executed": self.executed_plan.name,
                "asked_for": self.choice.asked_for,
                "chosen_with_costs_of": self.planned_for,
                "chosen": _terms(decision.chosen),
                "runner_up": None if decision.runner_up is None else _terms(decision.runner_up),
                "margin": decision.margin,
                "utility_margin": decision.utility_margin,
                "tau": decision.tau,
            },
            "time": {
                "latency_ms": self.latency_ms,
                "expected_ms": self.predicted_ms,
                "compute_times_are": "measured on this machine",
                "link_times_are": "modelled, and waited for" if self.real_delay else "modelled, and added",
                "stages": [_times(stage) for stage in self.stages],
            },
            "uplink": {
                "payload_bytes": self.uplink_bytes,
                "fields": [{**dataclasses.asdict(field), "level": field.level.name.lower()} for field in self.released],
            },
            "downlink": {"payload_bytes": self.downlink_bytes},
            "flags": self.flags,
        }
        return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()

    def print(self, console: Console) -> None:
        """Print for a person; 80 columns are enough."""
        from cda4rec_jax.runtime.recommend.report import render

        for part in render(self, console.width):
            console.print(part)


def _terms(terms: PlanTerms) -> dict[str, Any]:
    return {**dataclasses.asdict(terms), "utility": terms.utility, "total": terms.total}


def _times(stage: Stage) -> dict[str, Any]:
    value: dict[str, Any] = {"name": stage.name, "where": stage.where}
    for kind, interval in (("expected", stage.expected), ("actual", stage.actual)):
        value[f"{kind}_start_ms"] = None if interval is None else interval[0]
        value[f"{kind}_ms"] = None if interval is None else interval[1] - interval[0]
    return value
