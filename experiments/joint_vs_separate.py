"""Does it help to train fusion head and policy beside the trunks, rather than after them?

    python experiments/joint_vs_separate.py --data DATA/ml-100k

Catalogue losses alone move the trunks, jointly or not, so training the trunks first gives the very trunks of the joint run. What can
differ is what the deciders learned: *joint* practises on trunks that still change, and finishes with the planner-only phase; *separate*
starts on the finished trunks and gets the same number of steps with the same requests and contexts, then the same planner-only
phase; *final phase only* gets that phase alone. Compared: accuracy of plans, and the policy's utility in contexts v1 under the weight
scales of the joint run.

Trains what ``--work`` does not have, or takes ``--run`` as the joint run. Writes ``joint-vs-separate-<dataset>.json``, ``.md``, ``.png``.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import (
    OURS,
    Options,
    Study,
    error_bars,
    estimates,
    markdown_page,
    markdown_table,
    run_script,
    sampled,
    values,
    with_interval,
    write_results,
)

from cda4rec_jax.data import Split
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.planner import plan_index, realised_utility
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import TrainedSystem
from cda4rec_jax.training import refit_deciders

QUESTION = "Does it help to train the deciders (fusion head and policy) jointly with the trunks?"
SEPARATE, FINAL_ONLY = "separate", "final-phase-only"
PLANS_COMPARED = ("fresh-full-100-device", "fresh-full-500-device", "local-reuse-device")
CACHE_AGE = 3  # events, of the plans that reuse; the mean of contexts v1
UTILITY_USERS = 4096
DRAWS = 4


def main(options: Options) -> dict[str, Any]:
    """Accuracy and utility of deciders that were trained jointly, separately, and in the final phase only."""
    study = Study(options)
    arms = {
        "joint": partial(_arm, study, OURS, study.ours),
        SEPARATE: partial(_arm, study, SEPARATE, lambda seed: separate(study, seed)),
        FINAL_ONLY: partial(_arm, study, FINAL_ONLY, lambda seed: final_phase_only(study, seed)),
    }
    found = {name: arm() for name, arm in arms.items()}
    measures = {}
    for measure in (*PLANS_COMPARED, "policy_utility"):
        columns = {name: of_arm[measure] for name, of_arm in found.items()}
        gains = {f"joint_minus_{name}": columns["joint"] - columns[name] for name in (SEPARATE, FINAL_ONLY)}
        measures[measure] = estimates(columns | gains)
    result = study.result(
        QUESTION,
        decider_steps={"beside_the_trunks": joint_steps(study, 0), "final": study.config.train.final_steps},
        cache_age_of_local_plans=CACHE_AGE,
        measures=measures,
        seconds={
            name: study.training_seconds(variant)
            for name, variant in (("joint", OURS), (SEPARATE, SEPARATE), (FINAL_ONLY, FINAL_ONLY))
        },
        verdict=_verdict(measures),
    )
    draw = partial(_draw, result)
    write_results(options.out, f"joint-vs-separate-{study.name}", result, page(result), draw, study.console)
    return result


def joint_steps(study: Study, seed: int) -> int:
    """Steps that the deciders of the system took beside its trunks."""
    study.ours(seed)
    rows = RunDirectory.open(study.run_path(OURS, seed)).metrics()
    return max(row["step"] for row in rows if row["phase"] in ("joint", "validation"))


def separate(study: Study, seed: int) -> TrainedSystem:
    """The system with deciders that had all their steps after the trunks."""
    steps = joint_steps(study, seed)
    path = study.run_path(OURS, seed)
    make = partial(refit_deciders, path, practice_steps=steps, overwrite=True)
    return study.trained(SEPARATE, seed, make=make)


def final_phase_only(study: Study, seed: int) -> TrainedSystem:
    """The system with deciders that had the planner-only phase alone."""
    study.ours(seed)
    return study.trained(FINAL_ONLY, seed, make=partial(refit_deciders, study.run_path(OURS, seed), overwrite=True))


def _arm(study: Study, variant: str, load: Any) -> dict[str, np.ndarray]:
    """ndcg@10 of plans and the policy's utility, each [users, seeds]; the utility on a sample of at most 4,096 users."""
    found = {}
    for name in PLANS_COMPARED:
        age = CACHE_AGE if name.startswith("local") else 0
        ranks = [study.plan_ranks(variant, seed, load, Split.TEST, age)[:, plan_index(name)] for seed in study.seeds]
        served = ranks[0] > 0
        found[name] = values([one[served] for one in ranks])
    found["policy_utility"] = np.stack([_utility(study, variant, load, seed) for seed in study.seeds], axis=1)
    return found


