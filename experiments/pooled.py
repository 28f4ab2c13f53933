"""The system against SASRec with full cross-entropy, over the users of several datasets together.

    python experiments/pooled.py

Reads the tables that ``main_table.py`` wrote (by default those in ``results/``) and trains nothing. Writes ``pooled.json``, ``.md`` and
``.png``.
"""

import json
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from harness import OURS, RESULTS, SASREC_CE, error_bars, markdown_table, run_script, with_interval, write_results
from main_table import CLOUD, PLAN
from rich.console import Console

from cda4rec_jax.errors import UserError
from cda4rec_jax.runs import provenance

ROWS = (OURS, PLAN, CLOUD)
METRIC_NAMES = ("hit_rate@10", "ndcg@10")
TABLES = tuple(RESULTS / f"table-{name}.json" for name in ("ml-1m", "amazon-beauty-minilm", "ml-100k", "ml-latest-small"))
BY_USER, BY_DATASET = "pooled, each user once", "pooled, each dataset once"
PROTOCOL = (
    "differences and intervals of each dataset are those of its table; datasets count as independent samples, so variances add: that "
    "of a dataset is taken from its 95% interval, and the pooled interval is normal"
)

Estimate = dict[str, Any]  # mean, low, high, users


def main(tables: tuple[Path, ...] = TABLES, out: Path = RESULTS) -> dict[str, Any]:
    """Pool the differences of finished main tables.

    Args:
        tables: JSON files that main_table.py wrote, each of another dataset.
        out: folder of the results.
    """
    read = {path.stem.removeprefix("table-"): _table(path) for path in tables}
    fingerprints = [table["provenance"]["dataset_fingerprint"] for table in read.values()]
    if not tables or len(set(fingerprints)) != len(tables):
        raise UserError(f"got tables {', '.join(map(str, tables)) or 'none'}: name at least one, each of another dataset")
    found = {study: _differences(study, table) for study, table in read.items()}
    datasets = list(found.values())
    for name, weighted in ((BY_USER, True), (BY_DATASET, False)):
        found[name] = {
            metric: {row: pooled([one[metric][row] for one in datasets], by_user=weighted) for row in ROWS}
            for metric in METRIC_NAMES
        }
    result = {
        "question": "Is the system more accurate than SASRec with full cross-entropy, over all users of these datasets?",
        "seeds": {study: table["seeds"] for study, table in read.items()},
        "commits_of_tables": {study: table["provenance"]["commit"] for study, table in read.items()},
        "protocol": PROTOCOL,
        "minus_sasrec_ce": found,
        "provenance": provenance(dataset_fingerprint=" ".join(fingerprints)),
    }
    write_results(out, "pooled", result, page(result), partial(_draw, result), Console(stderr=True))
    return result


def pooled(found: list[Estimate], *, by_user: bool) -> Estimate:
    """The mean over independent samples, weighted by their users or all alike, with its interval."""
    users = np.array([one["users"] for one in found])
    weights = users / users.sum() if by_user else np.full(len(found), 1 / len(found))
    normal = NormalDist().inv_cdf(0.975)
    deviations = np.array([(one["high"] - one["low"]) / (2 * normal) for one in found])
    mean = float(weights @ [one["mean"] for one in found])
    half = normal * float(np.sqrt(np.sum((weights * deviations) ** 2)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "users": int(users.sum())}


def _table(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no table that can be read ({error}); expected a JSON file that main_table.py wrote"
        ) from error


def _differences(study: str, table: dict[str, Any]) -> dict[str, dict[str, Estimate]]:
    """By metric and row of the table: what it has above SASRec."""
    against = {row["system"]: row["minus_sasrec_ce"] for row in table.get("rows", [])}
    if lacking := [row for row in ROWS if not against.get(row)]:
        raise UserError(
            f"the table of {study} does not compare {', '.join(lacking)} with {SASREC_CE}; expected one that main_table.py wrote"
        )
    return {
        name: {
            row: {
                "mean": against[row][name]["mean_difference"],
                "low": against[row][name]["low"],
                "high": against[row][name]["high"],
                "users": against[row][name]["num_users"],
            }
            for row in ROWS
        }
        for name in METRIC_NAMES
    }


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    rows = [
        [
            study,
            f"{found['ndcg@10'][row]['users']:,}",
            row,
            *(with_interval(found[name][row], signed=True) for name in METRIC_NAMES),
        ]
        for study, found in result["minus_sasrec_ce"].items()
        for row in ROWS
    ]
    sources = [
        f"{study} (commit {str(commit)[:12]}, {result['seeds'][study]} seeds)"
        for study, commit in result["commits_of_tables"].items()
    ]
    lines = [
        "# Minus SASRec-CE, 95%",
        "",
        *markdown_table(["data", "users", "system", *METRIC_NAMES], rows),
        f"Protocol: {result['protocol']}.",
        "",
        f"From the tables of {', '.join(sources)}; pooled at commit {str(result['provenance']['commit'])[:12]}.",
    ]
    return "\n".join([*lines, ""])


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(figsize=(10, 4.5))
    studies = list(result["minus_sasrec_ce"])
    for shift, row in zip((-0.2, 0.0, 0.2), ROWS, strict=True):
        means, bars = error_bars([result["minus_sasrec_ce"][study]["ndcg@10"][row] for study in studies])
        axes.errorbar(np.arange(len(studies)) + shift, means, bars, fmt="o", capsize=3, label=row)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(studies)), [study.replace(", ", ",\n") for study in studies])
    axes.set_ylabel("test ndcg@10 minus SASRec-CE, 95%")
    axes.set_title("intervals paired by user")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main, page)
