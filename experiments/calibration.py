"""Does the planner know how long requests take on this machine?

    python experiments/calibration.py --run runs/amazon-beauty

Calibrates a finished run as ``cda4rec calibrate`` does, which stores the measured cost profile in the run: sub-tasks and whole requests
of some users are measured, and then what the fitted profile predicts is held against requests of other users, with every plan and over
every link. The link is virtual, and its time the same on both sides but for the bytes, so the aim is for the error without it. Writes
``results/calibration-<dataset>.json``, ``.md``, ``.png``.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from harness import RESULTS, markdown_page, markdown_table, run_name, run_script, write_results
from rich.console import Console

from cda4rec_jax.cli.console import StagesView
from cda4rec_jax.runs.artifacts import load_trained
from cda4rec_jax.runtime.calibration import Calibration, calibrate
from cda4rec_jax.runtime.recommend import Recommender

QUESTION = "Does the planner know how long requests take on this machine?"
FAMILIES = {"fresh": "tab:blue", "reuse": "tab:orange", "local": "tab:green", "cloud": "tab:purple"}


def main(run: Path, rounds: int = 30, out: Path = RESULTS) -> dict[str, Any]:
    """Calibrate, and draw what was predicted against what was measured.

    Args:
        run: directory that ``cda4rec train`` wrote; its measured cost profile is replaced, and the earlier one kept.
        rounds: requests of every plan, and calls of every sub-task; as many more validate.
        out: folder of the results.
    """
    console, trained = Console(file=sys.stderr), load_trained(run)
    with StagesView(console) as view, Recommender(trained) as recommender:
        found = calibrate(trained, recommender, rounds, view.progress)
    interactions, name = trained.corpus.interactions, run_name(trained.run)
    result = {
        "question": QUESTION,
        "dataset": name,
        "num_users": interactions.num_users,
        "num_items": interactions.num_items,
        "users_evaluated": found.users,
        "seeds": 1,
        "protocol": (
            f"{found.rounds} rounds in which all plans and sub-tasks take turns, medians fitted on {found.users} users; as many rounds "
            "of as many other users validate; warm, one request at a time; the link as estimated"
        ),
        "meets_target": found.meets_target,
        "num_requests": len(found.requests),
        **{field: value for field, value in msgspec.to_builtins(found).items() if field != "requests"},
    }
    draw = partial(_draw, name, found)
    write_results(out, f"calibration-{name}", result, page(result), draw, console)
    return result


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    overall, (before, after) = result["overall"], result["load_average"]
    verdict = "within" if result["meets_target"] else "above"
    lines = [
        f"Median absolute percentage error without the time on the link {overall['compute_error']:.1%}, {verdict} the aim of "
        f"{result['target']:.0%}, with a bias of {overall['bias']:+.1%}; with it {overall['error']:.1%}. {result['num_requests']:,} "
        f"requests, {result['left_out']} left out. Load average {before:.1f} before and {after:.1f} after.",
        "",
    ]
    rows = [
        [name, *(f"{one['measured'][key]:.2f}" for key in ("p50_ms", "p95_ms")), f"{one['predicted_ms']:.2f}", *_errors(one)]
        for name, one in {**result["by_plan"], **result["by_link"], "all": overall}.items()
    ]
    columns = ["plan or link", "p50 ms", "p95 ms", "predicted ms", "error", "error without link", "bias without link"]
    lines += markdown_table(columns, rows)
    rows = [
        [one["bucket"], *(f"{one[kind][key]:.3f}" for kind in ("alone", "in_requests") for key in ("p50_ms", "p95_ms"))]
        for one in result["subtasks"]
    ]
    lines += markdown_table(["sub-task, ms", "alone p50", "alone p95", "in requests p50", "in requests p95"], rows)
    return markdown_page(result, "Calibration", lines)


def _errors(one: dict[str, Any]) -> list[str]:
    return [f"{one['error']:.1%}", f"{one['compute_error']:.1%}", f"{one['bias']:+.1%}"]


def _draw(dataset: str, found: Calibration, pyplot: Any) -> Any:
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5.2))
    whole = [(one.predicted_ms, one.measured_ms) for one in found.requests]
    compute = [(one.predicted_compute_ms, one.measured_compute_ms) for one in found.requests]
    families = np.array([one.plan.partition("-")[0] for one in found.requests])
    _scatter(panels[0], np.array(whole), families, f"whole requests: median error {found.overall.error:.1%}")
    _scatter(panels[1], np.array(compute), families, f"without the link: median error {found.overall.compute_error:.1%}")
    panels[0].legend(title="plans")
    figure.suptitle(f"{dataset}: predicted against measured, {len(found.requests):,} requests of users not fitted")
    return figure


def _scatter(axes: Any, values: np.ndarray, families: np.ndarray, title: str) -> None:
    """One dot a request, on logarithmic axes with the diagonal."""
    for name, colour in FAMILIES.items():
        predicted, measured = values[families == name].T
        axes.scatter(predicted, measured, s=9, alpha=0.5, color=colour, label=name, linewidths=0)
    low, high = values.min() * 0.8, values.max() * 1.2
    axes.plot((low, high), (low, high), color="black", linewidth=0.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("predicted, ms")
    axes.set_ylabel("measured, ms")
    axes.set_title(title)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    run_script(main, page)
