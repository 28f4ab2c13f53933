"""How much accuracy is lost when the device models nothing of the user?

    python experiments/without_device.py --data DATA/ml-100k

Compared are the best plan that skips structured user modelling (the cloud's scores and popularity decide, also among the items that
the device holds) and the best plan that does it on the device, each chosen on validation: overall, by the length of the user's history,
and by how many events the cloud's view lags behind. A third way gives the cloud the whole history and lets it do the device's part
(plan ``cloud-full-cloud``): as accurate by construction, at the price of FULL consent in every request.

Trains the system where ``--work`` does not have it, or takes ``--run``. Writes ``without-device-<dataset>.json``, ``.md``, ``.png``.
"""

from functools import partial
from typing import Any

import numpy as np
from harness import (
    AGES,
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
from cda4rec_jax.evaluation.accuracy import HISTORY_STARTS, groups_of
from cda4rec_jax.evaluation.conditions import can_be_stale
from cda4rec_jax.messages import Placement
from cda4rec_jax.planner import PLANS

QUESTION = "How much accuracy is lost when structured user modelling on the device is off?"


def main(options: Options) -> dict[str, Any]:
    """Accuracy of the best plan without and with structured user modelling on the device."""
    study = Study(options)
    positions = study.of_split(Split.TEST)[1]
    rows = [_compared(study, f"cloud's view {age} events old", age, can_be_stale(positions, age)) for age in AGES]
    by_length = groups_of(positions, HISTORY_STARTS)
    everyone = np.ones(len(positions), bool)
    by_cloud = values(study.test_ranks("cloud-full-cloud"))
    result = study.result(
        QUESTION,
        overall=_compared(study, "all users", 0, everyone),
        by_history_length=[_compared(study, f"{label} events", 0, users) for label, users in by_length.items()],
        by_staleness=rows,
        cloud_does_the_devices_part={"plan": "cloud-full-cloud", **estimates({"ndcg@10": by_cloud})},
    )
    draw = partial(_draw, result)
    write_results(options.out, f"without-device-{study.name}", result, page(result), draw, study.console)
    return result


def families(age: int) -> tuple[list[str], list[str]]:
    """Names of the plans that use the cloud and skip structured modelling, and of those that do it on the device.

    With a view of now these ask the cloud anew; with an older one they reuse what the device has of it.
    """
    wanted = Placement.CLOUD if age == 0 else Placement.REUSE
    plans = [plan for plan in PLANS if plan.semantic is wanted]
    of = {kind: [plan.name for plan in plans if plan.structured is kind] for kind in (Placement.SKIP, Placement.DEVICE)}
    return of[Placement.SKIP], of[Placement.DEVICE]


def _compared(study: Study, condition: str, age: int, users: np.ndarray) -> dict[str, Any]:
    """Accuracy of these users without and with structured user modelling on the device, and the difference."""
    without, with_device = (study.best_plan(names, age) for names in families(age))
    row: dict[str, Any] = {"condition": condition, "plan_without": without, "plan_with": with_device, "users": int(users.sum())}
    for metric in ("ndcg@10", "hit_rate@10"):
        off, on = (values([ranks[users] for ranks in study.test_ranks(plan, age)], metric) for plan in (without, with_device))
        row[metric] = estimates({"without": off, "with": on, "lost": on - off})
    return row


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    columns = ["", "users", "plan without", "plan with", "ndcg@10 without", "ndcg@10 with", "lost, 95%", "hit_rate@10 lost, 95%"]
    rows = []
    for row in (result["overall"], *result["by_history_length"], *result["by_staleness"][1:]):
        ndcg, hit_rate = row["ndcg@10"], row["hit_rate@10"]
        means = ["-" if ndcg[name]["mean"] is None else f"{ndcg[name]['mean']:.4f}" for name in ("without", "with")]
        lost = [with_interval(found["lost"], signed=True) for found in (ndcg, hit_rate)]
        rows.append([row["condition"], f"{row['users']:,}", row["plan_without"], row["plan_with"], *means, *lost])
    whole = result["cloud_does_the_devices_part"]
    note = (
        f"With the whole history in the cloud, `{whole['plan']}` does the device's part there: ndcg@10 "
        f"{with_interval(whole['ndcg@10'])}, and only where consent is FULL."
    )
    return markdown_page(result, "Without the device", [*markdown_table(columns, rows), note, ""])


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, (accuracy, stale, history) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    rows = result["by_staleness"]
    lags = [f"{age}\n({row['users']:,})" for age, row in zip(AGES, rows, strict=True)]
    for name, colour in (("without", "tab:gray"), ("with", "tab:blue")):
        means, _ = error_bars([row["ndcg@10"][name] for row in rows])
        accuracy.plot(lags, means, color=colour, marker="o", label=f"{name} the device")
    accuracy.set_ylim(bottom=0)
    accuracy.set_ylabel("test ndcg@10")
    accuracy.set_title(f"{result['dataset']}: accuracy")
    accuracy.legend()
    means, bars = error_bars([row["ndcg@10"]["lost"] for row in rows])
    stale.errorbar(lags, means, bars, color="tab:red", marker="o", capsize=3)
    stale.set_title("lost without the device, by staleness")
    stale.set_ylabel("ndcg@10 lost without, 95% by user")
    groups = [result["overall"], *result["by_history_length"]]
    means, bars = error_bars([row["ndcg@10"]["lost"] for row in groups])
    names = [row["condition"].replace(" events", "").replace(" and more", "+").replace("all users", "all") for row in groups]
    labels = [f"{name}\n({row['users']:,})" for name, row in zip(names, groups, strict=True)]
    history.errorbar(labels, means, bars, fmt="o", color="tab:red", capsize=3)
    history.set_title("lost without the device, by history")
    history.set_xlabel("events in the history (users)")
    for axes in (accuracy, stale, history):
        axes.grid(axis="y", alpha=0.3)
    for axes in (accuracy, stale):
        axes.set_xlabel("events by which the cloud's view lags (users)")
    for axes in (stale, history):
        axes.axhline(0.0, color="black", linewidth=0.8)
    return figure


if __name__ == "__main__":
    run_script(main, page)
