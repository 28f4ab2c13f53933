"""The system against SASRec with full cross-entropy, over the users of several datasets together.

    python experiments/pooled.py --studies ml-1m amazon-beauty-minilm ml-100k ml-latest-small --seeds 3

Reads what ``main_table.py`` keeps in ``--work``, one folder for each study, and trains nothing. Writes ``results/pooled.json``, ``.md``
and ``.png``.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    OURS,
    PROTOCOL,
    RESULTS,
    SASREC_CE,
    WORK,
    Values,
    error_bars,
    estimates,
    markdown_table,
    run_script,
    values,
    with_interval,
    write_results,
)
from main_table import CLOUD, PLAN, Cell
from rich.console import Console

from cda4rec_jax.errors import UserError
from cda4rec_jax.runs import provenance

ROWS = (OURS, PLAN, CLOUD)
METRIC_NAMES = ("hit_rate@10", "ndcg@10")


def main(studies: tuple[str, ...], seeds: int = 3, work: Path = WORK, out: Path = RESULTS) -> dict[str, Any]:
    """Pool the ranks of finished main tables.

    Args:
        studies: folders of ``work``, as ``main_table.py`` named them.
        seeds: seeds 0 to seeds - 1 of each.
        work: where the main tables keep ranks.
        out: folder of the results.
    """
    if len(set(studies)) != len(studies) or not studies or seeds < 1:
        raise UserError(f"got studies {' '.join(studies)!r} and {seeds} seeds: name each study once, and at least 1 seed")
    found = {study: _differences(work / study, seeds) for study in studies}
    every = {name: {row: np.concatenate([of[name][row] for of in found.values()]) for row in ROWS} for name in METRIC_NAMES}
    fingerprints = [json.loads((work / study / "settings.json").read_text(encoding="utf-8"))["data"] for study in studies]
    result = {
        "question": "Is the system more accurate than SASRec with full cross-entropy, over all users of these datasets?",
        "studies": list(studies),
        "seeds": seeds,
        "protocol": PROTOCOL,
        "minus_sasrec_ce": {
            study: {name: estimates(rows) for name, rows in of.items()} for study, of in (*found.items(), ("pooled", every))
        },
        "provenance": provenance(dataset_fingerprint=" ".join(fingerprints)),
    }
    write_results(out, "pooled", result, page(result), partial(_draw, result), Console(stderr=True))
    return result


def _differences(folder: Path, seeds: int) -> dict[str, dict[str, Values]]:
    """By metric and row of the table: the value of each user and seed above that of SASRec."""
    cells = {system: [_cell(folder / f"{system}-{seed}.npz") for seed in range(seeds)] for system in (OURS, SASREC_CE)}
    theirs = [cell.ranks[SASREC_CE] for cell in cells[SASREC_CE]]
    return {
        name: {row: values([cell.ranks[row] for cell in cells[OURS]], name) - values(theirs, name) for row in ROWS}
        for name in METRIC_NAMES
    }


def _cell(path: Path) -> Cell:
    if not path.is_file():
        raise UserError(f"{path} is not there: run main_table.py on these data first, with as many seeds")
    return Cell.load(path)


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
    lines = [
        f"# Minus SASRec-CE, {result['seeds']} seeds, 95%",
        "",
        *markdown_table(["data", "users", "system", *METRIC_NAMES], rows),
    ]
    source = result["provenance"]
    lines += [
        f"Protocol: {result['protocol']}. *pooled* has every user of every dataset once, so large datasets weigh more.",
        "",
    ]
    return "\n".join([*lines, f"Commit {str(source['commit'])[:12]}, {source['cores']} cores of {source['cpu_model']}.", ""])


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    studies = list(result["minus_sasrec_ce"])
    for shift, row in zip((-0.2, 0.0, 0.2), ROWS, strict=True):
        means, bars = error_bars([result["minus_sasrec_ce"][study]["ndcg@10"][row] for study in studies])
        axes.errorbar(np.arange(len(studies)) + shift, means, bars, fmt="o", capsize=3, label=row)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(studies)), studies)
    axes.set_ylabel("test ndcg@10 minus SASRec-CE, 95%")
    axes.set_title(f"{result['seeds']} seeds, intervals paired by user")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main, page)
