"""From a run directory to a report."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from cda4rec_jax.data.splits import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.accuracy import popularity_ranks
from cda4rec_jax.evaluation.answers import Logits, answer, fixed_name
from cda4rec_jax.evaluation.budgets import BUDGET_DRAWS, budget_row, known_requests
from cda4rec_jax.evaluation.gate import best_fixed, check_gate
from cda4rec_jax.evaluation.report import Report
from cda4rec_jax.evaluation.rows import (
    CLOUD_ROW,
    POLICY,
    POPULARITY,
    RANDOM,
    RULES,
    SASREC_ROW,
    plan_rows,
    planner_rows,
    plug_in_means,
    system_row,
)
from cda4rec_jax.pipeline.decisions import PlanningWorld
from cda4rec_jax.pipeline.population import CONTEXTS_PER_EVENT, PlanRecords
from cda4rec_jax.planner import RandomPlanner, RulesPlanner
from cda4rec_jax.planner.budgets import Budget, Budgeted, KnownRequests, calibrate
from cda4rec_jax.runs import FINISHED, KEPT_FILES, RunDirectory, provenance
from cda4rec_jax.runs.artifacts import SASREC, TrainedSystem, load_trained

SELECTION_USERS = 4096

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One evaluation: what is evaluated, on whom, and who hears of it."""

    trained: TrainedSystem
    baseline: TrainedSystem | None
    split: Split
    users: Int[np.ndarray, "b"]
    draws: int
    seed: int
    progress: Progress

    @property
    def selection_users(self) -> Int[np.ndarray, "s"]:
        """Users whose validation events select: means of a few thousand are exact enough, and outcomes of all plans take time."""
        return self.users[_sample(len(self.users), SELECTION_USERS, self.seed)]


