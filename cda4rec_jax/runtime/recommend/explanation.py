"""Why one request got its plan: every plan's terms, the rule that forbids each other plan, and what would change the decision."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Int

from cda4rec_jax.array_typing import Array
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context, EgressLevel, Link
from cda4rec_jax.planner import ContextConfig, Decision, PlanTerms, allowed, ranked_terms
from cda4rec_jax.planner.counterfactual import Flip, context_axes, forbidding_rules, nearest_flips
from cda4rec_jax.runtime.recommend.planning import Situation, choose, score_plans
from cda4rec_jax.runtime.recommend.recommender import Recommender
from cda4rec_jax.runtime.traces import StoredContext, stored_context

_OF_THE_LINK = ("round_trip_ms", "uplink_kbps", "downlink_kbps")
_AMOUNTS = ("free_memory_mb", *_OF_THE_LINK)
_PRICES = {"price_of_time": "utility_per_ms", "price_of_energy": "utility_per_mj", "price_of_exposure": "utility_per_exposure"}


@dataclass(frozen=True, kw_only=True)
class Departures:
    """How a request departs from what is typical of its situation; None leaves a field as it is.

    Attributes:
        cache_age_events: events since the kept embedding was made; 0: there is none.
        cache_level: what it was made from.
        free_memory_mb, round_trip_ms, uplink_kbps, downlink_kbps: of device and link.
        price_of_time, price_of_energy, price_of_exposure: times the typical price.

    Raises:
        UserError: a number is negative or not finite.
    """

    cache_age_events: int | None = None
    cache_level: EgressLevel | None = None
    free_memory_mb: float | None = None
    round_trip_ms: float | None = None
    uplink_kbps: float | None = None
    downlink_kbps: float | None = None
    price_of_time: float = 1.0
    price_of_energy: float = 1.0
    price_of_exposure: float = 1.0

    def __post_init__(self) -> None:
        wrong = [f"{name} {value}" for name, value in self._given().items() if not 0 <= value < float("inf")]
        if wrong:
            raise UserError(f"expected finite numbers of 0 or more, got {', '.join(wrong)}")

    def _given(self) -> dict[str, int | float]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def applied(self, context: Context, max_cache_age: int) -> Context:
        """The request (b = 1) as it departs.

        Raises:
            UserError: the history is too short for the cache, it has an age without a level or a level without an age, or the device
                is offline and the speed of its link is named.
        """
        given = self._given()
        if int(context.link[0]) == Link.OFFLINE and (named := [name for name in _OF_THE_LINK if name in given]):
            raise UserError(f"an offline device has no {', '.join(named)}: leave that out, or name another link than offline")
        oldest = max(0, min(max_cache_age, int(context.history_length[0]) - 1))
        age = int(context.cache_age_events[0]) if self.cache_age_events is None else self.cache_age_events
        level = EgressLevel(int(context.cache_level[0])) if self.cache_level is None else self.cache_level
        if age > oldest:
            raise UserError(f"a kept embedding of this user is at most {oldest} events old, not {age}; 0 stands for none")
        if not (age and level):
            if self.cache_age_events or self.cache_level:
                raise UserError(
                    f"there is no kept embedding of level {level.name.lower()} and age {age}: name a level above nothing (it is that of "
                    f"the consent if not given) and an age from 1 to {oldest} events, or neither"
                )
            age, level = 0, EgressLevel.NOTHING
        changes: dict[str, Any] = {
            "cache_age_events": jnp.full_like(context.cache_age_events, age),
            "cache_level": jnp.full_like(context.cache_level, int(level)),
        }
        changes |= {name: jnp.full_like(getattr(context, name), given[name]) for name in _AMOUNTS if name in given}
        changes |= {field: getattr(context, field) * np.float32(given[name]) for name, field in _PRICES.items()}
        return replace(context, **changes)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why one request got its plan.

    Attributes:
        user_id, num_events: whose request.
        context: all that the planner saw.
        planned_for: name of the cost profile that the planner was trained with.
        decision: the chosen plan against the runner-up.
        ranked: terms of every allowed plan, best first.
        forbidden: the rules that forbid each other plan, by its name.
        flips: for each respect in which the context could differ, the nearest change that makes another plan win.
        plans: names of the plans, to which the indices of ``flips`` belong.
    """

    user_id: str
    num_events: int
    context: StoredContext
    planned_for: str
    decision: Decision
    ranked: tuple[PlanTerms, ...]
    forbidden: dict[str, tuple[str, ...]]
    flips: tuple[Flip, ...]
    plans: tuple[str, ...]

    def to_json(self) -> str:
        """The same as one JSON object: enums of the context by name, units in the names."""
        context = msgspec.structs.asdict(self.context)
        value = {
            "user": {"id": self.user_id, "num_events": self.num_events},
            "context": {name: getattr(each, "name", each) for name, each in context.items()},
            "chosen_with_costs_of": self.planned_for,
            "chosen": self.decision.chosen.name,
            "runner_up": None if self.decision.runner_up is None else self.decision.runner_up.name,
            "margin": self.decision.margin,
            "utility_margin": self.decision.utility_margin,
            "tau": self.decision.tau,
            "ranked": [{**asdict(terms), "utility": terms.utility, "total": terms.total} for terms in self.ranked],
            "forbidden": self.forbidden,
            "flips": [_flip(flip, self.plans) for flip in self.flips],
        }
        return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _flip(flip: Flip, plans: tuple[str, ...]) -> dict[str, Any]:
    """JSON has no infinity: a ratio from 0 and the distance of no flip are null."""
    value = {name: None if each in (float("inf"), float("-inf")) else each for name, each in asdict(flip).items()}
    return {**value, "plan": None if flip.plan_index is None else plans[flip.plan_index]}


def explain_request(recommender: Recommender, user_id: str, situation: Situation, departures: Departures) -> Explanation:
    """Decide one request of a user, and say why; nothing is executed.

    Raises:
        UserError: unknown user, or departures that cannot be.
    """
    planner = recommender.planner
    history = recommender.history(user_id)
    context = departures.applied(planner.plan(history, situation).context, planner.max_cache_age)
    planned = planner.of_context(context)

    def decide(contexts: Context) -> Int[Array, "b"]:
        return score_plans(planner.policy, planner.trained_for, contexts).choices()

    scales, space = planner.trained_for.scales, planner.trained_for.space
    axes = context_axes(planned.context, scales, ContextConfig(), max_cache_age=planner.max_cache_age)
    rules = {
        rule: np.asarray(found)[0] for rule, found in forbidding_rules(planned.context, partial(allowed, space=space)).items()
    }
    return Explanation(
        user_id=user_id,
        num_events=int(history.total_lengths[0]),
        context=stored_context(planned.context),
        planned_for=planner.trained_for.profile.name,
        decision=choose(planned, None).decision,
        ranked=ranked_terms(
            planned.logits,
            planned.quality,
            planned.costs,
            planned.context,
            further=planned.further,
            prices_count=planned.prices_count,
        ),
        forbidden={
            plan.name: tuple(rule for rule, found in rules.items() if found[index])
            for index, plan in enumerate(space.plans)
            if not planned.mask[0, index]
        },
        flips=nearest_flips(decide, planned.context, *axes),
        plans=space.names,
    )
