"""What does each part of the system contribute?

    python experiments/contributions.py --data DATA/ml-100k

First, cloud on or off x device on or off, all over 100 candidates and the items that the device holds. Cloud on: retrieval by the
semantic embedding, whose score ranks; off: the popular items, without any semantic score and with an empty cache. Device on: structured
user modelling and its features; off: skipped. The main effects and the interaction, ``both - cloud - device + neither``, are paired by
user: by the level of consent (plans ``fresh-LEVEL-100-*``), and by how many events the cloud's view lags (plans ``reuse-100-*``).

Second, one part removed at a time, by the accuracy of ``fresh-full-100-device``: *text* (trained without text vectors), *joint* (deciders
trained after the trunks, see ``joint_vs_separate.py``), *packing* (each training row holds one history and padding, at equally many
targets a step: the same accuracy is expected, in more seconds), and each group of fusion features (deciders trained again on the
same trunks without them, against deciders trained again with all).

Trains what ``--work`` does not have; takes ``--run`` as the system. Writes ``contributions-<dataset>.json``, ``.md``, ``.png``.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from harness import (
    AGES,
    OURS,
    WITHOUT_TEXT,
    Options,
    Study,
    error_bars,
    estimates,
    markdown_page,
    markdown_table,
    run_script,
    values,
    with_interval,
    write_results,
)
from joint_vs_separate import FINAL_ONLY, SEPARATE, final_phase_only, separate

from cda4rec_jax.agents.device.features import FEATURES, STRUCTURED_FEATURES
from cda4rec_jax.data import Split
from cda4rec_jax.data.packing import PackedEpoch, PackingConfig
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.conditions import can_be_stale
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.planner import plan_index
from cda4rec_jax.runs.artifacts import TrainedSystem
from cda4rec_jax.training import RunConfig, refit_deciders

QUESTION = "What do the cloud, the device and each part of the system contribute?"
LEVELS = ("profile", "recent", "full")
PLAN = "fresh-full-100-device"
PADDED = "padded"


def feature_groups() -> dict[str, tuple[str, ...]]:
    """Features of the fusion head by the first word of their names; what describes the cloud's view goes with its score."""
    groups: dict[str, tuple[str, ...]] = {}
    for name in FEATURES:
        word = name.partition("_")[0]
        group = "cloud" if word == "level" else word
        if name != "structured_present":  # says only that the others are there
            groups[f"features: {group}"] = (*groups.get(f"features: {group}", ()), name)
    return groups | {"features: all of the device": STRUCTURED_FEATURES}


PARTS = ("text", "joint", "packing", *feature_groups())


def main(options: Options, parts: tuple[str, ...] = PARTS) -> dict[str, Any]:
    """The factorial table and the ablations.

    Args:
        options: of every experiment.
        parts: which of the parts to remove, one at a time.
    """
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"unknown parts {sorted(unknown)}: choose from {', '.join(PARTS)}")
    study = Study(options)
    positions = study.of_split(Split.TEST)[1]
    everyone = np.ones(len(positions), bool)
    result = study.result(
        QUESTION,
        by_consent=[_factorial(study, level, f"fresh-{level}-100", 0, everyone) for level in LEVELS],
        by_staleness=[_factorial(study, str(age), "reuse-100", age, can_be_stale(positions, age)) for age in AGES],
        ablation_plan=PLAN,
        ablations=[_ablation(study, part) for part in parts],
    )
    draw = partial(_draw, result)
    write_results(options.out, f"contributions-{study.name}", result, page(result), draw, study.console)
    return result


def _factorial(study: Study, condition: str, cloud_plans: str, age: int, users: np.ndarray) -> dict[str, Any]:
    """Cells, main effects and interaction of cloud x device on these users."""
    plans = {
        "both": f"{cloud_plans}-device",
        "cloud": f"{cloud_plans}-skip",
        "device": "local-skip-device",
        "neither": "local-skip-skip",
    }
    ranks = {
        name: study.test_ranks(plan, age) if name in ("both", "cloud") else study.test_ranks(plan, 0, EgressLevel.NOTHING)
        for name, plan in plans.items()
    }
    row: dict[str, Any] = {"condition": condition, "users": int(users.sum()), "plans": plans}
    for metric in ("ndcg@10", "hit_rate@10"):
        cells = {name: values([one[users] for one in of_seed], metric) for name, of_seed in ranks.items()}
        both, cloud, device, neither = (cells[name] for name in plans)
        effects = {
            "effect_of_cloud": (both - device + cloud - neither) / 2,
            "effect_of_device": (both - cloud + device - neither) / 2,
            "interaction": both - cloud - device + neither,
        }
        row[metric] = {"cells": estimates(cells), **estimates(effects)}
    return row


def _ablation(study: Study, part: str) -> dict[str, Any]:
    """Accuracy with and without one part, and what the part adds."""
    reference, removed = (OURS, study.ours), _removed(study, part)
    if part in feature_groups():
        reference = (FINAL_ONLY, partial(final_phase_only, study))
    row: dict[str, Any] = {"part": part, "with": reference[0], "without": removed[0]}
    ranks = {
        kind: [study.plan_ranks(variant, seed, load, Split.TEST)[:, plan_index(PLAN)] for seed in study.seeds]
        for kind, (variant, load) in {"with": reference, "without": removed}.items()
    }
    for metric in ("ndcg@10", "hit_rate@10"):
        columns = {kind: values(found, metric) for kind, found in ranks.items()}
        row[metric] = estimates(columns | {"contribution": columns["with"] - columns["without"]})
    row["training_seconds"] = {"with": study.training_seconds(reference[0]), "without": study.training_seconds(removed[0])}
    return row