def evaluate_run(
    run_path: Path | str,
    *,
    split: str = "test",
    plans: str | Sequence[str] = "all",
    baseline: Path | str | None = None,
    profile: str = "deployment",
    draws: int = CONTEXTS_PER_EVENT,
    users: int | None = None,
    seed: int = 0,
    budgets: Sequence[Budget] = (),
    json_file: Path | str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Evaluate a finished run.

    Accuracy (hit_rate, ndcg, mrr at 5, 10, 20) of popularity, of SASRec, of the cloud agent alone over the whole catalogue, and
    of every plan as it would answer if it were allowed (plans that reuse a cached embedding: on the users who have one). Then,
    in contexts v1: utility, accuracy, modelled latency, bytes, energy and exposure of what every planner answers: each fixed plan
    with repair, rules, random, plug-in, the cross-fitted context oracle, the hindsight optimum (an upper bound), and the learned
    policy; with paired intervals, clustered by user. The best fixed plan, the means of the plug-in planner, and the gate on the
    set-up come from validation events (of at most 4,096 users), whatever ``split`` is.

    A run of kind "sasrec" has neither plans nor planners: its report has the ``systems`` alone.

    Args:
        run_path: directory that training wrote.
        split: "test" or "validation".
        plans: names of the plans to report, or "all"; the best fixed plan is always chosen among all, and reported.
        baseline: run of kind "sasrec" on the same data; None takes ``<run_path>/sasrec`` if that is a run, else there is none.
        profile: "deployment" for the costs of the modelled deployment, "measured" for the newest that were measured: when
            the run was trained, or since then by ``cda4rec calibrate``.
        draws: contexts of each event.
        users: at most so many users, a sample that ``seed`` draws; None takes all.
        seed: of the sample, of the halves of the context oracle and of the random planner.
        budgets: that the policy keeps in a row of its own each, at a price that is calibrated on validation events.
        json_file: where to write the report too. A run's ``results.json`` is the last report on the test split and all users.
        progress: hears (stage, done, total).

    Raises:
        UserError: no finished run, a baseline of another kind or on other data, an unknown plan, split or profile, a number that
            is too small, or a file that cannot be written (found before the work starts); a budget that no price keeps.
    """
    _check_options(split, plans, profile, draws, users)
    if json_file is not None:
        check_writable(Path(json_file))
    trained = load_trained(run_path)
    for name in () if plans == "all" else plans:
        trained.config.space.index(name)
    if budgets and trained.system.policy is None:
        raise UserError(
            f"{trained.run.path} is a run of kind {trained.run.kind!r}, without a planner to keep budgets: leave them out"
        )
    job = _Job(
        trained=trained,
        baseline=_baseline(trained, baseline),
        split=Split(split),
        users=_sample(trained.corpus.interactions.num_users, users, seed),
        draws=draws,
        seed=seed,
        progress=progress,
    )
    report = _evaluate(job, plans, profile, budgets)
    if job.split is Split.TEST and users is None:
        report.write_json(trained.run.path / "results.json")
    if json_file is not None:
        report.write_json(json_file)
    return report


def _check_options(split: str, plans: str | Sequence[str], profile: str, draws: int, users: int | None) -> None:
    for name, value, choices in (
        ("split", split, (Split.TEST.value, Split.VALIDATION.value)),
        ("profile", profile, ("deployment", "measured")),
    ):
        if value not in choices:
            raise UserError(f"unknown {name} {value!r}: expected one of {', '.join(choices)}")
    if isinstance(plans, str) and plans != "all":
        raise UserError(f"plans is {plans!r}: expected 'all' or a list of plan names")
    if draws < 1:
        raise UserError(f"draws is {draws}: expected at least 1 context for each event")
    if users is not None and users < 2:
        raise UserError(f"users is {users}: expected at least 2, since planners are compared across users")


def check_writable(file: Path) -> None:
    """Raise UserError where a file could not be written, before there is work to lose."""
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write {file}: name a file in an existing directory that can be written.")
    if (folder / "config.json").is_file() and file.name in KEPT_FILES:
        raise UserError(f"{file} is a part of the run in {folder}, which would be lost: name another file.")


def _baseline(trained: TrainedSystem, path: Path | str | None) -> TrainedSystem | None:
    own = trained.run.path / "sasrec"
    if path is None and not (own / "config.json").is_file():
        return None
    run = RunDirectory.open(own if path is None else path)
    if run.kind != SASREC:
        raise UserError(f"{run.path} is a run of kind {run.kind!r}: a baseline is a run of preset sasrec")
    ours, theirs = trained.corpus.interactions.fingerprint, run.read_json("provenance")["dataset_fingerprint"]
    if ours != theirs:
        raise UserError(
            f"{run.path} was trained on other data (fingerprint {theirs[:12]}, expected {ours[:12]}): "
            "train the baseline on the same source"
        )
    return load_trained(run.path)


def _sample(num_users: int, at_most: int | None, seed: int) -> Int[np.ndarray, "b"]:
    if at_most is None or at_most >= num_users:
        return np.arange(num_users)
    return np.sort(np.random.default_rng(seed).permutation(num_users)[:at_most])


def _evaluate(job: _Job, plans: str | Sequence[str], profile: str, budgets: Sequence[Budget]) -> Report:
    trained = job.trained
    interactions = trained.corpus.interactions
    is_joint = trained.system.device is not None
    systems = _system_ranks(job)
    reference = systems.get(SASREC_ROW)
    of_plans, of_planners, of_budgets, best, gate, scales = [], [], [], None, None, {}
    if is_joint:
        world = trained.world(profile)
        scales = {name: float(value) for name, value in vars(world.scales).items()}
        # What validation events decide: means of the plug-in planner, the best fixed plan, and the gate.
        records = _records(job, world, Split.VALIDATION, job.selection_users)
        means, planners = plug_in_means(records), _planners(job)
        policy = job.trained.system.policy
        prices = [calibrate(_known(job, world, Split.VALIDATION, job.selection_users, budget), budget) for budget in budgets]
        for price in prices:
            kept = Budgeted(planner=policy, limited=price.budget.limited, multiplier=price.multiplier)
            planners[f"{POLICY}, {price.budget.name}"] = kept.logits
        answers = answer(records, planners, means, seed=job.seed)
        best, gate = best_fixed(answers), check_gate(answers, scales["quality_gap"])
        records = _records(job, world, job.split, job.users)
        answers = answer(records, planners, means, seed=job.seed)
        wanted = trained.config.space.names if plans == "all" else list(plans)
        of_plans = plan_rows(records, wanted, reference)
        of_planners = planner_rows(answers, best, wanted)
        of_budgets = [budget_row(price, _known(job, world, job.split, job.users, price.budget)) for price in prices]
    return Report(
        dataset=interactions.name,
        dataset_fingerprint=interactions.fingerprint,
        kind=trained.run.kind,
        split=str(job.split),
        num_users=len(job.users),
        num_items=interactions.num_items,
        protocol=_protocol(job),
        latency=f"modelled ({profile} profile)",
        systems=[system_row(name, ranks, reference) for name, ranks in systems.items()],
        plans=of_plans,
        planners=of_planners,
        best_fixed=None if best is None else best.removeprefix(fixed_name("")),
        gate=gate,
        scales=scales,
        exposure_by_level=trained.run.read_json("exposure")["exposure"] if is_joint else [],
        training_seconds=_training_seconds(job),
        provenance=provenance(dataset_fingerprint=interactions.fingerprint),
        budgets=of_budgets,
    )


def _system_ranks(job: _Job) -> dict[str, Int[np.ndarray, "b"]]:
    """Ranks by systems that need no plan."""
    trained = job.trained
    positions = trained.corpus.target_positions(job.split)[job.users]
    counts = np.asarray(trained.tables.train_counts)
    ranks = {POPULARITY: popularity_ranks(counts, trained.corpus.interactions, job.users, positions)}
    own_name = SASREC_ROW if trained.run.kind == SASREC else CLOUD_ROW
    for name, system in ((SASREC_ROW, job.baseline), (own_name, trained)):
        if system is not None:
            job.progress(f"ranking the catalogue: {name}", 0, len(job.users))
            ranks[name] = system.population.full_ranks(jax.device_put(system.weights), job.users, positions)
            job.progress(f"ranking the catalogue: {name}", len(job.users), len(job.users))
    return ranks


def _records(job: _Job, world: PlanningWorld, split: Split, users: np.ndarray) -> PlanRecords:
    """Outcomes of all plans for these users."""
    return job.trained.population.records(
        jax.device_put(job.trained.weights),
        world,
        users,
        job.trained.corpus.target_positions(split)[users],
        draws=job.draws,
        progress=partial(job.progress, f"{split} requests"),
    )


def _known(job: _Job, world: PlanningWorld, split: Split, users: np.ndarray, budget: Budget) -> KnownRequests:
    """Requests of these users, as the policy scores them, with what they spend of a budget."""
    policy, positions = job.trained.system.policy, job.trained.corpus.target_positions(split)[users]
    assert policy is not None
    requests = job.trained.population.requests(world, users, positions, draws=BUDGET_DRAWS)
    return known_requests(requests, policy.logits, budget.limited)


def _planners(job: _Job) -> dict[str, Logits]:
    policy = job.trained.system.policy
    assert policy is not None
    return {POLICY: policy.logits, RULES: RulesPlanner().logits, RANDOM: RandomPlanner(seed=job.seed).logits}


def _protocol(job: _Job) -> str:
    training_seed = job.trained.run.read_config("run", dict)["train"]["seed"]
    in_sample = ""
    how = {"planner_training.json": "trained and selected", "call_schedule.json": "fitted to a budget"}
    found = [words for file, words in how.items() if job.trained.run.has(file)]
    if job.split is Split.VALIDATION and found:
        in_sample = (
            f"; the policy was {' and then '.join(found)} on validation events of these users, and here is measured on them: what it gains "
            "over other planners, and the intervals, are within the sample"
        )
    return (
        "leave-one-out in time (n-2 train, n-1 validation, n test); full catalogue; seen items removed; ties count against the "
        f"target; retrieval exact; contexts v1, {job.draws} draws for each event, which share its cache and its consent; "
        f"selection on validation events of {len(job.selection_users):,} users; paired bootstrap by user, 2000 resamples; "
        f"seed {job.seed} (training seed {training_seed}){in_sample}"
    )


def _training_seconds(job: _Job) -> dict[str, float]:
    found = {}
    for name, system in ((job.trained.run.kind, job.trained), ("baseline", job.baseline)):
        if system is not None and system.run.has(FINISHED):
            found[name] = float(system.run.read_json("training")["seconds"])
    return found
