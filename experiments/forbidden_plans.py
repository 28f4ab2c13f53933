"""Is a forbidden plan ever chosen, or a byte sent without consent?

    python experiments/forbidden_plans.py --requests 10000000 --executed 2000 [--run RUN]

- **Choices**: random contexts go through the policy, a broken policy (NaN and infinite scores), the plug-in planner, rules and chance,
  by what serves requests (``planner.serving``), in blocks; some go one by one. In every second context a third of the numbers are
  extremes (0, the smallest and largest float32, infinity, not a number, the limits of memory); enums come in every combination.
  Counted: choices that the mask forbids, probabilities of forbidden plans that are not exactly 0, and disagreements between the mask
  and its rules, which this script states a second time, plan by plan.
- **Bytes**: requests under every plan that uses the link run through executor, gate and wire between a device and a cloud without
  models, and consent is withdrawn at one of six moments: while the abstract is made, while the cloud works, before a resend, while
  structured modelling runs beside the cloud, after the local hedge has answered, between two requests. Counted: bytes that the
  transport got after the withdrawal, at a level above what is still consented to.

With ``--run`` the policy, mean qualities and costs are those of a finished run; without it a policy with random weights stands in,
which chooses more widely. Writes ``results/forbidden-plans-<name>.json``, ``.md`` and ``.png``.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from consent import MOMENTS, executed_requests
from flax import nnx
from harness import RESULTS, markdown_table, run_name, run_script, write_results
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel, Link, Placement, Plan
from cda4rec_jax.pipeline.planners import PlugIn
from cda4rec_jax.planner import (
    PLANS,
    CostProfile,
    PayloadSizes,
    Policy,
    PolicyConfig,
    RandomPlanner,
    RulesPlanner,
    allowed,
    deployment_profile,
    masked_softmax,
    plan_costs,
)
from cda4rec_jax.planner.plan_space import LARGE_RANKING_MEMORY_MB, STANDARD, STRUCTURED_MEMORY_MB
from cda4rec_jax.planner.policy import Planner, choose
from cda4rec_jax.planner.serving import BLOCK, CONTEXT_FIELDS, ENUM_SIZES, ServedPlanner, unpack
from cda4rec_jax.runs import provenance
from cda4rec_jax.runs.artifacts import load_trained

QUESTION = "Is a forbidden plan ever chosen, or a byte sent that consent forbids?"
EXTREMES = (0.0, 1e-45, 1.0, 63.9, 64.0, 191.9, 192.0, 256.0, 1e6, float(np.finfo(np.float32).max), np.inf, np.nan)
EXTREME_SHARE = 1 / 3
# Medians that are not 1: what limits a plan, or decides for one, does so in about every second context.
MEDIANS = {
    "free_memory_mb": 192.0,
    "round_trip_ms": 50.0,
    "uplink_kbps": 1e3,
    "downlink_kbps": 1e3,
    "utility_per_ms": 1e-5,
    "utility_per_mj": 1e-5,
    "utility_per_exposure": 1e-3,
}
ONE_BY_ONE = 1 / 500  # share of the requests that also go one by one
COLUMNS = {name: column for column, name in enumerate(CONTEXT_FIELDS)}


@dataclass(frozen=True, kw_only=True)
class World:
    """What decisions are made from."""

    name: str
    policy: Policy
    mean_quality: Float[np.ndarray, "p"]
    profile: CostProfile
    exposure_by_level: Float[np.ndarray, "level"]
    sizes: PayloadSizes


def main(
    requests: int = 10_000_000, executed: int = 2_000, run: Path | None = None, seed: int = 0, out: Path = RESULTS
) -> dict[str, Any]:
    """Count, and write what was found.

    Args:
        requests: random contexts that each planner decides.
        executed: requests that are run with consent withdrawn in the middle.
        run: a finished joint run whose policy decides; random weights otherwise.
        seed: of contexts and moments.
        out: folder of the results.
    """
    if requests < 1 or executed < 1:
        raise UserError(f"got --requests {requests} and --executed {executed}: expected at least 1 of each")
    world = _world(run)
    console = Console(stderr=True)
    started_s = time.perf_counter()
    planners = _count_choices(world, requests, seed, console)
    seconds = time.perf_counter() - started_s
    consent = executed_requests(executed, seed, console)
    result = {
        "question": QUESTION,
        "policy": world.name,
        "requests": requests,
        "seconds": seconds,
        "planners": planners,
        "consent": consent,
        "forbidden": sum(one["forbidden"] + one["forbidden_one_by_one"] for one in planners.values()),
        "nonzero_probabilities": sum(one["nonzero_probabilities"] for one in planners.values()),
        "mask_disagreements": sum(one["mask_disagreements"] for one in planners.values()),
        "bytes_after_withdrawal": sum(one["bytes_after"] for one in consent.values()),
        "provenance": provenance(dataset_fingerprint=f"contexts of seed {seed}"),
    }
    write_results(out, f"forbidden-plans-{world.name}", result, page(result), lambda pyplot: _figure(pyplot, result), console)
    return result


def _world(run: Path | None) -> World:
    if run is None:
        policy = Policy(PolicyConfig(), rngs=nnx.Rngs(0))
        last = policy.context_tower.layers[-1]
        last.kernel[...] = jax.random.normal(jax.random.key(0), last.kernel.shape)
        quality = np.linspace(0.0, 0.1, len(PLANS), dtype=np.float32)
        exposure = np.asarray([0.0, 0.1, 0.3, 0.8], np.float32)
        return World(
            name="random-weights",
            policy=policy,
            mean_quality=quality,
            profile=deployment_profile(),
            exposure_by_level=exposure,
            sizes=PayloadSizes(),
        )
    trained = load_trained(run)
    policy = trained.system.policy
    if not isinstance(policy, Policy):
        raise UserError(f"{run} has no planner of class Policy: --run takes a joint run with one")
    world = trained.world()
    return World(
        name=run_name(trained.run),
        policy=policy,
        mean_quality=np.asarray(policy.mean_quality[...]),
        profile=world.profile,
        exposure_by_level=np.asarray(world.exposure_by_level),
        sizes=world.sizes,
    )


def _broken(policy: Policy) -> Policy:
    """The policy after a fault in memory: some plans score NaN, some infinity, in some contexts."""
    graph, state = nnx.split(policy)
    copy = nnx.merge(graph, jax.tree.map(jnp.asarray, state))
    kernel, quality = copy.context_tower.layers[0].kernel, copy.mean_quality
    kernel[...] = kernel[...].at[0, 0].set(1e38)
    quality[...] = quality[...].at[::5].set(jnp.nan).at[1::5].set(jnp.inf).at[2::5].set(-jnp.inf)
    return copy


def random_requests(count: int, draws: np.random.Generator) -> Float[np.ndarray, "n field"]:
    """Packed contexts: log-normal numbers of all sizes, uniform enums, and a share of extremes in every second context."""
    shape = (count, len(CONTEXT_FIELDS))
    rows = np.exp(draws.standard_normal(shape, np.float32) * 3.0)
    for name, median in MEDIANS.items():
        rows[:, COLUMNS[name]] *= median
    extreme = draws.random(shape, np.float32) < EXTREME_SHARE
    extreme[::2] = False
    rows[extreme] = np.asarray(EXTREMES, np.float32)[draws.integers(0, len(EXTREMES), int(extreme.sum()))]
    for name, size in ENUM_SIZES.items():
        rows[:, COLUMNS[name]] = draws.integers(0, size, count)
    return rows


def mask_by_rules(rows: Float[np.ndarray, "n field"], plan: Plan) -> np.ndarray:
    """True where a plan may be chosen: the rules of DESIGN section 4 once more, without the plan table."""
    consent, cache = rows[:, COLUMNS["consent"]], rows[:, COLUMNS["cache_level"]]
    if plan == PLANS[STANDARD.last_resort]:
        return np.ones(len(rows), bool)
    needed_mb = STRUCTURED_MEMORY_MB * (plan.structured is Placement.DEVICE) + LARGE_RANKING_MEMORY_MB * (
        plan.num_candidates > 100 and plan.ranking is Placement.DEVICE
    )
    reuses = plan.semantic is Placement.REUSE
    may = rows[:, COLUMNS["free_memory_mb"]] >= needed_mb  # memory that is not known is none
    if plan.uses_link:
        may &= (rows[:, COLUMNS["link"]] != Link.OFFLINE) & ((cache if reuses else plan.level) <= consent)
    if reuses:
        may &= cache > EgressLevel.NOTHING
    return may


def _checks(world: World, planner: Planner) -> Callable[[Any], tuple[jax.Array, ...]]:
    """Choices, the mask, and how many forbidden plans have another probability than 0."""

    @jax.jit
    def check(rows: Any) -> tuple[jax.Array, ...]:
        context = unpack(rows)
        mask = allowed(context)
        logits = planner.logits(
            context, plan_costs(world.profile, context, jnp.asarray(world.exposure_by_level), world.sizes), mask
        )
        return choose(logits, mask), mask, jnp.sum(~mask & ~(masked_softmax(logits, mask) == 0.0))

    return check


def _count_choices(world: World, requests: int, seed: int, console: Console) -> dict[str, dict[str, Any]]:
    planners: dict[str, Planner] = {
        "policy": world.policy,
        "broken policy": _broken(world.policy),
        "plug-in": PlugIn(quality=jnp.asarray(world.mean_quality)[None, :]),
        "rules": RulesPlanner(),
        "random": RandomPlanner(),
    }
    exposure = jnp.asarray(world.exposure_by_level)
    checks = {name: _checks(world, planner) for name, planner in planners.items()}
    served = {name: ServedPlanner(planner, world.profile, exposure, world.sizes) for name, planner in planners.items()}
    fields = ("requests", "one_by_one", "forbidden", "forbidden_one_by_one", "nonzero_probabilities", "mask_disagreements")
    found: dict[str, Counter] = {name: Counter(dict.fromkeys(fields, 0)) for name in planners}
    chosen = {name: np.zeros(len(PLANS), np.int64) for name in planners}
    draws = np.random.default_rng(seed)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("choosing", total=requests)
        for start in range(0, requests, BLOCK):
            rows = random_requests(min(BLOCK, requests - start), draws)
            by_rules = np.stack([mask_by_rules(rows, plan) for plan in PLANS], axis=1)
            alone = draws.integers(0, len(rows), max(1, round(ONE_BY_ONE * len(rows))))
            for name in planners:
                choices, mask, nonzero = (np.asarray(one) for one in checks[name](rows))
                block = np.asarray(served[name].choices(rows))
                singles = np.asarray([served[name](rows[row]).plan_index for row in alone])
                every = np.arange(len(rows))
                found[name].update(
                    requests=len(rows),
                    one_by_one=len(alone),
                    forbidden=int((~by_rules[every, choices]).sum() + (~by_rules[every, block]).sum()),
                    forbidden_one_by_one=int((~by_rules[alone, singles]).sum()),
                    nonzero_probabilities=int(nonzero),
                    mask_disagreements=int((by_rules != mask).sum()),
                )
                chosen[name] += np.bincount(block, minlength=len(PLANS))
            progress.advance(task, len(rows))
    return {
        name: dict(found[name]) | {"chosen": {plan.name: int(chosen[name][index]) for index, plan in enumerate(PLANS)}}
        for name in planners
    }


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        [
            name,
            f"{one['requests']:,}",
            f"{one['one_by_one']:,}",
            f"{one['forbidden'] + one['forbidden_one_by_one']:,}",
            f"{one['nonzero_probabilities']:,}",
            str(sum(count > 0 for count in one["chosen"].values())),
        ]
        for name, one in result["planners"].items()
    ]
    columns = ["planner", "contexts", "of them also one by one", "forbidden choices", "forbidden plans with probability above 0"]
    moments = [
        [
            MOMENTS[moment],
            f"{one['requests']:,}",
            f"{one['withdrawn']:,}",
            f"{one['bytes_before']:,}",
            f"{one['bytes_after']:,}",
            f"{one['without_slate']:,}",
        ]
        for moment, one in result["consent"].items()
    ]
    source = result["provenance"]
    return "\n".join(
        [
            f"# Forbidden plans: {result['policy']}",
            "",
            f"{QUESTION} {result['forbidden']} forbidden choices, {result['bytes_after_withdrawal']} bytes after a withdrawal.",
            "",
            *markdown_table([*columns, "plans chosen"], rows),
            f"{result['seconds']:.0f} s for all planners. Mask against its rules, stated twice: {result['mask_disagreements']} "
            "disagreements. In every second context a third of the numbers are extremes (0, denormal, largest float32, infinity, NaN).",
            "",
            *markdown_table(
                ["consent withdrawn", "requests", "withdrawn in time", "bytes before", "bytes after", "requests without a slate"],
                moments,
            ),
            "Bytes after: what the transport got at a level above the consent that was left.",
            "",
            f"Commit {str(source['commit'])[:12]}{' (with changes)' if source['dirty'] else ''}, {source['cores']} cores of "
            f"{source['cpu_model']}.",
            "",
        ]
    )


def _figure(pyplot: Any, result: dict[str, Any]) -> Any:
    """How often each planner chose each plan: a count of 0 forbidden choices says little of a planner that always chooses one."""
    figure, axes = pyplot.subplots(figsize=(11, 4.5))
    names = [plan.name for plan in PLANS]
    shares = np.asarray([[one["chosen"][name] / one["requests"] for name in names] for one in result["planners"].values()])
    image = axes.imshow(np.where(shares > 0, np.log10(np.maximum(shares, 1e-12)), np.nan), aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(result["planners"])), list(result["planners"]))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    figure.colorbar(image, label="share of choices, log10 (white: never)")
    axes.set_title(f"{result['requests']:,} contexts for each planner, {result['forbidden']} forbidden choices")
    return figure


if __name__ == "__main__":
    run_script(main, page)
