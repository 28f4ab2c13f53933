"""How good are the planner's decisions, by every yardstick, and where plug-in cannot be beaten, why?

    python experiments/planner_decisions.py --run RUN --users 4096

On test events in contexts v1, under the deployment and the measured cost profile: utility of the learned policy beside the best fixed
plan (chosen on validation), rules, random, plug-in, the cross-fitted context oracle and hindsight; regret against that oracle; share of
decisions that equal its own; share of the gap from plug-in to it that is closed. All of it also by history length, device tier, link,
consent, kept embedding and for cold users. The variance of plans' quality says how much there is to know beyond plug-in.

Three planners are trained alone on the frozen run (validation events): a policy on all contexts; the same without low-tier devices and
without 3G, which then meets both; and the ablation that goes from context and prices straight to logits. They learn under the deployment
profile.

Trains the system where ``--work`` does not have it, or takes ``--run``. Writes ``planner-decisions-<dataset>.json``, ``.md``, ``.png``.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import (
    PROTOCOL,
    Options,
    Study,
    error_bars,
    markdown_page,
    markdown_table,
    run_script,
    with_interval,
    write_results,
)
from planners import TRAINING, records_of, selected_on_validation, trained_alone

from cda4rec_jax.data import Split
from cda4rec_jax.evaluation.answers import HINDSIGHT, ORACLE, PLUG_IN, Logits, oracle_quality
from cda4rec_jax.evaluation.choices import brings, choose, choose_by_quality, choose_in_hindsight
from cda4rec_jax.evaluation.rows import POLICY, RANDOM, RULES
from cda4rec_jax.evaluation.yardsticks import (
    Estimate,
    Ratio,
    estimate_quotient,
    estimate_ratios,
    gap_closed,
    mean_of_ratios,
    mean_over,
    quality_parts,
    request_groups,
)
from cda4rec_jax.messages import DeviceTier, Link
from cda4rec_jax.pipeline.population import CONTEXTS_PER_EVENT, PlanRecords
from cda4rec_jax.planner import DirectPolicy, FixedPlan, PolicyConfig, RandomPlanner, RulesPlanner, context_features, plan_index
from cda4rec_jax.runs.artifacts import TrainedSystem

QUESTION = "How good are the planner's decisions, and how much is there to gain over plug-in?"
PROFILES = ("deployment", "measured")
BEST_FIXED, OTHER_ORACLE = "best fixed", "context-oracle, other halves"
ALONE, UNSEEN, DIRECT = "policy, trained alone", "policy, without low tier and 3G", "direct policy (ablation)"
HELD_OUT_TIER, HELD_OUT_LINK = DeviceTier.LOW, Link.THREE_G
SEEN, HELD_OUT = "seen", "held out"
MAX_QUOTIENT = 1.5  # wanted of held-out regret over seen regret
Path = tuple[str, ...]
UNKNOWN = Estimate(mean=None, low=None, high=None, users=0)


def main(options: Options, draws: int = CONTEXTS_PER_EVENT, steps: int = TRAINING.steps) -> dict[str, Any]:
    """Decisions of every planner by every yardstick.

    Args:
        options: of every experiment.
        draws: contexts of each event.
        steps: of each planner that is trained alone.
    """
    study = Study(options)
    profiles = {profile: _of_profile(study, profile, draws, steps) for profile in PROFILES}
    result = study.result(
        QUESTION,
        protocol=f"{PROTOCOL}; contexts v1, {draws} for each event; intervals are clustered by user",
        draws=draws,
        steps_of_planners_trained_alone=steps,
        profiles=profiles,
    )
    draw = partial(_draw, result)
    write_results(options.out, f"planner-decisions-{study.name}", result, page(result), draw, study.console)
    return result


def trained_planners(study: Study, seed: int, steps: int) -> dict[str, Any]:
    """The planners that are trained alone, under the deployment profile."""
    world, config = study.ours(seed).world(), replace(TRAINING, steps=steps)
    v1 = config.contexts
    tiers = tuple(0.0 if tier == HELD_OUT_TIER else share for tier, share in enumerate(v1.tier_shares))
    links = tuple(0.0 if link == HELD_OUT_LINK else share for link, share in enumerate(v1.link_shares))
    without = replace(config, contexts=replace(v1, tier_shares=tiers, link_shares=links))
    direct = DirectPolicy(PolicyConfig(quality_scale=float(world.scales.quality_gap)), rngs=nnx.Rngs(seed))
    return {
        ALONE: trained_alone(study, seed, "policy-alone", world, config),
        UNSEEN: trained_alone(study, seed, "policy-without-low-and-3g", world, without),
        DIRECT: trained_alone(study, seed, "direct-policy", world, replace(config, quality_regression=0.0), direct),
    }


def _of_profile(study: Study, profile: str, draws: int, steps: int) -> dict[str, Any]:
    found, fixed, gaps = [], [], []
    for seed in study.seeds:
        trained, alone = study.ours(seed), trained_planners(study, seed, steps)
        plan, means = selected_on_validation(study, seed, profile, draws)
        records = records_of(study, seed, Split.TEST, profile, draws)
        with study.console.status(f"{profile} profile, seed {seed}"):
            found.append(_ratios(trained, records, plan, means, alone))
        fixed.append(plan)
        gaps.append(float(trained.world().scales.quality_gap))
        study.console.print(f"{profile} profile, seed {seed}: done")
    ratios = {path: mean_of_ratios([of_seed[path] for of_seed in found]) for path in found[0]}
    estimates = estimate_ratios(ratios)
    for name in (UNSEEN, ALONE, PLUG_IN):
        regret = {label: ("held_out", label, "regret", name) for label in (SEEN, HELD_OUT)}
        sure = (estimates[regret[SEEN]].low or 0.0) > 0
        quotient = estimate_quotient(ratios[regret[HELD_OUT]], ratios[regret[SEEN]])
        estimates["held_out", "quotient", name] = quotient if sure else UNKNOWN
    for path, gap in estimates.items():
        if path[-1] == "oracle_minus_plug_in" and (gap.low is None or gap.low <= 0):
            # Where no gap is sure to be there, a share of it is a ratio of noise.
            estimates[*path[:-1], "gap_closed"] = UNKNOWN
    nested = _nested({path: asdict(estimate) for path, estimate in estimates.items()})
    return {"best_fixed": fixed, "quality_gap": float(np.mean(gaps)), **nested}


def _ratios(
    trained: TrainedSystem, records: PlanRecords, fixed: str, means: np.ndarray, alone: Mapping[str, Any]
) -> dict[Path, Ratio]:
    """Every number of one seed as a ratio over users, by where it belongs in the result."""
    policy = trained.system.policy
    assert policy is not None
    oracle = oracle_quality(records)
    planners: dict[str, Logits] = {
        POLICY: policy.logits,
        BEST_FIXED: FixedPlan(plan_index(fixed)).logits,
        RULES: RulesPlanner().logits,
        RANDOM: RandomPlanner().logits,
        **{name: planner.logits for name, planner in alone.items()},
    }
    choices = {name: choose(records, logits) for name, logits in planners.items()} | {
        PLUG_IN: choose_by_quality(records, means[None]),
        ORACLE: choose_by_quality(records, oracle),
        OTHER_ORACLE: choose_by_quality(records, oracle_quality(records, seed=1)),
        HINDSIGHT: choose_in_hindsight(records),
    }
    utility = {name: found["utility"] for name, found in brings(records, choices).items()}
    everyone = np.ones(records.requests.failed.shape, bool)
    found = {("overall", *path): ratio for path, ratio in _yardsticks(utility, choices, everyone, tuple(choices)).items()}
    for kind, groups in request_groups(records.requests.context).items():
        for label, members in groups.items():
            of_group = _yardsticks(utility, choices, members, (POLICY, PLUG_IN, BEST_FIXED))
            found |= {("by_group", kind, label, *path): ratio for path, ratio in of_group.items()}
            share = Ratio(numerator=members.sum(axis=0) * 1.0, denominator=everyone.sum(axis=0) * 1.0)
            found["by_group", kind, label, "share_of_requests"] = share
    context = records.requests.context
    is_unseen = (np.asarray(context.tier) == HELD_OUT_TIER) | (np.asarray(context.link) == HELD_OUT_LINK)
    for label, members in ((SEEN, ~is_unseen), (HELD_OUT, is_unseen)):
        for name in (UNSEEN, ALONE, PLUG_IN):
            found["held_out", label, "regret", name] = mean_over(utility[ORACLE] - utility[name], members)
        found["held_out", label, "lost_unseen"] = mean_over(utility[ALONE] - utility[UNSEEN], members)
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), records.requests.context)
    believed = np.asarray(policy.quality(context_features(first)))
    parts = quality_parts(records, believed, oracle)
    return found | {("quality", name): ratio for name, ratio in vars(parts).items()}


def _yardsticks(
    utility: Mapping[str, np.ndarray], choices: Mapping[str, np.ndarray], members: np.ndarray, names: tuple[str, ...]
) -> dict[Path, Ratio]:
    found: dict[Path, Ratio] = {}
    for name in names:
        found["utility", name] = mean_over(utility[name], members)
        found["regret", name] = mean_over(utility[ORACLE] - utility[name], members)
        found["policy_minus", name] = mean_over(utility[POLICY] - utility[name], members)
        found["minus_plug_in", name] = mean_over(utility[name] - utility[PLUG_IN], members)
        found["oracle_equal", name] = mean_over((choices[name] == choices[ORACLE]).astype(np.float32), members)
    found["oracle_minus_plug_in",] = mean_over(utility[ORACLE] - utility[PLUG_IN], members)
    found["gap_closed",] = gap_closed(utility[POLICY], utility[PLUG_IN], utility[ORACLE], members)
    return found


def _nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        place = tree
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    return tree


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    for profile, found in result["profiles"].items():
        lines += [f"## {profile} profile", "", *_overall_lines(found), *_group_lines(found)]
    lines += ["## Contexts never trained on", "", *_held_out_lines(result["profiles"][PROFILES[0]])]
    lines += ["## How much there is to know", "", *_quality_lines(result["profiles"][PROFILES[0]])]
    return markdown_page(result, "Decisions of the planner", lines)


def _overall_lines(found: dict[str, Any]) -> list[str]:
    columns = ["planner", "utility", "policy - planner, 95%", "planner - plug-in, 95%", "regret against the oracle, 95%"]
    columns += ["equal to the oracle"]
    overall = found["overall"]
    rows = []
    for name, utility in overall["utility"].items():
        label = f"{BEST_FIXED}: {', '.join(sorted(set(found['best_fixed'])))}" if name == BEST_FIXED else name
        gain = "" if name == POLICY else with_interval(overall["policy_minus"][name], signed=True)
        over = "" if name == PLUG_IN else with_interval(overall["minus_plug_in"][name], signed=True)
        regret = "" if name == ORACLE else with_interval(overall["regret"][name], signed=True)
        rows.append([label, f"{utility['mean']:.4f}", gain, over, regret, f"{overall['oracle_equal'][name]['mean']:.1%}"])
    gap = overall["oracle_minus_plug_in"]
    closed = overall["gap_closed"]
    said = (
        f"The oracle is ahead of plug-in by {with_interval(gap, signed=True)}, {gap['mean'] / found['quality_gap']:.3f} dQ (dQ = "
        f"{found['quality_gap']:.4f}). "
    )
    if closed["mean"] is None:
        said += "That is not surely above zero, so there is no gap to close a share of."
    else:
        said += f"The policy closes {closed['mean']:.0%} of that gap [{closed['low']:.0%}, {closed['high']:.0%}]."
    return [*markdown_table(columns, rows), said, ""]


def _group_lines(found: dict[str, Any]) -> list[str]:
    columns = ["requests", "share", "utility of the policy", "policy - plug-in, 95%", "policy - best fixed, 95%"]
    columns += ["regret, 95%", "equal to the oracle", "gap closed"]
    rows = []
    for kind, groups in found["by_group"].items():
        for label, group in groups.items():
            if group["utility"][POLICY]["mean"] is None:
                rows.append([f"{kind}: {label}", "0%", *["-"] * 6])
                continue
            closed = group["gap_closed"]["mean"]
            rows.append(
                [
                    f"{kind}: {label}",
                    f"{group['share_of_requests']['mean']:.1%}",
                    f"{group['utility'][POLICY]['mean']:.4f}",
                    with_interval(group["policy_minus"][PLUG_IN], signed=True),
                    with_interval(group["policy_minus"][BEST_FIXED], signed=True),
                    with_interval(group["regret"][POLICY], signed=True),
                    f"{group['oracle_equal'][POLICY]['mean']:.1%}",
                    "no gap" if closed is None else f"{closed:.0%}",
                ]
            )
    return markdown_table(columns, rows)


def _held_out_lines(found: dict[str, Any]) -> list[str]:
    held_out = found["held_out"]
    columns = ["planner", "regret, seen contexts", "regret, held-out contexts", "held-out / seen, 95%"]
    rows = [
        [
            name,
            with_interval(held_out[SEEN]["regret"][name], signed=True),
            with_interval(held_out[HELD_OUT]["regret"][name], signed=True),
            with_interval(held_out["quotient"][name]),
        ]
        for name in (UNSEEN, ALONE, PLUG_IN)
    ]
    lost = held_out[HELD_OUT]["lost_unseen"]
    quotient = held_out["quotient"][UNSEEN]["mean"]
    if quotient is None:
        verdict = "Regret on seen contexts is not surely above zero, so a quotient of regrets says nothing. "
    else:
        verdict = f"At most {MAX_QUOTIENT} is wanted, and it is {quotient:.2f}. "
    said = (
        f"Held out: every request of a {HELD_OUT_TIER.name.lower()}-tier device or over 3G. {verdict}Never having seen them costs "
        f"{with_interval(lost, signed=True)} utility on them, {lost['mean'] / found['quality_gap']:.3f} dQ, against the same training on "
        "all contexts."
    )
    return [*markdown_table(columns, rows), said, ""]


def _quality_lines(found: dict[str, Any]) -> list[str]:
    quality = found["quality"]
    total = sum(quality[name]["mean"] for name in ("request", "plan", "interaction"))
    told = {
        "request": "the request as a whole: moves no decision",
        "plan": "the plan: what plug-in knows",
        "interaction": "plan x request: all the rest",
        "cell": "of the rest: what the oracle's cells explain",
        "policy": "of the rest: what the policy's beliefs predict",
        "oracle": "of the rest: what the oracle's beliefs predict",
    }
    rows = []
    for name, text in told.items():
        part = quality[name]
        bounds = ", ".join(f"{value / total:.2%}" for value in (part["low"], part["high"]))
        rows.append([text, f"{part['mean']:.6f}", f"{part['mean'] / total:.2%} [{bounds}]"])
    cell, rest = max(quality["cell"]["mean"], 0.0), quality["interaction"]["mean"]
    said = (
        f"Variance of the quality 1 / log2(1 + rank) over test requests with a kept embedding and over plans. Plans differ by "
        f"{quality['plan']['mean'] ** 0.5:.4f} (root mean square) on average over users; what a context adds to that is {cell**0.5:.4f}, "
        f"while single requests scatter by {rest**0.5:.4f} around it, which nobody knows before. A decision differs from plug-in's only "
        "where what the context adds exceeds the margin between plug-in's two best plans. Beliefs that predict less than zero cost more by "
        "their own errors than they tell."
    )
    return [*markdown_table(["part", "mean square", "share of the variance, 95%"], rows), said, ""]


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, grid = pyplot.subplots(2, 3, figsize=(18, 12), width_ratios=(1.0, 1.2, 1.0))
    for row, (profile, found) in enumerate(result["profiles"].items()):
        _draw_overall(grid[row, 0], found, f"{result['dataset']}, {profile} profile")
        _draw_groups(grid[row, 1], found)
    _draw_equal(grid[0, 2], result["profiles"])
    _draw_quality(grid[1, 2], result["profiles"][PROFILES[0]]["quality"])
    return figure


def _draw_overall(axes: Any, found: dict[str, Any], title: str) -> None:
    """What the policy gains over the planners that are near it; the table has the others."""
    shown = (BEST_FIXED, PLUG_IN, ALONE, UNSEEN, ORACLE, OTHER_ORACLE)
    gains = {name: found["overall"]["policy_minus"][name] for name in shown}
    means, bars = error_bars(list(gains.values()))
    places = np.arange(len(gains))
    axes.errorbar(means, places, xerr=bars, fmt="o", capsize=3, color="tab:blue")
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(places, gains)
    axes.invert_yaxis()
    axes.set_xlabel("utility: policy - planner, 95%")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)


def _draw_groups(axes: Any, found: dict[str, Any]) -> None:
    """Regret of policy and plug-in against the oracle in every group."""
    rows = [(kind, label, group) for kind, groups in found["by_group"].items() for label, group in groups.items()]
    rows = [(f"{kind}: {label}", group) for kind, label, group in rows if group["utility"][POLICY]["mean"] is not None]
    for shift, (name, colour) in enumerate(((POLICY, "tab:blue"), (PLUG_IN, "tab:orange"))):
        means, bars = error_bars([group["regret"][name] for _, group in rows])
        places = np.arange(len(rows)) + 0.3 * shift - 0.15
        axes.errorbar(means, places, xerr=bars, fmt="o", markersize=4, capsize=2, color=colour, label=name)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=6)  # labels of more would overlap
    axes.set_xlabel("regret against the context oracle, 95% by user")
    axes.set_title("regret by group (left is better)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()


def _draw_equal(axes: Any, profiles: dict[str, Any]) -> None:
    """Share of decisions that equal the oracle's."""
    names = [name for name in profiles[PROFILES[0]]["overall"]["oracle_equal"] if name not in (ORACLE, HINDSIGHT)]
    for shift, (profile, found) in enumerate(profiles.items()):
        means, bars = error_bars([found["overall"]["oracle_equal"][name] for name in names])
        axes.barh(np.arange(len(names)) + 0.36 * shift - 0.18, means, 0.34, xerr=bars, capsize=2, label=profile)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.8)  # room for the legend beside the bars
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("share of requests, 95%")
    axes.set_title("decisions that equal the oracle's")
    axes.legend(loc="upper right")


def _draw_quality(axes: Any, quality: dict[str, Any]) -> None:
    """How much of the differences between plans anybody can know."""
    names = {
        "plan": "plan\n(plug-in knows)",
        "cell": "context cell\n(oracle can know)",
        "interaction": "plan x request\n(all the rest)",
    }
    means, bars = error_bars([quality[name] for name in names])
    axes.bar(range(len(names)), np.sqrt(np.maximum(means, 0.0)), 0.6, color=("tab:orange", "tab:green", "tab:gray"))
    tops = np.sqrt(np.maximum(np.asarray(means)[None, :] + np.array([[-1.0], [1.0]]) * bars, 0.0))
    axes.vlines(range(len(names)), tops[0], tops[1], color="black")
    axes.set_xticks(range(len(names)), names.values(), fontsize=7)
    axes.set_ylabel("root mean square, in units of quality")
    axes.set_title("how much the quality of plans differs")
    axes.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    run_script(main, page)