def _utility(study: Study, variant: str, load: Any, seed: int) -> np.ndarray:
    """Utility of the learned policy for each user, in the world of the joint run."""

    def make() -> dict[str, np.ndarray]:
        world, trained = study.ours(seed).world(), load(seed)
        users, positions = study.of_split(Split.TEST)
        chosen = sampled(len(users), UTILITY_USERS)
        weights = jax.device_put(trained.weights)
        records = trained.population.records(weights, world, users[chosen], positions[chosen], draws=DRAWS)
        return {"utility": policy_utility(trained, records)}

    return study.cell(f"{variant}-{seed}-test-policy-utility", make)["utility"]


def policy_utility(trained: TrainedSystem, records: PlanRecords) -> np.ndarray:
    """Realised utility [users] of what the learned policy chooses, mean over the contexts of each user."""
    policy = trained.system.policy
    assert policy is not None
    gained = []
    for draw in range(records.requests.failed.shape[0]):
        asked = jax.tree.map(lambda leaf, draw=draw: jnp.asarray(leaf[draw]), records.requests)
        choice = jnp.argmax(policy.logits(asked.context, asked.predicted, asked.mask), axis=1)
        quality = jnp.asarray(records.quality)
        utility = realised_utility(quality, asked.realised, asked.context, failed=asked.failed, mask=asked.mask)
        gained.append(np.asarray(jnp.take_along_axis(utility, choice[:, None], axis=1)[:, 0]))
    return np.mean(gained, axis=0)


def _verdict(measures: dict[str, Any]) -> str:
    """One sentence for each measure."""
    said = []
    for name, found in measures.items():
        gain = found[f"joint_minus_{SEPARATE}"]
        effect = (
            "joint training helps"
            if gain["low"] > 0
            else "joint training hurts"
            if gain["high"] < 0
            else "no difference is shown"
        )
        said.append(f"{name}: {effect} ({with_interval(gain, signed=True)})")
    return "; ".join(said)


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    columns = ["", "users", "joint", "separate", "final phase only", "joint - separate, 95%", "joint - final phase only, 95%"]
    rows = []
    for name, found in result["measures"].items():
        means = [f"{found[arm]['mean']:.4f}" for arm in ("joint", SEPARATE, FINAL_ONLY)]
        gains = [with_interval(found[f"joint_minus_{arm}"], signed=True) for arm in (SEPARATE, FINAL_ONLY)]
        label = "policy's utility" if name == "policy_utility" else f"ndcg@10 of `{name}`"
        rows.append([label, f"{found['joint']['users']:,}", *means, *gains])
    steps, seconds = result["decider_steps"], result["seconds"]
    note = (
        f"Steps of the deciders: {steps['beside_the_trunks']:,} beside the trunks (or, separately, after them) and "
        f"{steps['final']:,} in the final phase. Seconds: {seconds['joint']:.0f} for trunks and deciders together, without the final "
        f"phase; on top of the trunks, {seconds[SEPARATE]:.0f} for the separate deciders and {seconds[FINAL_ONLY]:.0f} for the final "
        f"phase alone. Plans that reuse have a view {result['cache_age_of_local_plans']} events old."
    )
    verdict = f"Verdict: {result['verdict']}."
    return markdown_page(result, "Joint training", [*markdown_table(columns, rows), note, "", verdict, ""])


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(figsize=(10.5, 3.5))
    names = list(result["measures"])
    for number, (arm, colour) in enumerate(((SEPARATE, "tab:blue"), (FINAL_ONLY, "tab:gray"))):
        means, bars = error_bars([result["measures"][name][f"joint_minus_{arm}"] for name in names])
        place = np.arange(len(names)) + 0.15 * (2 * number - 1)
        axes.errorbar(means, place, xerr=bars, fmt="o", capsize=3, color=colour, label=f"joint - {arm.replace('-', ' ')}")
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("gain of joint training in test ndcg@10 (or utility), 95% intervals")
    axes.set_title(f"{result['dataset']}: what joint training gains")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the bars, which may be anywhere
    return figure


if __name__ == "__main__":
    run_script(main, page)
