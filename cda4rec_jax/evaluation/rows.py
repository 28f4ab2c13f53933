"""Rows of a report, from ranks and answers."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from cda4rec_jax.evaluation.accuracy import METRICS, mean_metrics, per_user
from cda4rec_jax.evaluation.answers import HINDSIGHT, ORACLE, PLUG_IN, Answers, fixed_name
from cda4rec_jax.evaluation.gate import plan_shares
from cda4rec_jax.evaluation.report import FAMILIES, PlannerRow, SystemRow
from cda4rec_jax.metrics import Interval, paired_interval, paired_intervals, summarise_latency
from cda4rec_jax.pipeline.planners import mean_quality, possible_plans
from cda4rec_jax.pipeline.population import PlanRecords

POPULARITY, SASREC_ROW, CLOUD_ROW = "popularity", "SASRec (full CE)", "cloud agent, full catalogue"
POLICY, RULES, RANDOM = "policy", "rules", "random"
KINDS = {POLICY: "policy", RULES: "simple", RANDOM: "simple", PLUG_IN: "plug-in", ORACLE: "oracle", HINDSIGHT: "upper bound"}
COMPARED = ("hit_rate@10", "ndcg@10")


def plug_in_means(records: PlanRecords) -> Float[np.ndarray, "p"]:
    """Mean quality of each plan over the requests that it could serve."""
    return mean_quality(records.quality, _possible(records))


def _possible(records: PlanRecords) -> Bool[np.ndarray, "n p"]:
    first = jax.tree.map(lambda leaf: leaf[0], records.requests.context)
    return np.asarray(possible_plans(first, records.requests.predicted.space))


def system_row(name: str, ranks: Int[np.ndarray, "n"], reference: Int[np.ndarray, "n"] | None) -> SystemRow:
    """Accuracy of one system; ``reference`` are the ranks of SASRec on the same users."""
    compared = {}
    if reference is not None and name != SASREC_ROW:
        compared = {metric: paired_interval(per_user(ranks, metric), per_user(reference, metric)) for metric in COMPARED}
    return SystemRow(name=name, num_users=len(ranks), metrics=mean_metrics(ranks), minus_sasrec=compared)


def plan_rows(records: PlanRecords, wanted: Sequence[str], reference: Int[np.ndarray, "n"] | None) -> list[SystemRow]:
    """Accuracy of each wanted plan on the users whom it could serve."""
    possible, rows = _possible(records), []
    for name in wanted:
        index = records.requests.predicted.space.index(name)
        served = possible[:, index]
        if served.any():
            rows.append(system_row(name, records.ranks[served, index], None if reference is None else reference[served]))
    return rows


def planner_rows(answers: Answers, best: str, wanted: Sequence[str]) -> list[PlannerRow]:
    """A row for each planner; of the fixed plans those that are wanted, and the ``best`` one."""
    kept = {fixed_name(name) for name in wanted} | {best}
    names = [name for name in answers.names if name not in answers.fixed_names or name in kept]
    others = [name for name in names if name != POLICY]
    policy, *utilities = (np.asarray(answers.of(name, "utility"), np.float64)[None, :, None] for name in (POLICY, *others))
    gains = dict(zip(others, paired_intervals(policy - np.concatenate(utilities), np.zeros_like(policy)), strict=True))
    return [
        _planner_row(
            answers,
            name,
            "best fixed" if name == best else "fixed" if name in answers.fixed_names else KINDS.get(name, "policy"),
            gains.get(name),
        )
        for name in names
    ]


def _planner_row(answers: Answers, name: str, kind: str, policy_minus: Interval | None) -> PlannerRow:
    def mean(quantity: str) -> float:
        return float(answers.of(name, quantity).mean(dtype=np.float64))

    shares = {plan: float(share) for plan, share in zip(answers.space.names, plan_shares(answers, name), strict=True)}
    latency = summarise_latency(answers.latency_ms[answers.names.index(name)].ravel())
    return PlannerRow(
        name=name,
        kind=kind,
        utility=mean("utility"),
        policy_minus=policy_minus,
        metrics={metric: mean(metric) for metric in METRICS},
        latency_ms={"mean": latency.mean_ms, "p50": latency.p50_ms, "p95": latency.p95_ms},
        energy_mj=mean("energy_mj"),
        exposure=mean("exposure"),
        uplink_bytes=mean("uplink_bytes"),
        downlink_bytes=mean("downlink_bytes"),
        families={family: sum(share for plan, share in shares.items() if plan.startswith(f"{family}-")) for family in FAMILIES},
        plan_shares={plan: share for plan, share in shares.items() if share > 0},
    )