def _removed(study: Study, part: str) -> tuple[str, Any]:
    """The variant that lacks a part, and what loads it under a seed."""
    if part == "text":
        return WITHOUT_TEXT, study.without_text
    if part == "joint":
        return SEPARATE, partial(separate, study)
    if part == "packing":
        return PADDED, lambda seed: study.trained(PADDED, seed, padded(study, study.config))
    variant = part.replace(": ", "-without-").replace(" ", "-")
    return variant, partial(_without_features, study, variant, feature_groups()[part])


def _without_features(study: Study, variant: str, names: tuple[str, ...], seed: int) -> TrainedSystem:
    study.ours(seed)
    system = replace(study.config.system, without_features=names)
    make = partial(refit_deciders, study.run_path(OURS, seed), system=system, overwrite=True)
    return study.trained(variant, seed, make=make)


def padded(study: Study, config: RunConfig) -> RunConfig:
    """The configuration with one history in each row, and as many more rows in a batch as keep the targets of a step."""
    packing = replace(config.packing, padded=True, row_tokens=config.packing.history_length + 1)
    text = np.zeros((study.interactions.num_items + 1, 1), np.float32)
    histories = Corpus(interactions=study.interactions, text=text).training_histories()
    counts = histories.category_counts()

    def num_rows(packing: PackingConfig) -> int:
        return PackedEpoch(histories, counts, packing, np.random.default_rng(0), all_levels=True).num_rows

    rows = round(config.train.rows_per_batch * num_rows(packing) / num_rows(config.packing))
    return replace(config, packing=packing, train=replace(config.train, rows_per_batch=rows))


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    effects = ("effect_of_cloud", "effect_of_device", "interaction")
    parts = {"by_consent": "consent", "by_staleness": "lag of the cloud's view, events"}
    for part, title in parts.items():
        columns = [title, "users", "neither", "cloud", "device", "both", "effect of cloud", "effect of device", "interaction"]
        rows = []
        for row in result[part]:
            cells = row["ndcg@10"]["cells"]
            means = ["-" if cells[name]["mean"] is None else f"{cells[name]['mean']:.4f}" for name in columns[2:6]]
            found = [with_interval(row["ndcg@10"][name], signed=True) for name in effects]
            rows.append([row["condition"], f"{row['users']:,}", *means, *found])
        lines += [f"## ndcg@10 of cloud x device, by {title.partition(',')[0]}", "", *markdown_table(columns, rows)]
    columns = ["part removed", "ndcg@10 with", "without", "contribution, 95%", "training s with", "without"]
    rows = []
    for row in result["ablations"]:
        found, seconds = row["ndcg@10"], row["training_seconds"]
        means = [f"{found[kind]['mean']:.4f}" for kind in ("with", "without")]
        taken = [f"{seconds[kind]:.0f}" for kind in ("with", "without")]
        rows.append([row["part"], *means, with_interval(found["contribution"], signed=True), *taken])
    lines += [f"## One part removed, `{result['ablation_plan']}`", "", *markdown_table(columns, rows)]
    lines += [
        "Feature groups and *joint*: seconds of the deciders on finished trunks; otherwise of the trunks with the deciders.",
        "",
    ]
    return markdown_page(result, "Contributions", lines)


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 5), gridspec_kw={"width_ratios": (1, 1.2, 1.4)})
    effects = {"effect_of_cloud": "tab:gray", "effect_of_device": "tab:blue", "interaction": "tab:red"}
    titles = ("by consent", "by events that the cloud's view lags")
    for axes, part, title in zip((left, middle), ("by_consent", "by_staleness"), titles, strict=True):
        rows = result[part]
        for number, (name, colour) in enumerate(effects.items()):
            means, bars = error_bars([row["ndcg@10"][name] for row in rows])
            place = np.arange(len(rows)) + 0.12 * (number - 1)
            axes.errorbar(place, means, bars, fmt="o", capsize=3, color=colour, label=name.replace("_", " "))
        axes.set_xticks(range(len(rows)), [row["condition"] for row in rows])
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
    left.set_ylabel(f"{result['dataset']}: effect on test ndcg@10, 95% intervals")
    middle.legend(loc="upper right", fontsize=8)
    rows = result["ablations"]
    means, bars = error_bars([row["ndcg@10"]["contribution"] for row in rows])
    right.errorbar(means, range(len(rows)), xerr=bars, fmt="o", capsize=3, color="tab:blue")
    right.set_yticks(range(len(rows)), [row["part"] for row in rows])
    right.invert_yaxis()
    right.axvline(0.0, color="black", linewidth=0.8)
    right.set_title("one part removed: what it contributes")
    right.set_xlabel(f"ndcg@10 of {result['ablation_plan']}, with minus without")
    right.locator_params(axis="x", nbins=5)
    right.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main, page)
