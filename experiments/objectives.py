"""Which objective trains the better planner: exact expectation, straight-through Gumbel-softmax, or regression on quality?

    python experiments/objectives.py --run RUN --users 4096

A planner of the same sizes is trained alone on the frozen run (validation events) by each objective of ``cda4rec_jax.planner.Objective``,
with several seeds of its own: *exact* follows the expected utility over all plans, *gumbel* that of one sampled plan, and *regression* the
predicted quality alone, so that choices follow without a gradient of their own. All of them start as plug-in and keep the weights that
earn the most on users who do not train. Told on test events in contexts v1, under the deployment profile: utility, also minus plug-in's
and minus that of exact with the same seed; share of decisions equal to exact's (of exact itself: to those of its next seed, which is what
a seed alone changes) and to plug-in's.

Trains the system where ``--work`` does not have it, or takes ``--run``. Writes ``objectives-<dataset>.json``, ``.md``, ``.png``.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from harness import (
    PROTOCOL,
    Options,
    Study,
    Values,
    error_bars,
    estimates,
    markdown_page,
    markdown_table,
    run_script,
    with_interval,
    write_results,
)
from planners import TRAINING, records_of, trained_alone

from cda4rec_jax.data import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.answers import PLUG_IN
from cda4rec_jax.evaluation.choices import Choices, brings, choose, choose_by_quality
from cda4rec_jax.evaluation.rows import plug_in_means
from cda4rec_jax.pipeline.population import CONTEXTS_PER_EVENT, PlanRecords
from cda4rec_jax.planner import Objective

QUESTION = (
    "Which objective trains the better planner: exact expectation, straight-through Gumbel-softmax, or regression on quality?"
)
PROFILE = "deployment"
EXACT, OTHERS = Objective.EXACT.value, (Objective.GUMBEL.value, Objective.REGRESSION.value)
GAINS = ("minus_plug_in", "minus_exact")
COLOURS = {EXACT: "tab:blue", Objective.GUMBEL.value: "tab:orange", Objective.REGRESSION.value: "tab:green", PLUG_IN: "tab:gray"}


def main(
    options: Options, planner_seeds: int = 3, draws: int = CONTEXTS_PER_EVENT, steps: int = TRAINING.steps
) -> dict[str, Any]:
    """Utility of planners that are trained by each objective.

    Args:
        options: of every experiment.
        planner_seeds: planners of each objective, on each system.
        draws: contexts of each event.
        steps: of each training.
    """
    if planner_seeds < 1:
        raise UserError(f"--planner-seeds is {planner_seeds}: expected at least 1 planner of each objective")
    study = Study(options)
    found = [_of_seed(study, seed, planner_seeds, draws, steps) for seed in study.seeds]
    planners = {}
    for name, quantities in found[0].items():
        columns = {quantity: np.concatenate([of_seed[name][quantity] for of_seed in found], axis=1) for quantity in quantities}
        planners[name] = {
            **estimates(columns),
            "of_planners": {quantity: values.mean(axis=0).tolist() for quantity, values in columns.items()},
        }
    result = study.result(
        QUESTION,
        protocol=f"{PROTOCOL}; contexts v1, {draws} for each event; {PROFILE} profile; means over planners are taken with those over seeds",
        draws=draws,
        steps=steps,
        planner_seeds=planner_seeds,
        quality_gap=float(np.mean([study.ours(seed).world(PROFILE).scales.quality_gap for seed in study.seeds])),
        planners=planners,
        verdict=_verdict(planners),
    )
    draw = partial(_draw, result)
    write_results(options.out, f"objectives-{study.name}", result, page(result), draw, study.console)
    return result


def _of_seed(study: Study, seed: int, planner_seeds: int, draws: int, steps: int) -> dict[str, dict[str, Values]]:
    """Every quantity [users, planner_seeds] by name of the objective, and of plug-in, on one system."""
    world = study.ours(seed).world(PROFILE)
    means = plug_in_means(records_of(study, seed, Split.VALIDATION, PROFILE, draws))
    records = records_of(study, seed, Split.TEST, PROFILE, draws)
    choices = {PLUG_IN: [choose_by_quality(records, means[None])] * planner_seeds}
    for objective in Objective:
        config = replace(TRAINING, objective=objective, steps=steps)
        choices[objective.value] = [
            choose(records, trained_alone(study, seed, f"policy-{objective}-{own}", world, config, planner_seed=own).logits)
            for own in range(planner_seeds)
        ]
        study.console.print(f"seed {seed}: {planner_seeds} planners by {objective}")
    utility = {name: _utility(records, chosen) for name, chosen in choices.items()}
    found: dict[str, dict[str, Values]] = {}
    for name in (EXACT, *OTHERS, PLUG_IN):
        found[name] = {"utility": utility[name], "equal_to_plug_in": _equal(choices[name], choices[PLUG_IN])}
        if name != PLUG_IN:
            found[name]["minus_plug_in"] = utility[name] - utility[PLUG_IN]
        if name != EXACT:
            found[name]["minus_exact"] = utility[name] - utility[EXACT]
            found[name]["equal_to_exact"] = _equal(choices[name], choices[EXACT])
        elif planner_seeds > 1:
            found[name]["equal_to_exact"] = _equal(choices[EXACT], [*choices[EXACT][1:], choices[EXACT][0]])
    return found


def _utility(records: PlanRecords, choices: list[Choices]) -> Values:
    """What each list of choices earns, mean over the contexts of each user [users, choices]."""
    found = brings(records, {str(number): chosen for number, chosen in enumerate(choices)})
    return np.stack([of_one["utility"].mean(axis=0, dtype=np.float64) for of_one in found.values()], axis=1)


def _equal(choices: list[Choices], others: list[Choices]) -> Values:
    """Share of each user's contexts in which both choose one plan [users, choices]."""
    return np.stack([(mine == theirs).mean(axis=0) for mine, theirs in zip(choices, others, strict=True)], axis=1)


