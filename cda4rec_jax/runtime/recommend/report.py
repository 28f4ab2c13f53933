"""A recommendation as a person reads it: slate, plan with reasons, waterfall of times, and what left the device."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cda4rec_jax.messages import EgressLevel, Placement, Plan
from cda4rec_jax.planner import Decision, PlanTerms
from cda4rec_jax.runtime.recommend.planning import LINK_NAMES
from cda4rec_jax.runtime.recommend.recommendation import Recommendation
from cda4rec_jax.runtime.recommend.waterfall import Interval

BAR_CELLS, LEAST_CELLS = 17, 3  # of a bar, where there is room for more or less
ROOMY = 84  # columns of a console that has room for two plans and their terms
_BESIDE_BARS = 38  # columns of the waterfall that are no bar
_RELEASED = {
    EgressLevel.PROFILE: "a profile (top categories and a length bucket)",
    EgressLevel.RECENT: "a profile and the last 10 item ids",
    EgressLevel.FULL: "a profile, the newest item ids and the attributes",
}
_STRUCTURED = {
    Placement.DEVICE: "meanwhile the device models the whole private history",
    Placement.CLOUD: "meanwhile the cloud also does the device's modelling",
    Placement.SKIP: "the private history is not modelled",
}
_FLAGS = {
    "link_failed": "the link failed, so the device answered alone",
    "cloud_failed": "the cloud answered with an error, so the device answered alone",
    "egress_denied": "the gate let nothing out, so the device answered alone",
    "cache_missing": "there was no embedding to reuse, so the device answered alone",
    "deadline_hedged": "the cloud would have missed the deadline, so the device answered alone",
    "regret_high": "the plan was expected to be worth much less than the best one that is allowed",
    "context_shift": "link or cloud took much longer than estimated",
    "device_exhausted": "the device computed much longer than expected, or had no memory left",
}
_PRICES = ("time", "energy", "exposure")


def render(found: Recommendation, width: int) -> Iterator[RenderableType]:
    """The parts, top to bottom, for a console of so many columns: bars are shorter on a narrow one, and numbers stay whole."""
    yield Rule(Text(f"Recommendations for {found.user_id}"), style="dim")
    yield _slate(found)
    if len(found.items) < found.k:
        yield Text(
            f"{len(found.items)} of {found.k}: the plan's other candidates were already seen, or it has no more.", "yellow"
        )
    yield Rule("Plan", style="dim")
    yield _plan(found)
    yield Padding(_reasons(found.choice.decision, width), (1, 0))
    yield Text(_summary(found), "dim")
    yield Rule("Time", style="dim")
    yield _waterfall(found, max(LEAST_CELLS, min(BAR_CELLS, (width - _BESIDE_BARS) // 2)))
    yield Text(_sources(found), "dim")
    yield Rule("What left the device", style="dim")
    yield _released(found)
    for flag in found.flags:
        yield Text(f"! {_FLAGS.get(flag, flag)} ({flag})", "yellow")


def _table(*columns: str, right: int = 1) -> Table:
    """A plain table; columns from number ``right`` on are aligned to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number >= right else "left", no_wrap=True, overflow="ellipsis")
    return table


