"""The main result on one dataset: what every planner makes of a trained run, beside SASRec and popularity.

    python experiments/main_result.py --run RUN [--baseline SASREC_RUN]

Trains nothing. Writes ``results/<dataset>.json`` and ``results/<dataset>.md`` beside this file.
"""

import sys
from pathlib import Path

import tyro
from rich.console import Console

from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation import Report, evaluate_run

RESULTS = Path(__file__).resolve().parent / "results"


def main(run: Path, baseline: Path | None = None, out: Path = RESULTS, users: int | None = None) -> Report:
    """Evaluate a run on the test split and store the result.

    Args:
        run: directory that ``cda4rec train`` wrote.
        baseline: run of preset sasrec on the same data; without it ``<run>/sasrec`` is taken if it is there.
        out: folder of the results.
        users: evaluate a sample of so many users.
    """
    console = Console(stderr=True)
    with console.status("loading the run") as status:
        report = evaluate_run(
            run,
            baseline=baseline,
            users=users,
            progress=lambda stage, done, total: status.update(f"{stage}: {done:,} of {total:,} users"),
        )
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(out / f"{report.dataset}.json")
    (out / f"{report.dataset}.md").write_text(report.to_markdown(), encoding="utf-8")
    return report


if __name__ == "__main__":
    try:
        tyro.cli(main).print()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
