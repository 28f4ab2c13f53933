"""How much of a user becomes known at each egress level?

    python experiments/privacy_exposure.py --run runs/ml-1m

Two attackers, each trained on half of the users and let loose on the other half, read what a level releases. One recovers the items
of the history (recall@20), whose normalised recall is the exposure that planners weigh. The other infers personal attributes where the
data has them: the area under the ROC curve, one value against the rest, which is .5 for knowing nothing, and the accuracy above that of
always guessing the most common value. Both have a null control (releases shuffled among users) and a positive one (raw histories).

FULL releases consented attributes: there an attribute is told, which needs no inference, and the figure still shows what could be
inferred from the rest. Trains the system where ``--work`` does not have it, or takes ``--run``; what is attacked depends on the data and
the sizes of a release only, not on weights. Writes ``privacy-exposure-<dataset>.json``, ``.md``, ``.png``.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from harness import Options, Study, error_bars, markdown_page, markdown_table, run_script, with_interval, write_results

from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.metrics import paired_intervals
from cda4rec_jax.pipeline.exposure import AttackedUsers, AttributeExposure, attacked_users, measure_attributes
from cda4rec_jax.planner.plan_space import RELEASING_LEVELS
from cda4rec_jax.privacy.attacks.history_recovery import history_recovery
from cda4rec_jax.privacy.attacks.ridge import silent, whole

QUESTION = "How much of a user becomes known at each egress level?"
ATTACK = (
    "attackers know histories, releases and attributes of half of the users and attack the other half, then the halves swap; training "
    "histories; ridge regression, strength chosen on the attacker's own users; 95% intervals over attacked users, attackers fixed"
)
NOTHING, RAW = "nothing", "raw history"


def main(options: Options) -> dict[str, Any]:
    """Both attacks on every level, with their controls."""
    study = Study(options)
    trained = study.ours(0)
    with study.console.status("attacking"):
        attacked = attacked_users(trained.corpus, trained.config)
        result = study.result(
            QUESTION,
            protocol=ATTACK,
            attacked_users=len(attacked.users),
            history_recovery=_history(attacked, study.interactions.num_items),
            attribute_inference=[_attribute(found) for found in measure_attributes(trained.corpus, attacked)],
        )
    result["users_evaluated"] = len(attacked.users)
    write_results(options.out, f"privacy-exposure-{study.name}", result, page(result), partial(_draw, result), study.console)
    return result


def _history(attacked: AttackedUsers, num_items: int) -> dict[str, Any]:
    """Recall of every level with its interval, that of its null control, and of the two ends of the scale."""
    given = (attacked.offsets, attacked.items, num_items)
    shown = {
        NOTHING: silent(len(attacked.users)),
        **{level.name.lower(): one for level, one in attacked.releases.items()},
        **{f"null {level.name.lower()}": one.shuffled(0) for level, one in attacked.releases.items()},
        RAW: whole(attacked.offsets, attacked.items),
    }
    recalls = np.stack([history_recovery(release, *given) for release in shown.values()])[:, :, None]
    found = paired_intervals(recalls, np.zeros((1, *recalls.shape[1:])))
    return {
        name: {"mean": one.mean_difference, "low": one.low, "high": one.high, "users": one.num_users}
        for name, one in zip(shown, found, strict=True)
    }


def _attribute(found: AttributeExposure) -> dict[str, Any]:
    """As JSON: levels by name."""
    by_level = {
        level.name.lower(): {
            "told": found.told[level],
            "inferred": asdict(found.inferred[level]),
            "null": asdict(found.null[level]),
        }
        for level in RELEASING_LEVELS
    }
    return {
        "attribute": found.name,
        "num_values": found.num_values,
        "majority_accuracy": found.majority_accuracy,
        "levels": by_level,
        RAW: asdict(found.raw),
    }


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    recovery = result["history_recovery"]
    bottom, top = recovery[NOTHING]["mean"], recovery[RAW]["mean"]
    rows = []
    for name in (NOTHING, *_levels(), RAW):
        null = recovery.get(f"null {name}")
        exposure = min(max((recovery[name]["mean"] - bottom) / (top - bottom), 0.0), 1.0)
        rows.append([name, with_interval(recovery[name]), "-" if null is None else with_interval(null), f"{exposure:.3f}"])
    lines = ["History recovery, recall@20:", ""]
    lines += markdown_table(["what leaves", "recall@20, 95%", "null control", "exposure"], rows)
    rows = []
    for one in result["attribute_inference"]:
        name = f"{one['attribute']} ({one['num_values']} values, majority {one['majority_accuracy']:.3f})"
        for level, found in one["levels"].items():
            told = "told where disclosed; inferred from the rest" if found["told"] else "inferred"
            rows.append([name, level, told, *_cells(found["inferred"]), *_cells(found["null"])])
        rows.append([name, RAW, "positive control", *_cells(one[RAW]), "-", "-"])
    if rows:
        columns = ["attribute", "what leaves", "", "area under ROC", "accuracy over majority", "null: area", "null: accuracy"]
        note = "FULL tells the other attributes, too, so that more can be inferred from it than from the raw history alone."
        lines += ["Attribute inference:", "", *markdown_table(columns, rows), note, ""]
    else:
        lines += ["The data has no user attributes to infer.", ""]
    return markdown_page(result, "Exposure by egress level", lines)


def _cells(found: dict[str, Any]) -> list[str]:
    return [with_interval(found["auc"]), with_interval(found["gain"], signed=True)]


def _levels() -> list[str]:
    return [level.name.lower() for level in EgressLevel if level in RELEASING_LEVELS]


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    attributes, levels = result["attribute_inference"], _levels()
    figure, panels = pyplot.subplots(1, 1 + len(attributes), figsize=(4.2 * (1 + len(attributes)), 4.2), squeeze=False)
    recovery = result["history_recovery"]
    ends = {"nothing": recovery[NOTHING]["mean"], "raw history": recovery[RAW]["mean"]}
    found = {"released": [recovery[name] for name in levels], "null control": [recovery[f"null {name}"] for name in levels]}
    _panel(panels[0, 0], levels, found, ends, f"{result['dataset']}: items of the history", "recall@20, 95%")
    for axes, one in zip(panels[0, 1:], attributes, strict=True):
        kinds = {"released": "inferred", "null control": "null"}
        found = {label: [one["levels"][name][kind]["auc"] for name in levels] for label, kind in kinds.items()}
        ends = {"knowing nothing": 0.5, "raw history": one[RAW]["auc"]["mean"]}
        _panel(axes, levels, found, ends, f"{one['attribute']} ({one['num_values']} values)", "area under ROC, 95%")
        axes.set_ylim(0.4, 1.0)
        axes.set_xticks(range(len(levels)), [f"{name}\n(told)" if one["levels"][name]["told"] else name for name in levels])
    return figure


def _panel(axes: Any, levels: list[str], found: dict[str, Any], ends: dict[str, float], title: str, label: str) -> None:
    """Estimates by level beside their null control, between the two ends of the scale."""
    for offset, (name, colour) in zip((-0.05, 0.05), (("released", "tab:red"), ("null control", "tab:gray")), strict=True):
        means, bars = error_bars(found[name])
        axes.errorbar(np.arange(len(levels)) + offset, means, bars, fmt="o", color=colour, capsize=3, label=name)
    for (name, height), style in zip(ends.items(), (":", "--"), strict=True):
        axes.axhline(height, color="black", linewidth=0.9, linestyle=style, label=name)
    axes.set_xticks(range(len(levels)), levels)
    axes.set_xlim(-0.4, len(levels) - 0.6)
    axes.set_xlabel("egress level")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    run_script(main, page)
