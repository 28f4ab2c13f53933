"""Evaluation of a finished run: accuracy of everything that ranks, and what planners make of it.

- ``evaluate_run``: from a run directory to a ``Report``.
- ``Report``: the numbers, as JSON, on a console, or as Markdown.
"""

from cda4rec_jax.evaluation.evaluate import evaluate_run
from cda4rec_jax.evaluation.gate import Gate
from cda4rec_jax.evaluation.report import PlannerRow, Report, SystemRow

__all__ = ["Gate", "PlannerRow", "Report", "SystemRow", "evaluate_run"]
