"""What ``cda4rec plan`` prints: tables of at most 100 columns, and readable on a terminal of 80."""

from collections.abc import Mapping

from rich.console import Console

from cda4rec_jax.evaluation.plan_diff import PlanDiff, Slice
from cda4rec_jax.evaluation.tables import Table, interval_text, number, print_table
from cda4rec_jax.planner import PlanTerms
from cda4rec_jax.planner.counterfactual import Flip, in_figures
from cda4rec_jax.runtime.recommend.explanation import Explanation
from cda4rec_jax.runtime.replay import Accuracy, PlanChange, Replay

SHOWN_PAIRS = 10
ONE_TABLE = 98  # columns of a console that has room for a plan's terms and costs side by side
_NAMES = {
    "round_trip_ms": "round trip, ms",
    "uplink_kbps": "uplink, kbit/s",
    "downlink_kbps": "downlink, kbit/s",
    "free_memory_mb": "free memory, MB",
    "utility_per_ms": "price of 1 ms",
    "utility_per_mj": "price of 1 mJ",
    "utility_per_exposure": "price of exposure",
    "history_length": "history, events",
    "cache_age_events": "cache age, events",
    "cache_level": "kept embedding",
    "tier": "device",
    "link": "link, a typical one",
}


def print_explanation(found: Explanation, console: Console) -> None:
    """The decision, every plan's terms, what is forbidden, and what flips the decision."""
    decision, context = found.decision, found.context
    cache = f"an embedding of {context.cache_level.name.lower()}, {context.cache_age_events:.0f} events old"
    _say(
        console,
        f"{found.user_id}: {found.num_events:,} events; {context.link.label}, {context.tier.name.lower()} device, consent to "
        f"{context.consent.name.lower()}, {cache if context.cache_level else 'no kept embedding'}",
    )
    _say(console, f"chosen: {decision.chosen.name}")
    if decision.runner_up is not None and decision.margin is not None:
        in_logit = "" if decision.tau in (None, 1.0) else f" ({decision.margin / decision.tau:.2f} in the logit)"
        margin = f"{decision.margin:.5f} {'utility' if decision.chosen.is_utility else 'in the sum'}{in_logit}"
        _say(console, f"runner-up: {decision.runner_up.name}, behind by {margin}")
    console.print()
    named = [name.replace("_", " ") for name in decision.chosen.further]
    prices = ["time", "energy", "exposure", *decision.chosen.own] if decision.chosen.prices_count else []
    terms = ["plan", "quality", *prices, *named, "utility" if decision.chosen.is_utility else "sum"]
    costs = ["plan", "ms", "mJ", "exposed", "up B"]
    title = f"Allowed plans, costs of {found.planned_for}"
    rows = [(_terms(plan), _costs(plan)) for plan in found.ranked]
    if console.width >= ONE_TABLE:
        whole = [[*left, *right[1:]] for left, right in rows]
        print_table(console, Table(title=title, columns=[*terms, *costs[1:]], rows=whole))
    else:  # names of plans would be cut to pieces
        print_table(console, Table(title=title, columns=terms, rows=[left for left, _ in rows]))
        print_table(console, Table(title="What they cost", columns=costs, rows=[right for _, right in rows]))
    if found.forbidden:
        by_rule: dict[str, list[str]] = {}
        for plan, rules in found.forbidden.items():
            by_rule.setdefault(" + ".join(rules), []).append(plan)
        _say(console, "Forbidden", "bold")
        for rules, plans in by_rule.items():
            _say(console, f"  by {rules} ({len(plans)}): {', '.join(plans)}")
        console.print()
    flips = [flip for flip in found.flips if flip.to is not None]
    rows = [
        [_NAMES.get(flip.axis, flip.axis), _value(flip.now), _value(flip.to), _factor(flip), _plan(flip, found.plans)]
        for flip in flips
    ]
    if rows:
        columns = ["if this differed", "now", "nearest flip", "change", "then"]
        print_table(console, Table(title="The smallest change that flips the decision", columns=columns, rows=rows))
    for flip in found.flips:
        if flip.to is None:
            _say(
                console, f"Another value of {_NAMES.get(flip.axis, flip.axis)} alone never changes the plan (tried {flip.tried})."
            )


def _terms(terms: PlanTerms) -> list[str]:
    prices = (terms.time, terms.energy, terms.exposure, *terms.own.values()) if terms.prices_count else ()
    parts = (terms.quality, *prices, *terms.further.values(), terms.total)
    return [terms.name, *("-" if part is None else f"{part:.4f}" for part in parts)]


def _costs(terms: PlanTerms) -> list[str]:
    costs = [f"{terms.latency_ms:.0f}", f"{terms.energy_mj:.0f}", f"{terms.exposure_share:.0%}", f"{terms.uplink_bytes:,.0f}"]
    return [terms.name, *costs]


def _value(value: float | str | None) -> str:
    return in_figures(value, 4) if isinstance(value, float) else str(value)


