"""How well are cold and rare items recommended, and users with short histories?

    python experiments/cold_start.py --data DATA/ml-100k

Test accuracy by the number of training events of the target item, and by the length of the user's history: the system (its best fresh
plan by validation, and its cloud agent alone over the whole catalogue), the same system trained without text vectors, SASRec with
full cross-entropy on ids, and popularity.

Trains what ``--work`` does not have; with ``--run``, SASRec is taken from ``RUN/sasrec`` if it is there. Writes
``cold-start-<dataset>.json``, ``.md``, ``.png``.
"""

from functools import partial
from typing import Any

import numpy as np
from harness import (
    OURS,
    SASREC_CE,
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

from cda4rec_jax.data import Split
from cda4rec_jax.data.splits import targets, train_histories
from cda4rec_jax.evaluation.accuracy import HISTORY_STARTS, groups_of, popularity_ranks
from cda4rec_jax.planner import PLANS, plan_index

QUESTION = "How accurate is the system for cold and rare items, and for short histories; with text, and without it?"
TRAIN_EVENT_STARTS = (0, 1, 6, 21)  # of the target item
TEXTLESS, CLOUD, POPULARITY = "cda4rec without text", "cda4rec, cloud agent alone", "popularity"
COMPARED = {"minus_without_text": TEXTLESS, "minus_sasrec_ce": SASREC_CE}


def main(options: Options) -> dict[str, Any]:
    """Accuracy by how well the target item and the user are known."""
    study = Study(options)
    plan = study.best_plan([plan.name for plan in PLANS if plan.name.startswith("fresh")])
    users, positions = study.of_split(Split.TEST)
    train_counts = np.bincount(train_histories(study.interactions)[1], minlength=study.interactions.num_items + 1)
    ranks = _ranks(study, plan)
    ranks[POPULARITY] = [popularity_ranks(train_counts, study.interactions, users, positions)] * len(study.seeds)
    known = train_counts[targets(study.interactions, Split.TEST)[users]]
    result = study.result(
        QUESTION,
        plan=plan,
        overall=_group(ranks, "all", np.ones(len(users), bool)),
        by_train_events_of_the_target=[_group(ranks, *group) for group in groups_of(known, TRAIN_EVENT_STARTS).items()],
        by_history_length=[_group(ranks, *group) for group in groups_of(positions, HISTORY_STARTS).items()],
    )
    draw = partial(_draw, result)
    write_results(options.out, f"cold-start-{study.name}", result, page(result), draw, study.console)
    return result


def _ranks(study: Study, plan: str) -> dict[str, list[np.ndarray]]:
    """Test ranks of each seed by system."""
    place = plan_index(plan)
    textless = [study.plan_ranks(WITHOUT_TEXT, seed, study.without_text, Split.TEST)[:, place] for seed in study.seeds]
    return {
        OURS: study.test_ranks(plan),
        CLOUD: [study.cloud_ranks(OURS, seed, study.ours) for seed in study.seeds],
        TEXTLESS: textless,
        SASREC_CE: [study.cloud_ranks(SASREC_CE, seed, study.sasrec) for seed in study.seeds],
    }


def _group(ranks: dict[str, list[np.ndarray]], label: str, users: np.ndarray) -> dict[str, Any]:
    group: dict[str, Any] = {"group": label, "users": int(users.sum())}
    for metric in ("ndcg@10", "hit_rate@10"):
        columns = {name: values([one[users] for one in of_seed], metric) for name, of_seed in ranks.items()}
        group[metric] = estimates(columns | {name: columns[OURS] - columns[other] for name, other in COMPARED.items()})
    return group


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    systems = [OURS, CLOUD, TEXTLESS, SASREC_CE, POPULARITY]
    columns = ["", "users", *systems, f"{OURS} - without text, 95%", f"{OURS} - {SASREC_CE}, 95%"]
    lines = []
    parts = {"by_train_events_of_the_target": "training events of the target", "by_history_length": "events in the history"}
    for part, title in parts.items():
        rows = []
        for group in (result["overall"], *result[part]):
            found = group["ndcg@10"]
            means = ["-" if found[name]["mean"] is None else f"{found[name]['mean']:.4f}" for name in systems]
            gains = [with_interval(found[name], signed=True) for name in COMPARED]
            rows.append([group["group"], f"{group['users']:,}", *means, *gains])
        lines += [f"## ndcg@10 by {title}", "", *markdown_table(columns, rows)]
    lines += [f"{OURS} is its plan `{result['plan']}`, the best fresh one on validation.", ""]
    return markdown_page(result, "Cold start", lines)


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, panels = pyplot.subplots(2, 2, figsize=(13, 8))
    colours = {OURS: "tab:blue", CLOUD: "tab:cyan", TEXTLESS: "tab:green", SASREC_CE: "tab:gray", POPULARITY: "lightgray"}
    parts = {
        "by_train_events_of_the_target": "training events of the target item (users)",
        "by_history_length": "events in the user's history (users)",
    }
    for (accuracy, gains), (part, title) in zip(panels.T, parts.items(), strict=True):
        groups = result[part]
        place = np.arange(len(groups))
        for number, (name, colour) in enumerate(colours.items()):
            means = [group["ndcg@10"][name]["mean"] for group in groups]
            accuracy.bar(place + 0.16 * (number - 2), means, 0.16, color=colour, label=name)
        for number, (name, other) in enumerate(COMPARED.items()):
            means, bars = error_bars([group["ndcg@10"][name] for group in groups])
            shifted = place + 0.12 * (2 * number - 1)
            gains.errorbar(shifted, means, bars, fmt="o", capsize=3, color=colours[other], label=f"{OURS} - {other}")
        gains.axhline(0.0, color="black", linewidth=0.8)
        for axes in (accuracy, gains):
            axes.set_xticks(place, [f"{group['group']}\n({group['users']:,})" for group in groups])
            axes.set_xlim(-0.6, len(groups) - 0.4)
            axes.grid(axis="y", alpha=0.3)
        gains.set_xlabel(title)
    for axes, label in zip(panels[:, 0], ("test ndcg@10", "difference in ndcg@10, 95% paired by user"), strict=True):
        axes.set_ylabel(label)
        axes.legend(fontsize=8)
    panels[0, 0].set_title(f"{result['dataset']}: by the target item")
    panels[0, 1].set_title("by the user")
    return figure


if __name__ == "__main__":
    run_script(main, page)
