"""What would have to be different for another plan to win, and which rule forbids a plan.

Both ask the planner itself, over contexts that differ from the request's in one respect: no rule and no cost is stated twice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.array_typing import Array, PlanMask
from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, Link
from cda4rec_jax.planner.contexts import NUM_PRICES, ContextConfig
from cda4rec_jax.planner.utility import WeightScales

Decide = Callable[[Context], Int[Array, "b"]]  # the plans that a planner takes, from contexts alone; traceable
GRID_POINTS = 512  # of each continuous field, log-spaced over its range
BISECTIONS = 24  # of one step of the grid: more than float32 can tell apart
MAX_HISTORY_EVENTS = 500  # history lengths that are tried
PRICE_RANGE = 1024.0  # a price is tried from 1/1024 to 1024 times the typical one


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """A float field of the context that is tried from ``low`` to ``high`` (both above 0)."""

    field: str
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One other state of the request, which is tried as it is.

    Attributes:
        label: the state in words.
        changes: values of the context's fields in that state.
        distance: from the present state; in steps, or |log2(value / now)| where the axis is a number.
        ratio: value / now where the axis is a number.
    """

    label: str
    changes: Mapping[str, float]
    distance: float
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Enumerated:
    """A respect in which a request can be in finitely many states."""

    name: str
    now: str
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """The nearest value of one axis at which another plan wins; ``to`` and ``plan_index`` are None where no value in range does it.

    Attributes:
        axis: name of the field, or of the respect.
        now, to: values; numbers for continuous fields, words for the others.
        plan_index: the plan that wins there.
        ratio: to / now, for numbers; infinite from 0.
        distance: |log2(ratio)| for numbers, steps for the others; infinite where nothing flips.
        tried: the values that were tried, in words.
    """

    axis: str
    now: float | str
    to: float | str | None
    plan_index: int | None
    ratio: float | None
    distance: float
    tried: str


def in_figures(value: float, digits: int) -> str:
    """A number of so many digits; large ones without an exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.{digits}g}"


def nearest_flips(
    decide: Decide, context: Context, continuous: Sequence[Continuous], enumerated: Sequence[Enumerated]
) -> tuple[Flip, ...]:
    """For each axis alone, the nearest change that makes another plan win than ``decide(context)``.

    Continuous fields: the decisions on a log-spaced grid bracket the nearest change in either direction, and bisection on
    the log of the value narrows both brackets at once to float32's precision. A region narrower than a step of the grid
    ((high / low)^(1/511), 1-3%) that lies between two points of the grid is not seen. A field that is below ``low`` now, such
    as a price of 0, is tried from ``low`` on. Enumerated axes: every alternative is tried.

    Args:
      decide: plans of a batch of contexts; traced twice, over one grid and over one loop of bisections.
      context: one request (b = 1).
      continuous: fields and their ranges.
      enumerated: respects and their states.

    Returns:
      Numbers by relative size of the change, then the others by steps; at the end the axes along which nothing flips.
    """
    host = {entry.name: np.asarray(getattr(context, entry.name)) for entry in fields(Context)}
    grids = [_grid(axis, float(host[axis.field][0])) for axis in continuous]
    changes = [{axis.field: value} for axis, grid in zip(continuous, grids, strict=True) for value in grid.tolist()]
    changes += [option.changes for axis in enumerated for option in axis.alternatives]
    found = np.asarray(jax.jit(decide)(_changed(host, [{}, *changes])))
    base, found = int(found[0]), found[1:]
    by_axis = np.split(found, np.cumsum([*(len(grid) for grid in grids), *(len(axis.alternatives) for axis in enumerated)])[:-1])
    flips = _continuous_flips(decide, context, continuous, grids, by_axis[: len(grids)], base)
    flips += [_enumerated_flip(axis, plans, base) for axis, plans in zip(enumerated, by_axis[len(grids) :], strict=True)]
    return tuple(sorted(flips, key=lambda flip: (flip.to is None, flip.ratio is None, flip.distance)))


def _grid(axis: Continuous, now: float) -> Float[np.ndarray, "g"]:
    """The axis's values in float32, with ``now`` among them where it is in range."""
    values = np.geomspace(axis.low, axis.high, GRID_POINTS).astype(np.float32)
    inside = [np.float32(now)] if axis.low <= now <= axis.high else []
    return np.unique(np.concatenate([values, np.asarray(inside, np.float32)]))


def _changed(host: Mapping[str, np.ndarray], changes: Sequence[Mapping[str, float]]) -> Context:
    """One row for each of the changes to the request."""
    columns = {name: np.repeat(value, len(changes)) for name, value in host.items()}
    for row, change in enumerate(changes):
        for name, value in change.items():
            columns[name][row] = value
    return Context(**{name: jnp.asarray(column) for name, column in columns.items()})


