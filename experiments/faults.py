"""Which failures does a trace tell, what do they cost, and is there one slate each time?

    python experiments/faults.py --run RUN

Real requests before test events, in contexts v1, run through gate, wire and executor on the virtual clock: as they are, and under each of
the paper's failure signatures. A poor allocator takes an allowed plan at random, or the one that is expected to be worth least; the link
returns nothing; the link takes a multiple of what it would; the device computes a multiple of the time; structured modelling finds no
memory. Each has a flag that its traces must raise. What a request meets on the link is the same in every scenario, but for its fault.

A fault counts only where the plan meets it: a local plan does not notice the link, and a device that is slow where the cloud ranks has next
to nothing to compute. Compute is timed on this machine, so a busy one raises false alarms.

Trains the system where ``--work`` does not have it, or takes ``--run``. Writes ``faults-<dataset>.json``, ``.md``, ``.png``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from fault_lab import NONE, SCENARIOS, Found, Lab
from harness import (
    Options,
    Study,
    error_bars,
    estimates,
    markdown_page,
    markdown_table,
    run_script,
    sampled,
    with_interval,
    write_results,
)

from cda4rec_jax.data import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.metrics import summarise_latency
from cda4rec_jax.runtime import (
    ExecutorConfig,
)
from cda4rec_jax.runtime.recommend import Recommender

QUESTION = "Which failures does the trace of a request tell, what do they cost, and is there one slate each time?"
FLAGS = ("regret_high", "link_failed", "context_shift", "device_exhausted")
METHOD = (
    "one request before the test event of each user, draw 0 of contexts v1; plans by the learned policy; links on the virtual clock, "
    "without the failures that contexts v1 would draw; utility = quality of the slate - prices x (latency as it came out, energy and "
    "exposure as predicted for the plan); intervals by user, 95%, 2000 resamples; scenarios are paired"
)


def main(options: Options, requests: int = 300, link_factor: float = 5.0, slowdown: int = 50) -> dict[str, Any]:
    """Flags, utility and latency under every fault.

    Args:
        options: of every experiment.
        requests: users who ask, once in each scenario.
        link_factor: by which the link is slower than it would be, when the context changes.
        slowdown: how often a slow device repeats each of its computations.
    """
    if options.seeds != 1 or requests < 2 or link_factor <= 1 or slowdown < 2:
        raise UserError(
            f"got {options.seeds} seeds, {requests} requests, link factor {link_factor} and slowdown {slowdown}: expected 1 seed, at "
            "least 2 requests, a factor above 1 and a slowdown of at least 2"
        )
    study = Study(options)
    trained = study.ours(0)
    users, positions = study.of_split(Split.TEST)
    chosen = sampled(len(users), requests)
    with Recommender(trained) as recommender:
        lab = Lab(trained, recommender, users[chosen], positions[chosen], link_factor, slowdown)
        found = lab.run(study)
    result = study.result(
        QUESTION,
        protocol=METHOD,
        requests=len(chosen),
        link_factor=link_factor,
        slowdown=slowdown,
        high_regret=ExecutorConfig().high_regret,
        scenarios={name: _row(name, found) for name in found},
    )
    draw = partial(_draw, result)
    write_results(options.out, f"faults-{study.name}", result, page(result), draw, study.console)
    return result


def _row(name: str, found: dict[str, list[Found]]) -> dict[str, Any]:
    """What is told of one scenario: over the requests whose plan meets its fault (without a fault: over all)."""
    results, reference = found[name], found[NONE]
    own_flag = SCENARIOS.get(name)
    pairs = [(one, other) for one, other in zip(results, reference, strict=True) if one.meets]

    def column(value: Callable[[Found, Found], float]) -> np.ndarray:
        return np.asarray([value(*pair) for pair in pairs], np.float64).reshape(-1, 1)

    columns = {flag: column(lambda one, _, flag=flag: flag in one.trace.flags) for flag in FLAGS}
    columns |= {
        "utility_lost": column(lambda one, other: other.utility - one.utility),
        "latency_added_ms": column(lambda one, other: one.trace.latency_ms - other.trace.latency_ms),
        "expected_regret": column(lambda one, _: one.regret),
    }
    latency = summarise_latency(np.asarray([one.trace.latency_ms for one, _ in pairs])) if pairs else None
    return {
        "flag": own_flag,
        "requests": len(results),
        "meet_it": len(pairs),
        "slates": sum(each.has_slate for each in results),
        **estimates(columns),
        "latency_p50_ms": None if latency is None else latency.p50_ms,
        "latency_p95_ms": None if latency is None else latency.p95_ms,
    }


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    rates = [["scenario", "meet it", "one slate", *FLAGS]]
    prices = [
        [
            "scenario",
            "utility lost, 95%",
            "latency added, ms",
            "latency p50, ms",
            "p95, ms",
            "expected regret, dQ",
        ]
    ]
    for name, row in result["scenarios"].items():
        cells = [_rate(row[flag], bold=flag == row["flag"]) for flag in FLAGS]
        rates.append([name, f"{row['meet_it']} of {row['requests']}", f"{row['slates']} of {row['requests']}", *cells])
        if row["meet_it"]:
            times = [f"{row[key]:.1f}" for key in ("latency_p50_ms", "latency_p95_ms")]
            added, regret = row["latency_added_ms"]["mean"], row["expected_regret"]["mean"]
            lost = "" if name == NONE else with_interval(row["utility_lost"], signed=True)
            prices.append([name, lost, "" if name == NONE else f"{added:+.1f}", *times, f"{regret:.2f}"])
    said = (
        "Share of the requests that meet the fault whose trace raises the flag, with its interval; bold is the flag that must be raised "
        "(detection), and the row without a fault has the false alarms. A change of context: the link takes "
        f"{result['link_factor']:g} times as long as it would. A slow device does its work {result['slowdown']} times. `regret_high` is "
        "raised where the plan was expected to be worth less than the best allowed one by more than "
        f"{result['high_regret']:g} dQ. A slow device counts where it ranks. Links of contexts v1 vary without a "
        "fault too, and some take twice their estimate: those are false alarms of `context_shift`, by definition of the fault."
    )
    lines = [*markdown_table(rates[0], rates[1:]), said, "", *markdown_table(prices[0], prices[1:])]
    return markdown_page(result, "Faults", lines)


def _rate(found: dict[str, Any], bold: bool) -> str:
    if found["mean"] is None:
        return "-"
    text = f"{found['mean']:.1%}"
    return f"{f'**{text}**' if bold else text} [{max(found['low'], 0.0):.0%}, {found['high']:.0%}]"


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, (matrix, lost, latency) = pyplot.subplots(1, 3, figsize=(17, 5), width_ratios=(1.2, 1.0, 1.0))
    rows = result["scenarios"]
    labels = [f"{name}\n({row['meet_it']} requests)" for name, row in rows.items()]
    rates = np.array([[np.nan if row[flag]["mean"] is None else row[flag]["mean"] for flag in FLAGS] for row in rows.values()])
    matrix.imshow(rates, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for place, row in enumerate(rows.values()):
        for column, flag in enumerate(FLAGS):
            if row[flag]["mean"] is not None:
                text = f"{rates[place, column]:.0%}\n[{max(row[flag]['low'], 0.0):.0%}, {row[flag]['high']:.0%}]"
                colour = "white" if rates[place, column] > 0.5 else "black"
                weight = "bold" if flag == row["flag"] else "normal"
                matrix.text(column, place, text, ha="center", va="center", color=colour, fontsize=8, weight=weight)
    matrix.set_xticks(range(len(FLAGS)), [flag.replace("_", "_\n") for flag in FLAGS], fontsize=9)
    matrix.set_title(f"{result['dataset']}: share of traces with each flag\n(bold: must be raised)", fontsize=10)
    names = [name for name in rows if name != NONE]
    means, bars = error_bars([rows[name]["utility_lost"] for name in names])
    lost.errorbar(means, names, xerr=bars, fmt="o", capsize=3, color="tab:blue")
    lost.axvline(0.0, color="black", linewidth=0.8)
    lost.set_xlabel("utility lost against no fault, 95% by user")
    for key, marker in (("latency_p50_ms", "o"), ("latency_p95_ms", "x")):
        values = [np.nan if row[key] is None else row[key] for row in rows.values()]
        latency.plot(values, list(rows), marker, color="tab:orange", label=key.split("_")[1])
    latency.set_xscale("log")
    latency.set_xlabel("latency, ms (measured compute, modelled link)")
    latency.legend()
    matrix.set_yticks(range(len(labels)), labels)
    for axes in (lost, latency):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main, page)
