"""Does the policy keep a budget on test that was calibrated on validation, and what does it cost?

    python experiments/budgets.py --run RUN --users 4096

A budget limits calls to the cloud, the quantile .95 of latency, or mean exposure. For each, three limits: a quarter, a half and three
quarters of the way from the least that any price reaches to what the policy uses without a price, both on validation requests. The
multiplier of ``cda4rec_jax.planner.budgets`` that keeps the limit there prices the policy on test requests. Told: what is used on both,
by how much test misses the limit (at most 5% is wanted), and what the budget costs in utility. How far the use without a price differs
between validation and test is told too: where it does, the requests differ, and a price that is right for the ones misses on the others.

Requests are those of contexts v1 under the deployment profile. Where the policy uses nothing that a price could save there is no limit to
set between, and the row says so.

Trains the system where ``--work`` does not have it, or takes ``--run``. Writes ``budgets-<dataset>.json``, ``.md``, ``.png``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from harness import (
    PROTOCOL,
    Options,
    Study,
    error_bars,
    estimates,
    markdown_page,
    markdown_table,
    run_script,
    with_interval,
    write_results,
)
from jaxtyping import Float
from planners import records_of

from cda4rec_jax.data import Split
from cda4rec_jax.evaluation.budgets import BUDGET_DRAWS, BudgetRow, budget_row, known_requests
from cda4rec_jax.evaluation.choices import brings, choose
from cda4rec_jax.pipeline.population import CONTEXTS_PER_EVENT
from cda4rec_jax.planner.budgets import REQUESTS_PER_DAY, Budget, Budgeted, Calibration, KnownRequests, Limited, calibrate

QUESTION = "Does the policy keep a budget on test that was calibrated on validation, and what does it cost?"
PROFILE = "deployment"
SHARES = {"a quarter": 0.25, "a half": 0.5, "three quarters": 0.75}  # of the way from the least to what is used without a price
AIM = 0.05  # of the limit: at most so much is to be missed on test
COLOURS = {Limited.CALLS: "tab:blue", Limited.P95_MS: "tab:orange", Limited.EXPOSURE: "tab:green"}
Utility = Float[np.ndarray, "users"]


@dataclass(frozen=True, kw_only=True)
class _OfSeed:
    """Budgets of one system; utilities are means over the contexts of each user."""

    ranges: dict[str, dict[str, float]]  # of each kind: the least, and what the policy uses without a price
    rows: dict[tuple[str, str], BudgetRow]  # by kind and limit; without those that cannot be set
    lost: dict[tuple[str, str], Utility]  # utility under the budget minus that without
    utility: Utility  # without a price


def main(options: Options, draws: int = CONTEXTS_PER_EVENT) -> dict[str, Any]:
    """What budgets use of validation and test requests, and what they cost.

    Args:
        options: of every experiment.
        draws: contexts of each event in which utility is taken; what is used is taken over more.
    """
    study = Study(options)
    found = [_of_seed(study, seed, draws) for seed in study.seeds]
    result = study.result(
        QUESTION,
        protocol=f"{PROTOCOL}; what is used: contexts v1, {BUDGET_DRAWS} for each event, of {len(study.selection_users):,} users on "
        f"validation; utility: {draws} for each test event, which share its cache and its consent; {PROFILE} profile",
        draws=draws,
        requests_per_day=REQUESTS_PER_DAY,
        aim=AIM,
        quality_gap=float(np.mean([study.ours(seed).world(PROFILE).scales.quality_gap for seed in study.seeds])),
        without_price={
            "utility": estimates({"utility": np.stack([one.utility for one in found], axis=1)})["utility"],
            **{
                limited.value: {name: [one.ranges[limited][name] for one in found] for name in found[0].ranges[limited]}
                for limited in Limited
            },
        },
        rows=[_row(found, limited, share) for limited in Limited for share in SHARES],
    )
    draw = partial(_draw, result)
    write_results(options.out, f"budgets-{study.name}", result, page(result), draw, study.console)
    return result


def calibrated(known: KnownRequests, limited: Limited, share: float) -> Calibration | None:
    """The price of the limit that is ``share`` of the way from the least to what is used without a price; None where they do not differ."""
    least, unlimited = _range(known, limited)
    if unlimited <= least:
        return None
    return calibrate(known, Budget(limited=limited, limit=least + share * (unlimited - least)))


def _range(known: KnownRequests, limited: Limited) -> tuple[float, float]:
    """The least that any price reaches, and what is used without one."""
    nothing = Budget(limited=limited, limit=0.0)
    return known.used(nothing, float("inf")), known.used(nothing, 0.0)


def _of_seed(study: Study, seed: int, draws: int) -> _OfSeed:
    trained = study.ours(seed)
    world, policy = trained.world(PROFILE), trained.system.policy
    assert policy is not None
    records = records_of(study, seed, Split.TEST, PROFILE, draws)
    ranges, rows, choices = {}, {}, {("", ""): choose(records, policy.logits)}
    for limited in Limited:
        validation, test = (
            known_requests(trained.population.requests(world, *study.of_split(split), draws=BUDGET_DRAWS), policy.logits, limited)
            for split in (Split.VALIDATION, Split.TEST)
        )
        least, unlimited = _range(validation, limited)
        ranges[limited] = {"least": least, "on_validation": unlimited, "on_test": _range(test, limited)[1]}
        for label, share in SHARES.items():
            price = calibrated(validation, limited, share)
            if price is None:
                continue
            rows[limited, label] = budget_row(price, test)
            kept = Budgeted(planner=policy, limited=limited, multiplier=price.multiplier)
            choices[limited, label] = choose(records, kept.logits)
        study.console.print(f"seed {seed}: budgets of {limited} done")
    found = brings(records, {" ".join(place): chosen for place, chosen in choices.items()})
    utility = {place: found[" ".join(place)]["utility"].mean(axis=0, dtype=np.float64) for place in choices}
    without = utility.pop(("", ""))
    return _OfSeed(ranges=ranges, rows=rows, lost={place: of_one - without for place, of_one in utility.items()}, utility=without)


def _row(found: list[_OfSeed], limited: Limited, share: str) -> dict[str, Any]:
    """One budget over all seeds: numbers of each, and the cost over users; the reason alone where any seed has no such limit."""
    row = {"limited": limited.value, "unit": limited.unit, "share": share}
    place = limited, share
    missing = [one for one in found if place not in one.rows]
    if missing:
        nothing = all(one.ranges[limited]["on_validation"] == 0 for one in missing)
        reason = "the policy uses nothing of it" if nothing else "no price makes the policy use less than it does"
        return {**row, "why_not": reason if len(missing) == len(found) else f"{reason} on {len(missing)} of {len(found)} seeds"}
    rows = [one.rows[place] for one in found]
    errors = [one.relative_error for one in rows]
    return {
        **row,
        "why_not": None,
        "limit": [one.limit for one in rows],
        "multiplier": [one.multiplier for one in rows],
        "on_validation": [one.on_validation for one in rows],
        "on_test": [one.on_split for one in rows],
        "relative_error": errors,
        "within_aim": max(map(abs, errors)) <= AIM,
        "minus_without": estimates({"lost": np.stack([one.lost[place] for one in found], axis=1)})["lost"],
    }


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = ["## Without a price", "", *_range_lines(result), "## Under a budget", "", *_row_lines(result)]
    return markdown_page(result, "Budgets", lines)


def _range_lines(result: dict[str, Any]) -> list[str]:
    columns = ["budget", "in", "least, on validation", "used on validation", "used on test", "test / validation - 1"]
    rows = []
    for limited in Limited:
        used = result["without_price"][limited]
        drift = ", ".join(
            f"{test / before - 1:+.1%}" if before else "-"
            for before, test in zip(used["on_validation"], used["on_test"], strict=True)
        )
        numbers = [_listed(used[name]) for name in ("least", "on_validation", "on_test")]
        rows.append([limited, limited.unit, *numbers, drift])
    said = (
        f"Utility without a price: {with_interval(result['without_price']['utility'])}; dQ = {result['quality_gap']:.4f}. Calls take "
        f"{result['requests_per_day']:g} requests per user and day. The least is what the highest price reaches: every request takes the "
        "plan that is predicted to use the least."
    )
    return [*markdown_table(columns, rows), said, ""]


def _row_lines(result: dict[str, Any]) -> list[str]:
    columns = ["budget", "limit", "price, logits per unit", "used on validation", "used on test", "test misses the limit by"]
    columns += ["utility - without a price, 95%", "in dQ"]
    rows = []
    for row in result["rows"]:
        name = f"{row['limited']}, {row['share']} of the way"
        if row["why_not"]:
            rows.append([name, row["why_not"], *["-"] * 6])
            continue
        numbers = [_listed(row[each]) for each in ("limit", "multiplier", "on_validation", "on_test")]
        lost = row["minus_without"]
        miss, share = _listed(row["relative_error"], "+.1%"), lost["mean"] / result["quality_gap"]
        rows.append([name, *numbers, miss, with_interval(lost, signed=True), f"{share:+.3f}"])
    held = [row["within_aim"] for row in result["rows"] if not row["why_not"]]
    said = (
        f"{sum(held)} of {len(held)} limits are met on test within {result['aim']:.0%}, above or below. What is missed has no interval: "
        "hold it against the drift of the table above."
        if held
        else "No limit could be set."
    )
    return [*markdown_table(columns, rows), said, ""]


def _listed(values: Iterable[float], form: str = ".4g") -> str:
    """The number of each seed."""
    return ", ".join(f"{value:{form}}" for value in values)


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, (missed, lost) = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    rows = result["rows"]
    for place, row in enumerate(rows):
        colour = COLOURS[Limited(row["limited"])]
        if row["why_not"]:
            missed.text(0.5, place, row["why_not"], transform=missed.get_yaxis_transform(), ha="center", va="center", fontsize=8)
            continue
        errors = 100.0 * np.asarray(row["relative_error"])
        missed.plot(errors, np.full(len(errors), place), "o", color=colour)
        (mean,), bars = error_bars([row["minus_without"]])
        lost.errorbar(mean, place, xerr=bars, fmt="o", capsize=3, color=colour)
    missed.axvspan(-100 * result["aim"], 100 * result["aim"], color="tab:gray", alpha=0.15, label=f"within {result['aim']:.0%}")
    missed.set_yticks(range(len(rows)), [f"{row['limited']}, {row['share']}" for row in rows])
    missed.set_ylim(len(rows) - 0.5, -0.5)
    missed.set_xlabel("test misses the limit by, %")
    missed.set_title(f"{result['dataset']}: limits of validation, kept on test?")
    missed.legend(loc="best", fontsize=8)
    lost.set_xlabel("utility: under the budget - without, 95% by user")
    lost.set_title("what the budget costs")
    for axes in (missed, lost):
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main, page)
