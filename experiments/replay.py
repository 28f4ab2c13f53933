"""When is a call to the cloud worth it, if a call saved today is a stale embedding tomorrow?

    python experiments/replay.py --data DATA/ml-100k

The last ``--steps`` events of each user are requests in order. The first finds an embedding that was made one event before; after that
the cache, and its age, are what the scheduler's own choices left. With ``--data`` the system is trained without these events, so all of
them are held out. With ``--run`` a finished run is taken, which has trained on all but the last two events of each user: the result
says so, and tells the last apart.

Schedulers are held against each other at equal numbers of calls (plans that use the link), as a share of those of a planner that always
calls. A price of a call brings each one to the budget. Prices, plans and values of freshness are estimated on one half of the users and
measured on the other, and the other way round. The planner of ``cda4rec train-planner --budget`` is made as the command makes it, from the
run and the validation events of its own data.

``--resident-items`` asks the same of devices that hold the records of more (or fewer) items than those of the run: on its trunks, head and
policy are trained again with what such devices find. Writes ``replay-<dataset>[-resident-<items>].json``, ``.md``, ``.png``.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    OURS,
    Arrays,
    Options,
    Study,
    Values,
    error_bars,
    estimates,
    markdown_page,
    markdown_table,
    run_script,
    sampled,
    train_resumed,
    with_interval,
    write_results,
)
from replay_lab import (
    ALWAYS,
    BUDGET,
    COMMAND,
    COMPARED,
    LAST,
    NEVER,
    PLUG_IN,
    POLICY,
    QUANTITIES,
    RANDOM,
    RULES,
    SHARES,
    SPACED,
    THIRD,
    TIMED,
    Key,
    as_commanded,
    cross_fitted,
)
from rich.console import Console

from cda4rec_jax.cli.console import StagesView
from cda4rec_jax.data import before_last, write_prepared
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.replay import cached_ranks, record_replay, replay_positions
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.metrics import hit_rate
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.decisions import resident_item_bytes
from cda4rec_jax.planner import CACHED_CANDIDATES, plan_index
from cda4rec_jax.runs.artifacts import TrainedSystem
from cda4rec_jax.training import refit_deciders

QUESTION = "When is a call to the cloud worth it, if a call saved today is a stale embedding tomorrow?"
MIN_PAST = 5  # events before the first request
TARGET = -0.03  # of relative hit_rate@10 at BUDGET
CACHED_PLANS = ("local-reuse-device", "reuse-100-device")

Columns = dict[str, Values]  # by quantity


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is replayed."""

    steps: int
    draws: int
    shares: tuple[float, ...]
    resident_items: int | None


def main(
    options: Options, steps: int = 10, draws: int = 4, shares: tuple[float, ...] = SHARES, resident_items: int | None = None
) -> dict[str, Any]:
    """Accuracy against calls, over sequences of requests.

    Args:
        options: shared by all experiments.
        steps: requests of each user.
        draws: situations (links, devices, consents, prices) of each user.
        shares: of always-cloud's calls.
        resident_items: most popular items whose records every device holds; those of the preset or the run if not given.
    """
    setting = Setting(steps=steps, draws=draws, shares=tuple(sorted({*shares, BUDGET})), resident_items=resident_items)
    if resident_items is not None and resident_items < 1:
        raise UserError(f"got --resident-items {resident_items}: expected at least 1")
    if steps < 2 or draws < 1 or not all(0 < share < 1 for share in shares):
        raise UserError(
            f"got --steps {steps}, --draws {draws}, --shares {shares}: expected at least 2 steps, 1 draw, shares in 0..1"
        )
    study = Study(options)
    lengths = np.diff(study.interactions.offsets)
    long_enough = np.flatnonzero(lengths >= steps + MIN_PAST)
    if len(long_enough) < 2:
        raise UserError(
            f"{len(long_enough)} users have {steps + MIN_PAST} events or more, expected at least 2: name fewer --steps"
        )
    users = long_enough[sampled(len(long_enough), options.users)]
    found, gaps = _over_seeds(study, users, replay_positions(lengths[users], steps), setting)
    rows = [_row(key, columns, found[ALWAYS, None]) for key, columns in found.items()]
    held_out = steps if options.run is None else 2
    result = study.result(
        QUESTION,
        users_evaluated=len(users),
        protocol=_protocol(setting, held_out),
        steps=steps,
        requests_held_out_from_training=held_out,
        **_resident(study, setting),
        budget=BUDGET,
        target=TARGET,
        rows=rows,
        at_budget=_at_budget(found),
        by_age_of_the_cache=gaps,
    )
    name = f"replay-{study.name}" if resident_items is None else f"replay-{study.name}-resident-{resident_items}"
    write_results(options.out, name, result, page(result), partial(_draw, result), study.console)
    return result


