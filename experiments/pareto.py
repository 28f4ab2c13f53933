"""Does one policy, told the prices, trace the front that policies trained for single prices reach?

    python experiments/pareto.py --run RUN --users 4096

Prices of time, energy and exposure are an input of the policy. All test requests (links, devices, consents and caches of contexts v1) are
answered at one price vector after another: one price alone or all three, each lambda times what contexts v1 take for break-even. Compared:
the policy of the run and plug-in at every price vector; policies that are trained alone (on validation events of the frozen run) for single
price vectors, and one that the same training makes of all prices; and every fixed plan with repair. hit_rate@10 against latency, cloud
calls, bytes and exposure; hypervolume of each pair, normalised.

Trains the system where ``--work`` does not have it, or takes ``--run``. Writes ``pareto-<dataset>.json``, ``.md``, ``.png``.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from harness import (
    PROTOCOL,
    Arrays,
    Options,
    Study,
    markdown_page,
    markdown_table,
    run_script,
    with_interval,
    write_results,
)
from planners import TRAINING, records_of, selected_on_validation, trained_alone

from cda4rec_jax.data import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.answers import answer, fixed_name
from cda4rec_jax.evaluation.choices import Choices, brings, choose, choose_by_quality
from cda4rec_jax.evaluation.drawn import priced
from cda4rec_jax.evaluation.pareto import hypervolume, pareto_front
from cda4rec_jax.metrics import resampled_means
from cda4rec_jax.pipeline.decisions import PlanningWorld
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.planner.utility import WeightScales

QUESTION = "Does one policy with prices as input reach the fronts of policies that are trained for single prices?"
DIRECTIONS = {"time": (1.0, 0.0, 0.0), "energy": (0.0, 1.0, 0.0), "exposure": (0.0, 0.0, 1.0), "all": (1.0, 1.0, 1.0)}
STRENGTHS = tuple(float(2.0**power) for power in range(-4, 7))  # lambdas; contexts v1 draw them from 1/8 to 8
TRAINED_STRENGTHS = (0.5, 2.0, 8.0)  # of which policies are trained for
PROFILE = "deployment"
GAIN = "hit_rate@10"
COSTS = {
    "latency_ms": "latency, ms (modelled)",
    "cloud_calls": "cloud calls per request",
    "bytes": "bytes per request",
    "exposure": "exposure",
}
ONE, SAME, SINGLE, PLUG_IN, FIXED = (
    "one policy",
    "one policy, trained alone, at the same prices",
    "policies for single prices",
    "plug-in",
    "fixed plans",
)
NO_PRICE = 1e30  # gap that makes a price vanish
Lambdas = tuple[float, float, float]


def main(
    options: Options, draws: int = 4, trained_strengths: tuple[float, ...] = TRAINED_STRENGTHS, steps: int = TRAINING.steps
) -> dict[str, Any]:
    """Fronts of accuracy against cost.

    Args:
        options: of every experiment.
        draws: contexts of each event.
        trained_strengths: lambdas for which policies are trained, alone for each price and for all of them.
        steps: of each such training.
    """
    if not trained_strengths or min(trained_strengths) <= 0:
        raise UserError(f"--trained-strengths are {trained_strengths}: expected at least one lambda, all above 0")
    study = Study(options)
    of_seeds = [_of_seed(study, seed, draws, trained_strengths, steps) for seed in study.seeds]
    families = {
        family: {
            name: {
                quantity: np.mean([found[family][name][quantity] for found in of_seeds], axis=0) for quantity in (GAIN, *COSTS)
            }
            for name in points
        }
        for family, points in of_seeds[0].items()
    }
    result = study.result(
        QUESTION,
        protocol=f"{PROTOCOL}; situations of contexts v1, {draws} for each event, all requests at one price vector; {PROFILE} profile",
        trained_steps=steps,
        **_measured(families),
    )
    draw = partial(_draw, result)
    write_results(options.out, f"pareto-{study.name}", result, page(result), draw, study.console)
    return result


def price_vectors(strengths: tuple[float, ...]) -> dict[str, Lambdas]:
    """Lambdas of time, energy and exposure by name: each price alone, and all three, at every strength."""
    return {
        f"{name} {strength:g}": (strength * time, strength * energy, strength * exposure)
        for name, (time, energy, exposure) in DIRECTIONS.items()
        for strength in strengths
    }


def fixed_world(world: PlanningWorld, lambdas: Lambdas) -> PlanningWorld:
    """The world whose contexts have exactly these prices, where every lambda is drawn as 1."""
    scales = world.scales
    gaps = (scales.latency_gap_ms, scales.energy_gap_mj, scales.exposure_gap)
    latency, energy, exposure = (
        gap / price if price else jnp.asarray(NO_PRICE) for gap, price in zip(gaps, lambdas, strict=True)
    )
    changed = WeightScales(quality_gap=scales.quality_gap, latency_gap_ms=latency, energy_gap_mj=energy, exposure_gap=exposure)
    return replace(world, scales=changed)


def _of_seed(study: Study, seed: int, draws: int, strengths: tuple[float, ...], steps: int) -> dict[str, dict[str, Arrays]]:
    """Per-user means [users] of gain and costs, by family of points and name of the point."""
    trained = study.ours(seed)
    world, policy = trained.world(PROFILE), trained.system.policy
    assert policy is not None
    means = selected_on_validation(study, seed, PROFILE, draws)[1]
    records = records_of(study, seed, Split.TEST, PROFILE, draws)
    trainings = price_vectors(strengths)
    asked = {"none": (0.0, 0.0, 0.0), **price_vectors(STRENGTHS), **trainings}
    alone = trained_alone(study, seed, "policy-alone", world, replace(TRAINING, steps=steps))
    single = {name: _trained_for(study, seed, name, world, lambdas, steps) for name, lambdas in trainings.items()}
    found: dict[str, dict[str, Arrays]] = {ONE: {}, SAME: {}, SINGLE: {}, PLUG_IN: {}}
    with study.console.status("sweeping prices") as status:
        for name, lambdas in asked.items():
            status.update(f"seed {seed}, prices: {name}")
            at = priced(records, world, lambdas)
            choices = {ONE: choose(at, policy.logits), PLUG_IN: choose_by_quality(at, means[None])}
            if name in trainings:
                choices |= {SAME: choose(at, alone.logits), SINGLE: choose(at, single[name].logits)}
            for family, point in _points(at, choices).items():
                found[family][name] = point
        status.update(f"seed {seed}: fixed plans")
        answers = answer(records, {}, means)
        found[FIXED] = {
            name.removeprefix(fixed_name("")): _with_bytes(
                {quantity: answers.of(name, quantity) for quantity in answers.per_user}
            )
            for name in answers.fixed_names
        }
    study.console.print(f"seed {seed}: {len(asked)} price vectors, {len(trainings)} policies for single ones")
    return found


def _trained_for(study: Study, seed: int, name: str, world: PlanningWorld, lambdas: Lambdas, steps: int) -> Any:
    """A policy for these prices alone."""
    contexts = replace(TRAINING.contexts, max_log2_lambda=0.0, zero_weight_share=0.0)
    config = replace(TRAINING, contexts=contexts, steps=steps)
    return trained_alone(study, seed, f"policy-{name.replace(' ', '-')}", fixed_world(world, lambdas), config)


def _points(records: PlanRecords, choices: Mapping[str, Choices]) -> dict[str, Arrays]:
    return {
        name: _with_bytes({quantity: values.mean(axis=0, dtype=np.float64) for quantity, values in brought.items()})
        for name, brought in brings(records, choices).items()
    }


def _with_bytes(brought: Arrays) -> Arrays:
    """Gain and costs alone."""
    whole = {**brought, "bytes": brought["uplink_bytes"] + brought["downlink_bytes"]}
    return {quantity: np.asarray(whole[quantity], np.float64) for quantity in (GAIN, *COSTS)}


def _measured(families: dict[str, dict[str, Arrays]]) -> dict[str, Any]:
    """Every point with its intervals, and the hypervolume of each family for each cost, over the same resamples of users."""
    quantities = (GAIN, *COSTS)
    names = [(family, point) for family, points in families.items() for point in points]
    stacked = np.stack([families[family][point][quantity] for quantity in quantities for family, point in names], axis=1)
    shape = (-1, len(quantities), len(names))
    means = stacked.mean(axis=0).reshape(shape)[0]
    drawn = resampled_means(stacked).reshape(shape)
    lows, highs = np.quantile(drawn, [0.025, 0.975], axis=0)
    points: dict[str, dict[str, Any]] = {}
    for column, (family, point) in enumerate(names):
        points.setdefault(family, {})[point] = {
            quantity: {"mean": means[row, column], "low": lows[row, column], "high": highs[row, column]}
            for row, quantity in enumerate(quantities)
        }
    of_family = np.array([family for family, _ in names])
    floor = float(means[0, of_family == FIXED].min())
    height = float(means[0].max()) - floor
    volumes, references = {}, {"gain": floor, "highest_gain": floor + height}
    for row, cost in enumerate(COSTS, start=1):
        reference = references[cost] = float(means[row, of_family == FIXED].max())
        bounds = {"cost_reference": reference, "gain_reference": floor}
        volumes[cost] = _volumes(means[row], means[0], drawn[:, row], drawn[:, 0], of_family, reference * height, bounds)
    return {"points": points, "references": references, "hypervolume": volumes}


def _volumes(
    costs: np.ndarray,
    gains: np.ndarray,
    drawn_costs: np.ndarray,
    drawn_gains: np.ndarray,
    of_family: np.ndarray,
    unit: float,
    bounds: dict[str, float],
) -> dict[str, Any]:
    """Normalised hypervolume of each family, and how far the one policy is ahead of the others; means and resamples."""

    def of(family: str) -> np.ndarray:
        mine = of_family == family
        here = hypervolume(costs[mine], gains[mine], **bounds)
        return np.append(hypervolume(drawn_costs[:, mine], drawn_gains[:, mine], **bounds), here) / unit

    found = {family: of(family) for family in (ONE, SAME, SINGLE, PLUG_IN, FIXED)}
    found |= {f"{SAME} - {SINGLE}": found[SAME] - found[SINGLE], f"{ONE} - {PLUG_IN}": found[ONE] - found[PLUG_IN]}
    return {
        name: {
            "mean": float(values[-1]),
            **dict(zip(("low", "high"), np.quantile(values[:-1], [0.025, 0.975]).tolist(), strict=True)),
        }
        for name, values in found.items()
    }


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    families = list(next(iter(result["hypervolume"].values())))
    columns = ["hypervolume, 95%", *(COSTS[cost] for cost in result["hypervolume"])]
    rows = [
        [family, *(with_interval(found[family], signed=" - " in family) for found in result["hypervolume"].values())]
        for family in families
    ]
    references = result["references"]
    said = (
        f"2-D, {GAIN} above {references['gain']:.4f} (the least accurate fixed plan) and cost below that of the dearest fixed plan ("
        + ", ".join(f"{COSTS[cost]} {references[cost]:,.2f}" for cost in COSTS)
        + f"), as a share of the box up to the highest {GAIN} ({references['highest_gain']:.4f}). The one policy and plug-in are asked at "
        f"{len(result['points'][ONE])} price vectors; of these, {len(result['points'][SINGLE])} have a policy of their own. What a sweep "
        "reaches depends on the number of its points, and a policy on what it was trained on: like is compared with like by a policy that "
        f"the same {result['trained_steps']:,} steps on the same events made of all prices, asked at the trained ones. "
        "Points are chosen and measured on the same test requests."
    )
    return markdown_page(result, "Fronts of accuracy and cost", [*markdown_table(columns, rows), said, "", *_price_lines(result)])


def _price_lines(result: dict[str, Any]) -> list[str]:
    columns = ["prices (lambda)", "policy", GAIN, *COSTS.values()]
    rows = []
    for name in result["points"][SINGLE]:
        for family in (SAME, SINGLE):
            point = result["points"][family][name]
            numbers = [f"{point[cost]['mean']:,.3f}" for cost in COSTS]
            rows.append([name, family, with_interval(point[GAIN]), *numbers])
    return markdown_table(columns, rows)


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, grid = pyplot.subplots(2, 2, figsize=(13, 10))
    for axes, (cost, label) in zip(grid.flat, COSTS.items(), strict=True):
        for family, colour in ((PLUG_IN, "tab:orange"), (ONE, "tab:blue")):
            _draw_front(axes, result["points"][family], cost, colour, family)
        _draw_points(axes, result["points"][FIXED], cost, "tab:gray", "x", FIXED)
        _draw_points(axes, result["points"][SINGLE], cost, "tab:red", "o", SINGLE)
        volume = result["hypervolume"][cost]
        axes.set_title(f"hypervolume: one policy {volume[ONE]['mean']:.3f}, plug-in {volume[PLUG_IN]['mean']:.3f}", fontsize=10)
        axes.set_xlabel(label)
        axes.set_ylabel(f"test {GAIN}")
        axes.grid(alpha=0.3)
    grid.flat[0].legend(loc="lower right")
    figure.suptitle(f"{result['dataset']}: fronts over swept prices, 95% by user")
    return figure


def _draw_front(axes: Any, points: dict[str, Any], cost: str, colour: str, label: str) -> None:
    costs, gains, lows, highs = _columns(points, cost)
    front = np.flatnonzero(pareto_front(costs, gains))
    front = front[np.argsort(costs[front])]
    axes.step(costs[front], gains[front], where="post", color=colour, label=f"{label}, front")
    axes.fill_between(costs[front], lows[front], highs[front], step="post", color=colour, alpha=0.12)
    axes.plot(costs, gains, ".", color=colour, markersize=3, alpha=0.6)


def _draw_points(axes: Any, points: dict[str, Any], cost: str, colour: str, marker: str, label: str) -> None:
    costs, gains, lows, highs = _columns(points, cost)
    axes.errorbar(
        costs,
        gains,
        [gains - lows, highs - gains],
        fmt=marker,
        color=colour,
        markersize=5,
        elinewidth=0.5,
        alpha=0.8,
        label=label,
    )


def _columns(points: dict[str, Any], cost: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    gains = [point[GAIN] for point in points.values()]
    columns = (
        [point[cost]["mean"] for point in points.values()],
        *([gain[name] for gain in gains] for name in ("mean", "low", "high")),
    )
    costs, means, lows, highs = (np.asarray(column) for column in columns)
    return costs, means, np.minimum(lows, means), np.maximum(highs, means)


if __name__ == "__main__":
    run_script(main, page)