def _verdict(planners: dict[str, Any]) -> str:
    """One sentence for each objective beside exact."""
    said = []
    for name in OTHERS:
        gain = planners[name]["minus_exact"]
        effect = "better than exact" if gain["low"] > 0 else "worse than exact" if gain["high"] < 0 else "no difference is shown"
        said.append(f"{name}: {effect} ({with_interval(gain, signed=True)})")
    return "; ".join(said)


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    columns = ["objective", "utility, 95%", "planner - plug-in, 95%", "of single planners", "planner - exact, 95%"]
    columns += ["equal to exact", "equal to plug-in"]
    rows = []
    for name, found in result["planners"].items():
        plug_in, exact = (with_interval(found[gain], signed=True) if gain in found else "" for gain in GAINS)
        single = found["of_planners"].get(GAINS[0])
        spread = "" if single is None else f"{min(single):+.4f} to {max(single):+.4f}"
        equal = [f"{found[share]['mean']:.1%}" if share in found else "-" for share in ("equal_to_exact", "equal_to_plug_in")]
        rows.append([name, with_interval(found["utility"]), plug_in, spread, exact, *equal])
    seeds = result["planner_seeds"]
    said = (
        f"Planners of each objective on each system: {seeds}, of {result['steps']:,} steps each; dQ = {result['quality_gap']:.4f}. "
        "Intervals are over users alone. What the seed of a planner moves is told by the column of single planners and, in decisions, by "
        "the row of exact, which is held against its own next seed. A planner whose training found nothing better is its start, plug-in."
    )
    lines = [*markdown_table(columns, rows), said, "", f"Verdict: {result['verdict']}.", ""]
    return markdown_page(result, "Objectives of the planner", lines)


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, grid = pyplot.subplots(1, 3, figsize=(16, 3.8))
    planners = result["planners"]
    _draw_gains(grid[0], planners, GAINS[0], (EXACT, *OTHERS), "utility: planner - plug-in, 95% by user")
    _draw_gains(grid[1], planners, GAINS[1], (*OTHERS, PLUG_IN), "utility: planner - exact, 95% by user")
    grid[0].set_title(result["dataset"])
    grid[1].set_title("small dots: single planners")
    shown = {
        f"{name},\nnext seed" if name == EXACT else name: found["equal_to_exact"]
        for name, found in planners.items()
        if "equal_to_exact" in found
    }
    means, bars = error_bars(list(shown.values()))
    colours = [COLOURS[name] for name, found in planners.items() if "equal_to_exact" in found]
    grid[2].barh(range(len(shown)), means, 0.6, xerr=bars, capsize=3, color=colours)
    grid[2].set_yticks(range(len(shown)), shown)
    grid[2].invert_yaxis()
    grid[2].set_xlim(0, 1)
    grid[2].set_xlabel("share of decisions, 95% by user")
    grid[2].set_title("decisions equal to exact's")
    return figure


def _draw_gains(axes: Any, planners: dict[str, Any], gain: str, names: tuple[str, ...], label: str) -> None:
    """The mean of each objective with its interval, and its single planners under it."""
    means, bars = error_bars([planners[name][gain] for name in names])
    for place, name in enumerate(names):
        axes.errorbar(means[place], place, xerr=bars[:, [place]], fmt="o", capsize=3, color=COLOURS[name])
        single = planners[name]["of_planners"][gain]
        axes.plot(single, np.full(len(single), place + 0.2), ".", markersize=4, color=COLOURS[name], alpha=0.7)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    run_script(main, page)