def _protocol(setting: Setting, held_out: int) -> str:
    seen = "" if held_out == setting.steps else f"; the system was trained on the first {setting.steps - held_out} of them"
    return (
        f"the last {setting.steps} events of each user with {setting.steps + MIN_PAST} or more, in order{seen}; the first request finds "
        "an embedding made one event before at the level of consent; seen items removed; ties count against the target; contexts v1, with "
        f"consent, tier and memory of the first request, {setting.draws} draws; plans, prices and values of freshness from the other half "
        f"of the users, those of {COMMAND} from the run's own validation events; paired bootstrap by user, 95%, 2000 resamples, means "
        "over seeds first"
    )


def _over_seeds(
    study: Study, users: np.ndarray, positions: np.ndarray, setting: Setting
) -> tuple[dict[Key, Columns], list[dict[str, Any]]]:
    """Quantities of every user by scheduler and share, and what the age of a cache costs."""
    of_seeds, tables = [], []
    for seed in study.seeds:
        run = _run(study, seed, setting)
        trained = replace(run, corpus=Corpus(interactions=study.interactions, text=run.corpus.text))
        held = "" if setting.resident_items is None else f"-resident-{setting.resident_items}"
        name = f"{OURS}-{seed}-replay{setting.steps}-ranks{held}"
        ranks = study.cell(name, partial(_ranks, trained, users, positions, study.console))["ranks"]
        with StagesView(study.console) as view:
            commanded = as_commanded(run, setting.shares, study.options.users, view.progress)
        with study.console.status(f"replaying, seed {seed}"):
            world = trained.world()
            records = record_replay(trained, world, users, positions, ranks, setting.draws)
            of_seeds.append(cross_fitted(trained, world, records, setting.shares, commanded))
        tables.append(ranks[EgressLevel.FULL - 1])
    found = {
        key: {name: np.stack([of_seed[key][name] for of_seed in of_seeds], axis=1) for name in (*QUANTITIES, LAST)}
        for key in of_seeds[0]
    }
    return found, _gaps_by_age(tables)


def _ranks(trained: TrainedSystem, users: np.ndarray, positions: np.ndarray, console: Console) -> Arrays:
    with StagesView(console) as view:
        return {"ranks": cached_ranks(trained, users, positions, partial(view.progress, "ranks by level and age of the cache"))}


def _run(study: Study, seed: int, setting: Setting) -> TrainedSystem:
    """The given run, or a system that was trained before the replayed events, over its own corpus.

    With other resident items than it was trained with, its head and policy are those that were trained with these.
    """
    variant = OURS if study.options.run is not None else f"{OURS}-before-last-{setting.steps}"
    trained = study.ours(seed) if study.options.run is not None else _trained_before(study, seed, setting.steps)
    if setting.resident_items is not None:
        system = replace(trained.config, resident_items=setting.resident_items)
        make = partial(refit_deciders, trained.run.path, system=system, overwrite=True)
        trained = study.trained(f"{variant}-resident-{setting.resident_items}", seed, make=make)
    return trained


def _trained_before(study: Study, seed: int, steps: int) -> TrainedSystem:
    def make(path: Path) -> None:
        folder = study.folder / f"data-before-last-{steps}"
        lengths = np.diff(study.interactions.offsets)
        withheld = np.where(lengths >= steps + MIN_PAST, steps, 0)
        write_prepared(before_last(study.interactions, withheld), folder, f"{study.name} before the last {steps} events")
        config = study.seeded(replace(study.config, k_core=1), seed)  # an item that is left without events stays, with its text
        train_resumed(str(folder), config, path, study.console)

    return study.trained(f"{OURS}-before-last-{steps}", seed, make=make)