def _continuous_flips(
    decide: Decide,
    context: Context,
    axes: Sequence[Continuous],
    grids: Sequence[np.ndarray],
    plans: Sequence[np.ndarray],
    base: int,
) -> list[Flip]:
    brackets = [  # (axis, side that keeps the plan, side that changes it)
        (number, *bracket)
        for number, axis in enumerate(axes)
        for bracket in _brackets(grids[number], plans[number] != base, float(np.asarray(getattr(context, axis.field))[0]))
    ]
    values, winners = np.zeros(0), np.zeros(0, int)
    if brackets:
        names = tuple(axes[number].field for number, _, _ in brackets)
        kept, changed = (jnp.asarray([bracket[side] for bracket in brackets], jnp.float32) for side in (1, 2))
        values, winners = map(np.asarray, jax.jit(lambda a, b: _bisect(decide, context, names, a, b, base))(kept, changed))
    flips = []
    for number, axis in enumerate(axes):
        now = float(np.asarray(getattr(context, axis.field))[0])
        tried = f"{in_figures(axis.low, 3)} to {in_figures(axis.high, 3)}"
        nearest = Flip(axis=axis.field, now=now, to=None, plan_index=None, ratio=None, distance=math.inf, tried=tried)
        for (owner, _, _), value, winner in zip(brackets, values.tolist(), winners.tolist(), strict=True):
            ratio = value / now if now > 0 else math.inf
            distance = abs(math.log2(ratio))
            if owner == number and (nearest.to is None or distance < nearest.distance):
                nearest = replace(nearest, to=value, plan_index=winner, ratio=ratio, distance=distance)
        flips.append(nearest)
    return flips


def _brackets(grid: np.ndarray, differs: Bool[np.ndarray, "g"], now: float) -> list[tuple[float, float]]:
    """(last value that keeps the plan, first that changes it), above ``now`` and below it, where there is one."""
    found = []
    for places in (np.flatnonzero(grid >= np.float32(now)), np.flatnonzero(grid <= np.float32(now))[::-1]):
        changed = np.flatnonzero(differs[places])
        if len(changed):
            first = int(changed[0])
            kept = grid[places[first - 1]] if first else grid[places[0]]
            found.append((float(kept), float(grid[places[first]])))
    return found