def _factor(flip: Flip) -> str:
    if flip.ratio is None:
        return f"{flip.distance:.0f} step{'s' if flip.distance > 1 else ''}"
    return f"x {in_figures(flip.ratio, 3)}" if flip.ratio >= 1 else f"/ {in_figures(1 / flip.ratio, 3)}"


def _plan(flip: Flip, plans: tuple[str, ...]) -> str:
    return "" if flip.plan_index is None else plans[flip.plan_index]


def print_replay(found: Replay, console: Console) -> None:
    """Agreement, where plans differ, prediction errors, and flags."""
    _say(
        console,
        f"{found.num_traces:,} traces of {found.num_users:,} users; {found.num_same_run:,} of them by this very run "
        f"({found.run.weights[:12]}), {found.num_asked_for:,} with a plan that was asked for (not compared)",
    )
    if found.num_compared:
        _say(console, f"equal plans: {found.num_equal:,} of {found.num_compared:,} ({found.num_equal / found.num_compared:.1%})")
    if found.gain is not None:
        _say(
            console, f"expected utility, plan now minus stored plan, by this run's quality and costs: {interval_text(found.gain)}"
        )
    rules = f" ({', '.join(f'{rule} {count}' for rule, count in found.forbidden.items())})" if found.forbidden else ""
    _say(console, f"stored plans that are forbidden now: {found.num_forbidden:,}{rules}")
    console.print()
    if found.changes:
        rows = [_change(change) for change in found.changes[:SHOWN_PAIRS]]
        title = f"Where plans differ{_left(len(found.changes))}"
        columns = ["stored plan", "plan now", "requests", "forbidden now", "utility"]
        print_table(console, Table(title=title, columns=columns, rows=rows))
    times = [*([found.latency] if found.latency else []), *found.subtasks]
    if times:
        rows = [_error(time) for time in times]
        columns = ["requests that ran as planned", "count", "median error"]
        print_table(console, Table(title="Predicted against measured time, |error| / measured", columns=columns, rows=rows))
    _say(console, f"requests that ended with another plan: {found.num_failed:,}")
    flags = ", ".join(f"{flag} {count:,}" for flag, count in found.flags.items())
    _say(console, f"flags: {flags or 'none'}")


def _change(change: PlanChange) -> list[str]:
    gained = "-" if change.utility is None else f"{change.utility:+.4f}"
    return [change.before, change.now, f"{change.count:,}", f"{change.forbidden:,}", gained]


def _error(accuracy: Accuracy) -> list[str]:
    return [accuracy.name, f"{accuracy.count:,}", f"{accuracy.median_absolute_percentage_error:.1%}"]


def _left(count: int) -> str:
    return f" ({count - SHOWN_PAIRS} more in the JSON)" if count > SHOWN_PAIRS else ""


def print_diff(found: PlanDiff, console: Console) -> None:
    """Agreement, confusion, and what the plans and the runs earn."""
    _say(console, f"A: {found.run_a}\nB: {found.run_b}")
    requests = f"{found.num_requests:,} requests of {found.num_users:,} users of {found.dataset}, contexts v1 of test events"
    _say(console, f"{requests}; equal plans: {found.all.agreement:.1%}")
    _say(console, f"Both at the prices of run A ({_scales(found.price_scales)}).")
    if found.price_scales != found.price_scales_b:
        _say(console, f"Run B was trained with other prices ({_scales(found.price_scales_b)}).")
    console.print()
    rows = [
        [
            f"agents of {agents.upper()} answer",
            *(number(found.utility[f"{plans} plans, {agents} agents"], 4) for plans in "ab"),
            interval_text(found.plans_b_minus_a[f"{agents} agents"]),
        ]
        for agents in "ab"
    ]
    columns = ["mean realised utility", "plans of A", "plans of B", "B - A [95%]"]
    print_table(console, Table(title="What the plans earn", columns=columns, rows=rows))
    rows = [_slice(part) for part in (found.all, *found.slices)]
    columns = ["requests", "count", "equal plans", "run B - run A [95%]"]
    print_table(console, Table(title="Whole runs: own plans, own agents", columns=columns, rows=rows))
    families = list(found.families)
    rows = [[family, *(f"{found.families[family][other]:,}" for other in families)] for family in families]
    title = "Requests by family of plan: A in rows, B in columns"
    print_table(console, Table(title=title, columns=["A \\ B", *families], rows=rows))
    if found.pairs:
        rows = [[pair.plan_a, pair.plan_b, f"{pair.count:,}"] for pair in found.pairs[:SHOWN_PAIRS]]
        title = f"Where plans differ{_left(len(found.pairs))}"
        print_table(console, Table(title=title, columns=["plan of A", "plan of B", "requests"], rows=rows))


def _slice(part: Slice) -> list[str]:
    return [part.name, f"{part.num_requests:,}", f"{part.agreement:.1%}", interval_text(part.gain)]


def _scales(scales: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scales.items())


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, markup=False, highlight=False, style=style)