def _resident(study: Study, setting: Setting) -> dict[str, Any]:
    """What devices hold for good, and what that weighs."""
    catalogue = _run(study, 0, setting).catalogue
    count, record = len(catalogue.residents.items), resident_item_bytes(catalogue)
    return {"resident_items": count, "resident_kb": record * count / 1e3, "record_bytes": int(record)}


def _relative(values: Values, reference: Values) -> Values:
    """Per user, numbers whose mean is R - 1 for R = mean / mean of the reference, and whose spread is that of the ratio (delta method)."""
    ratio = values.mean() / reference.mean()
    return (values - ratio * reference) / reference.mean() + ratio - 1.0


def _row(key: Key, columns: Columns, always: Columns) -> dict[str, Any]:
    name, share = key
    relative = {metric: _relative(columns[metric], always[metric]) for metric in ("hit_rate@10", "ndcg@10", LAST)}
    return {
        "scheduler": name,
        "asked_share": share,
        "share_of_calls": float(columns["calls"].mean() / always["calls"].mean()),
        "relative": estimates(relative),
        **{quantity: float(columns[quantity].mean()) for quantity in (*QUANTITIES, LAST)},
    }


def _at_budget(found: dict[Key, Columns]) -> list[dict[str, Any]]:
    """What priced schedulers gain over calls at fixed and at random times, at BUDGET."""

    def hits(name: str, share: float | None = BUDGET) -> Values:
        return found[name, share]["hit_rate@10"]

    rows = []
    for name in COMPARED:
        others = {SPACED: hits(SPACED), RANDOM: hits(RANDOM), THIRD: hits(THIRD, None)}
        gains = estimates({f"minus {other}": hits(name) - column for other, column in others.items()})
        relative = estimates({"relative": _relative(hits(name), found[ALWAYS, None]["hit_rate@10"])})["relative"]
        above = all(gains[f"minus {other}"]["low"] > 0 for other in TIMED)
        rows.append({"scheduler": name, "relative": relative, **gains, "reached": bool(relative["low"] > TARGET and above)})
    return rows


def _gaps_by_age(tables: list[np.ndarray]) -> list[dict[str, Any]]:
    """hit_rate@10 of plans that reuse an embedding of level FULL, minus that of a fresh one, on the same requests, by its age.

    Args:
        tables: of each seed, ranks [ages, n, steps, p].
    """
    fresh, rows = plan_index("fresh-full-100-device"), []
    for age in range(1, len(tables[0]) + 1):
        hits = [np.asarray(hit_rate(ranks[age - 1, :, age - 1 :], 10), np.float64) for ranks in tables]
        columns = {
            name: np.stack([(one[..., plan_index(name)] - one[..., fresh]).mean(axis=1) for one in hits], axis=1)
            for name in CACHED_PLANS
        }
        rows.append({"age_events": age, "hit_rate@10 of a fresh one": float(np.mean([one[..., fresh].mean() for one in hits]))})
        rows[-1] |= estimates(columns)
    return rows


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"Every device holds the records of the {result['resident_items']:,} most popular items ({result['resident_kb']:,.0f} KB), and the "
        f"last {CACHED_CANDIDATES} candidates that it got.",
        "",
    ]
    if result["requests_held_out_from_training"] < result["steps"]:
        seen = result["steps"] - result["requests_held_out_from_training"]
        lines += [
            f"**The run has trained on the first {seen} of the {result['steps']} events; read the column of the last.**",
            "",
        ]
    columns = [
        "scheduler",
        "share of calls",
        "hit_rate@10",
        "relative to always, 95%",
        "of the last event alone",
        "ndcg@10",
        "ms",
        "utility",
    ]
    rows = [
        [
            row["scheduler"],
            f"{row['share_of_calls']:.3f}",
            f"{row['hit_rate@10']:.4f}",
            with_interval(row["relative"]["hit_rate@10"], signed=True),
            with_interval(row["relative"][LAST], signed=True),
            f"{row['ndcg@10']:.4f}",
            f"{row['latency_ms']:.0f}",
            f"{row['utility']:.4f}",
        ]
        for row in result["rows"]
        if row["asked_share"] in (None, result["budget"])
    ]
    lines += [f"## At {result['budget']:.0%} of the calls of always-cloud", "", *markdown_table(columns, rows)]
    names = [f"minus {other}" for other in (SPACED, RANDOM, THIRD)]
    rows = [
        [row["scheduler"], *(with_interval(row[name], signed=True) for name in names), "yes" if row["reached"] else "no"]
        for row in result["at_budget"]
    ]
    reached = f"relative above {result['target']:.0%}, and above spaced and random"
    lines += ["## hit_rate@10 gained there", "", *markdown_table(["scheduler", *names, f"reached ({reached})"], rows)]
    lines += [
        f"{COMMAND} was fitted as the command does it, on the validation events of the run's own data; all others were fitted on the other "
        "half of the users.",
        "",
        f"{POLICY} and {PLUG_IN} pay for time, energy and exposure too, as contexts ask; the others for calls alone. {RULES} cannot be "
        "priced.",
        "",
    ]
    rows = [
        [
            str(row["age_events"]),
            f"{row['hit_rate@10 of a fresh one']:.4f}",
            *(with_interval(row[name], signed=True) for name in CACHED_PLANS),
        ]
        for row in result["by_age_of_the_cache"]
    ]
    columns = ["age of the cache, events", "fresh", *(f"{name} - fresh" for name in CACHED_PLANS)]
    lines += ["## What staleness costs, hit_rate@10 on the same requests", "", *markdown_table(columns, rows)]
    lines += [
        "Fresh is fresh-full-100-device. What the device finds among the items that it holds is ranked in either case, so that with an "
        "embedding that has just been made they are the same.",
        "",
    ]
    return markdown_page(result, "Sequential replay", lines)