def _bisect(
    decide: Decide,
    context: Context,
    names: tuple[str, ...],
    kept: Float[Array, "s"],
    changed: Float[Array, "s"],
    base: int,
) -> tuple[Float[Array, "s"], Int[Array, "s"]]:
    """Narrow each bracket of field ``names[s]``: the value nearest to ``kept`` that is known to change the plan, and the plan."""

    def plans(values: Float[Array, "s"]) -> Int[Array, "s"]:
        rows = {entry.name: jnp.broadcast_to(getattr(context, entry.name), values.shape) for entry in fields(Context)}
        for name in set(names):
            rows[name] = jnp.where(np.asarray([name == other for other in names]), values, rows[name])
        return decide(Context(**rows))

    def halve(_: Array, sides: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, changed = sides
        middle = jnp.exp(0.5 * (jnp.log(kept) + jnp.log(changed)))
        differs = plans(middle) != base
        return jnp.where(differs, kept, middle), jnp.where(differs, middle, changed)

    _, changed = jax.lax.fori_loop(0, BISECTIONS, halve, (kept, changed))
    return changed, plans(changed)


def _enumerated_flip(axis: Enumerated, plans: Int[np.ndarray, "n"], base: int) -> Flip:
    options = axis.alternatives
    tried = (
        ", ".join(option.label for option in options)
        if len(options) <= len(Link)
        else f"{options[0].label} to {options[-1].label}"
    )
    flips = [(option, int(plan)) for option, plan in zip(options, plans, strict=True) if plan != base]
    if not flips:
        return Flip(axis=axis.name, now=axis.now, to=None, plan_index=None, ratio=None, distance=math.inf, tried=tried)
    nearest, plan = min(flips, key=lambda flip: flip[0].distance)
    return Flip(
        axis=axis.name,
        now=axis.now,
        to=nearest.label,
        plan_index=plan,
        ratio=nearest.ratio,
        distance=nearest.distance,
        tried=tried,
    )


def context_axes(
    context: Context, scales: WeightScales, config: ContextConfig, *, max_cache_age: int
) -> tuple[tuple[Continuous, ...], tuple[Enumerated, ...]]:
    """What can be different about one request (b = 1), for ``nearest_flips``.

    Ranges hold every value that context distribution v1 draws, and more. Another link comes with its typical round trip and
    bandwidths; without a link there are none to vary. A cache is dropped, or made at a level up to consent (at its present age, or at the
    mean age if there is none); its age stays below the length of the history. Nothing else changes with the length of the history.
    """
    level, age = int(context.cache_level[0]), int(context.cache_age_events[0])
    length, consent = int(context.history_length[0]), int(context.consent[0])
    share = float(scales.quality_gap) / NUM_PRICES
    typical = {
        "utility_per_ms": share / float(scales.latency_gap_ms),
        "utility_per_mj": share / float(scales.energy_gap_mj),
        "utility_per_exposure": share / float(scales.exposure_gap),
    }
    continuous = [Continuous(field=name, low=price / PRICE_RANGE, high=price * PRICE_RANGE) for name, price in typical.items()]
    continuous.append(Continuous(field="free_memory_mb", low=16.0, high=16_384.0))
    if int(context.link[0]) != Link.OFFLINE:
        continuous.append(Continuous(field="round_trip_ms", low=1.0, high=4_000.0))
        continuous += [Continuous(field=name, low=10.0, high=1e6) for name in ("uplink_kbps", "downlink_kbps")]
    oldest = min(max_cache_age, length - 1)
    new_age = age or min(round(config.mean_cache_age_events), oldest)
    levels = range(1 + (min(consent, len(EgressLevel) - 1) if new_age else 0))
    caches = [(EgressLevel(other), {"cache_level": other, "cache_age_events": new_age if other else 0}) for other in levels]
    links = [
        (
            link,
            {
                "link": link,
                "round_trip_ms": config.round_trip_ms[link],
                "uplink_kbps": config.uplink_kbps[link],
                "downlink_kbps": config.downlink_kbps[link],
            },
        )
        for link in Link
    ]
    enumerated = [
        _states("link", Link(int(context.link[0])), links),
        _states("tier", DeviceTier(int(context.tier[0])), [(tier, {"tier": tier}) for tier in DeviceTier]),
        _states("consent", EgressLevel(consent), [(other, {"consent": other}) for other in EgressLevel]),
        _states("cache_level", EgressLevel(level), caches),
        _counts("history_length", length, range(age + 1, MAX_HISTORY_EVENTS + 1)),
    ]
    if level:
        enumerated.append(_counts("cache_age_events", age, range(1, oldest + 1)))
    return tuple(continuous), tuple(axis for axis in enumerated if axis.alternatives)


def _states(name: str, now: Link | DeviceTier | EgressLevel, states: Sequence[tuple]) -> Enumerated:
    alternatives = [
        Alternative(
            label=_label(state),
            changes={name: float(value) for name, value in changes.items()},
            distance=float(abs(int(state) - int(now))),
        )
        for state, changes in states
        if state != now
    ]
    return Enumerated(name=name, now=_label(now), alternatives=tuple(alternatives))


def _label(state: Link | DeviceTier | EgressLevel) -> str:
    return state.label if isinstance(state, Link) else state.name.lower()


def _counts(field: str, now: int, values: range) -> Enumerated:
    alternatives = [
        Alternative(label=str(value), changes={field: float(value)}, distance=abs(math.log2(value / now)), ratio=value / now)
        for value in values
        if value != now
    ]
    return Enumerated(name=field, now=str(now), alternatives=tuple(alternatives))


RULES = ("consent", "no kept embedding", "link down", "memory")
OTHER_RULE = "another rule"
AMPLE_MEMORY_MB = 1e9


def forbidding_rules(context: Context, allowed: Callable[[Context], PlanMask]) -> dict[str, Bool[Array, "b p"]]:
    """Which rules forbid which plans, by name; several may forbid one plan, and every forbidden plan has at least one.

    A rule forbids a plan that is allowed where no rule bites, and is not where that rule alone does: full consent, a kept embedding,
    WiFi and ample memory stand in for what the rules read. ``another rule`` holds what none of them explains.
    """
    field = dict(zip(RULES, ("consent", "cache_level", "link", "free_memory_mb"), strict=True))
    ample = {
        "consent": jnp.full_like(context.consent, int(EgressLevel.FULL)),
        "cache_level": jnp.maximum(context.cache_level, int(EgressLevel.PROFILE)),
        "link": jnp.full_like(context.link, int(Link.WIFI)),
        "free_memory_mb": jnp.full_like(context.free_memory_mb, AMPLE_MEMORY_MB),
    }
    possible, unexplained = allowed(replace(context, **ample)), ~allowed(context)
    found = {}
    for rule in RULES:
        own = {name: value for name, value in ample.items() if name != field[rule]}
        found[rule] = possible & ~allowed(replace(context, **own))
        unexplained &= ~found[rule]
    return {**found, OTHER_RULE: unexplained}