def _slate(found: Recommendation) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", justify="right")
    table.add_column("title", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("item", max_width=20, no_wrap=True, overflow="ellipsis")
    table.add_column("score", justify="right")
    for item in found.items:
        table.add_row(str(item.rank), Text(item.title or item.item_id), Text(item.item_id), f"{item.score:.3f}")
    return table


def _plan(found: Recommendation) -> Text:
    situation, choice = found.situation, found.choice
    cache = "no kept embedding"
    if found.cache_level:
        cache = f"an embedding kept for {found.cache_age_events} events"
    text = Text.assemble(
        (found.plan.name, "bold"),
        f" on {LINK_NAMES[situation.link]}, {situation.tier.name.lower()} device, consent to "
        f"{situation.consent.name.lower()}, {cache}\n",
        in_words(found.plan, found.cache_level),
    )
    if choice.asked_for and choice.asked_for != found.plan.name:
        text.append(f"\nYou asked for {choice.asked_for}, which this situation forbids: this is the first in its repair order.")
    elif choice.asked_for:
        text.append("\nYou asked for this plan.")
    if found.executed_plan != found.plan:
        text.append(f"\nIt ended as {found.executed_plan.name}: {in_words(found.executed_plan, found.cache_level)}", "yellow")
    return text


def in_words(plan: Plan, cache_level: EgressLevel) -> str:
    """What a plan does, as a sentence."""
    if not plan.uses_link:
        scores = "with the scores of the kept embedding" if plan.semantic is Placement.REUSE else "by popularity alone"
        ranked = "the candidates that it keeps and what it finds among the items that it holds"
        return f"Nothing leaves: the device ranks {ranked}, {scores}; {_STRUCTURED[plan.structured]}."
    if plan.semantic is Placement.REUSE:
        asked = f"The device sends back its kept embedding (made from {_RELEASED.get(cache_level, 'nothing')})"
    else:
        asked = f"The device sends {_RELEASED[plan.level]}; the cloud models the user from it"
    ranks = (
        "the cloud ranks"
        if plan.ranking is Placement.CLOUD
        else "the device ranks, with what it finds among the items that it holds"
    )
    return f"{asked} and finds {plan.num_candidates} candidates; {_STRUCTURED[plan.structured]}; {ranks}."


def _reasons(decision: Decision, width: int) -> Table:
    chosen, other = decision.chosen, decision.runner_up
    table = _table("terms of the logit", chosen.name, other.name if other else "(no other plan)", "difference")
    last = "logit" if chosen.quality is None else "total"
    for name in (*_summed(chosen), last):
        row = [_label(chosen, name), _term(chosen, name)]
        row += [_term(other, name), f"{_gap(chosen, other, name):+.4f}"] if other else ["", ""]
        table.add_row(*row, style="bold" if name == last else None)
    for name in () if chosen.prices_count else (*_PRICES, *chosen.own):
        row = [f"{name.replace('_', ' ')}, not counted", _term(chosen, name)]
        table.add_row(*row, *([_term(other, name), ""] if other else ["", ""]), style="dim")
    # On a narrow terminal columns stand closer, then the names of plans fold, and those of terms stay whole.
    table.padding = (0, 2 if width >= ROOMY else 1, 0, 0)
    table.columns[0].min_width = max(len(str(cell)) for cell in table.columns[0].cells)
    for column in table.columns[1:]:
        column.no_wrap, column.overflow = False, "fold"
    return table


def _summed(terms: PlanTerms) -> tuple[str, ...]:
    """Names of what sums to the planner's logit; of what a plan costs where it tells no quality."""
    quality = () if terms.quality is None else ("quality",)
    return (*quality, *((*_PRICES, *terms.own) if terms.prices_count else ()), *terms.further)


def _label(terms: PlanTerms, name: str) -> str:
    known = {
        "quality": "expected quality",
        "total": "utility = their sum" if terms.is_utility else "their sum",
        "logit": "logit, as the planner gives it",
    }
    named = name.replace("_", " ")
    return known.get(name, named if name in terms.further else f"price of {named}")


def _value(terms: PlanTerms, name: str) -> float | None:
    named = {**terms.own, **terms.further}
    return named[name] if name in named else getattr(terms, name)


def _gap(chosen: PlanTerms, other: PlanTerms, name: str) -> float:
    own, others = _value(chosen, name), _value(other, name)
    return 0.0 if own is None or others is None else own - others


def _term(terms: PlanTerms, name: str) -> str:
    cost = {
        "time": f"{terms.latency_ms:6.0f} ms  ",
        "energy": f"{terms.energy_mj:6.0f} mJ  ",
        "exposure": f"{terms.exposure_share:6.0%}     ",
    }.get(name, "")
    counted = terms.prices_count or name not in (*_PRICES, *terms.own)
    value = f"{_value(terms, name):+.4f}"
    return f"{cost}{value}" if counted else cost.strip() or value


def _summary(found: Recommendation) -> str:
    decision = found.choice.decision
    costs = f"Costs are those of the {found.planned_for} profile"
    if decision.chosen.prices_count:
        costs += ", with which the planner was trained"
    chosen, other = decision.chosen, decision.runner_up
    if chosen.quality is None:
        return f"This planner tells no quality, so its logit cannot be taken apart: the prices are what the plan costs. {costs}."
    told = "" if chosen.prices_count else ", and play no part in this planner's choice"
    costs = f"{costs}{told}; quality is learned."
    if other is None:
        return f"No other plan is allowed here. {costs}"
    gaps = {name.replace("_", " "): _gap(chosen, other, name) for name in _summed(chosen)}
    gained = [name for name, gap in gaps.items() if gap > 0]
    paid = [name for name, gap in gaps.items() if gap < 0]
    words = f"Against {other.name} it gains in {_listed(gained)} and pays in {_listed(paid)}"
    margin = chosen.logit - other.logit
    if decision.tau == 1.0:  # a logit in units of quality, where a hundredth is much
        logit = f"{margin:+.4f} in the logit, which is the sum"
    else:
        of_what = "" if decision.tau is None else f" ({'utility' if chosen.is_utility else 'the sum'} / {decision.tau:.4g})"
        logit = f"{margin:+.2f} in the logit{of_what}"
    return f"{words}: {logit}. {costs}"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "nothing"


def _waterfall(found: Recommendation, cells: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for column in ("", "", "expected", "ms", "actual", "ms"):
        table.add_column(column, justify="right" if column == "ms" else "left", no_wrap=True)
    ends = [interval[1] for stage in found.stages for interval in (stage.expected, stage.actual) if interval]
    whole_ms = max([found.latency_ms, found.predicted_ms, *ends])
    for stage in found.stages:
        name = Text(stage.name, "magenta" if stage.where == "link" else "")
        where = Text(stage.where.replace("device_cache", "cache"), "dim")
        expected, actual = (
            (_bar(interval, whole_ms, cells, style), _taken(interval))
            for interval, style in ((stage.expected, "blue"), (stage.actual, "green"))
        )
        table.add_row(name, where, *expected, *actual)
    table.add_row(Text("all", "bold"), "", "", f"{found.predicted_ms:.2f}", "", f"{found.latency_ms:.2f}", style="bold")
    return table


def _bar(interval: Interval | None, whole_ms: float, cells: int, style: str) -> Text:
    if interval is None:
        return Text("")
    start = min(int(cells * interval[0] / whole_ms), cells - 1)
    end = max(start + 1, round(cells * interval[1] / whole_ms))
    return Text(" " * start + "█" * (end - start) + " " * (cells - end), style)


def _taken(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval[1] - interval[0]:.2f}"


def _sources(found: Recommendation) -> str:
    link = "were waited for" if found.real_delay else "are computed, not waited for"
    return (
        "Compute: measured on this machine (expected: its calibration). Link rows: the link model, expected from the estimate, "
        f"actual as drawn; they {link}. In the {found.planned_for} profile the same plan is expected to take "
        f"{found.choice.decision.chosen.latency_ms:.0f} ms."
    )


def _released(found: Recommendation) -> RenderableType:
    if not found.released:
        return Text("Nothing.")
    table = _table("field", "tells", "from level", "bytes", right=3)
    for field in found.released:
        table.add_row(field.name, field.tells, field.level.name.lower(), f"{field.payload_bytes:,}")
    table.add_row("all", "", "", f"{found.uplink_bytes:,}", style="bold")
    table.add_row("(came back)", "candidates and their records", "", f"{found.downlink_bytes:,}", style="dim")
    table.columns[1].no_wrap, table.columns[1].overflow = False, "fold"  # words go on in a second line, numbers stay whole
    return table