_LINES = ("black", "gray", "tab:brown", "tab:cyan", "tab:blue", "tab:orange", "tab:red", "tab:green", "tab:pink")
COLOURS = dict(zip((*TIMED, *COMPARED), _LINES, strict=True))


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, (curves, staleness) = pyplot.subplots(1, 2, figsize=(14, 5.5), width_ratios=(2, 1))
    for name, colour in COLOURS.items():
        rows = [row for row in result["rows"] if row["scheduler"] == name]
        means, bars = error_bars([row["relative"]["hit_rate@10"] for row in rows])
        style = "--" if name in TIMED else "-"
        shares = [row["share_of_calls"] for row in rows]
        # The two can be the same: then the lower one shows beside the upper.
        width = 4.0 if f"{name} + freshness" in COLOURS else 1.2
        bars_of = {"capsize": 2, "elinewidth": 1.2, "markersize": 4, "linewidth": width, "label": name}
        curves.errorbar(shares, means, bars, fmt=f"o{style}", color=colour, **bars_of)
    for name, marker in ((ALWAYS, "s"), (NEVER, "v"), (THIRD, "D"), (RULES, "^")):
        (row,) = (row for row in result["rows"] if row["scheduler"] == name)
        means, bars = error_bars([row["relative"]["hit_rate@10"]])
        curves.errorbar([row["share_of_calls"]], means, bars, fmt=marker, color="tab:purple", capsize=2, label=name)
    curves.axhline(result["target"], color="black", linewidth=0.8, linestyle=":")
    curves.axvline(result["budget"], color="black", linewidth=0.8, linestyle=":")
    curves.set_xlabel("calls, as a share of always-cloud's")
    curves.set_ylabel("hit_rate@10 relative to always-cloud, 95%")
    curves.set_title(f"{result['dataset']}: {result['users_evaluated']:,} users, {result['steps']} requests in order")
    for name, colour, width in zip(CACHED_PLANS, ("tab:green", "tab:orange"), (4.5, 1.5), strict=True):
        rows = result["by_age_of_the_cache"]
        means, bars = error_bars([row[name] for row in rows])
        ages = [row["age_events"] for row in rows]
        staleness.errorbar(ages, means, bars, fmt="o-", color=colour, linewidth=width, elinewidth=1.2, capsize=2, label=name)
    staleness.axhline(0.0, color="black", linewidth=0.8)
    staleness.set_xlabel("age of the cached embedding, events")
    staleness.set_ylabel("hit_rate@10 minus that of a fresh one, 95%")
    staleness.set_title("what staleness costs")
    for axes in (curves, staleness):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run_script(main, page)
