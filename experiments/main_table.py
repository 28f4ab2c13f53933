"""The main table of one dataset: the system beside every baseline, on the same data, split, validation and ranking.

    python experiments/main_table.py --data path/to/ml-100k --seeds 3

Trains what is not there yet: each system and seed keeps its ranks in ``--work``, so a stopped table goes on where it was. Baselines have
the sizes of the dataset's preset. Each of those that are trained by gradients tries ``--learning-rates`` with seed 0 and keeps the one with
the best validation ndcg@10, as does SASRec with full cross-entropy (ours keeps its preset); BERT4Rec tries each with every share of masked
items in ``BESIDE_RATES``, EASE and co-occurrence try ``COUNTED``. The row of the whole system answers by ``fresh-full-100-device``, or by
the fresh plan that is surely better on validation. Writes ``results/table-<dataset>.json``, ``.md`` and ``.png``.
"""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from harness import (
    OURS,
    RESULTS,
    SASREC_CE,
    SELECTION_USERS,
    WORK,
    configured,
    named,
    prepared_folder,
    run_script,
    sampled,
    sequence_sizes,
    train_resumed,
    with_interval,
    write_results,
)
from jaxtyping import Float
from rich.console import Console

from cda4rec_jax.baselines import BASELINES, CONFIGS, LSC4RecConfig, Recommender, catalogue_ranks
from cda4rec_jax.data import Split, load_prepared
from cda4rec_jax.data.text import TfidfSvd
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.accuracy import METRICS
from cda4rec_jax.metrics import ndcg, paired_intervals
from cda4rec_jax.pipeline.corpus import Corpus, build_corpus
from cda4rec_jax.planner import PLANS, plan_index
from cda4rec_jax.presets import sasrec
from cda4rec_jax.runs import provenance
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained
from cda4rec_jax.training import Progress, RunConfig, train_run

PLAN_NAME = "fresh-full-100-device"
CLOUD, PLAN = "cda4rec, cloud agent alone", f"cda4rec, {PLAN_NAME}"
SYSTEMS = (OURS, SASREC_CE, *BASELINES)
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
# Baselines without gradients, which no seed changes, and the values of their settings that are tried in all combinations.
COUNTED: dict[str, dict[str, tuple[float, ...]]] = {
    "popularity": {},
    "cooccurrence": {"window": (3, 10, 30), "history_decay": (0.6, 0.8, 0.9, 0.95)},
    "ease": {"regularisation": (50.0, 250.0, 1000.0, 4000.0), "history_decay": (0.5, 0.8, 1.0)},
}
# Settings of trained baselines that are tried with every learning rate. The best share of masked items differs by dataset: the paper of
# BERT4Rec has .2 on long histories and .6 on short ones.
BESIDE_RATES: dict[str, dict[str, tuple[float, ...]]] = {"bert4rec": {"mask_share": (0.2, 0.4, 0.6)}}
Setting = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One system under one seed: the test rank of every user under each of its rows, and what it cost."""

    ranks: dict[str, np.ndarray]  # row name -> [users]
    validation_ndcg: float
    seconds: float
    parameters: int
    curve: list[tuple[float, float]]  # (seconds of training, validation ndcg@10)
    chosen_plan: str | None = None  # of the system: the fresh plan that validation chose
    setting: Setting | None = None  # of a baseline: what validation chose

    def save(self, path: Path) -> None:
        """Write the whole file or none of it."""
        facts = {name: value for name, value in asdict(self).items() if name != "ranks"} | {"rows": list(self.ranks)}
        staged = path.with_suffix(".part.npz")
        arrays: dict[str, Any] = {f"ranks_{index}": ranks for index, ranks in enumerate(self.ranks.values())}
        np.savez_compressed(staged, facts=json.dumps(facts), **arrays)
        staged.rename(path)

    @classmethod
    def load(cls, path: Path) -> "Cell":
        """What ``save`` wrote."""
        with np.load(path) as stored:
            facts = json.loads(str(stored["facts"]))
            ranks = {row: stored[f"ranks_{index}"] for index, row in enumerate(facts.pop("rows"))}
        return cls(ranks=ranks, **facts)


def main(
    data: str,
    seeds: int = 3,
    systems: tuple[str, ...] = SYSTEMS,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    preset_name: Annotated[str, tyro.conf.arg(name="preset")] = "auto",
    text: Path | None = None,
    work: Path = WORK,
    out: Path = RESULTS,
) -> dict[str, Any]:
    """Train what is missing, and write the table.

    Args:
        data: any source that ``cda4rec train --data`` takes.
        seeds: seeds 0 to seeds - 1, each for the weights and the order of the data.
        systems: which of the systems to have in the table.
        learning_rates: that baselines trained by gradients try; one where an earlier table has chosen it.
        preset_name: of ours, and of the sizes of the baselines.
        text: vectors that `cda4rec encode` wrote, for ours instead of TF-IDF; results are named after data and file.
        work: where runs and ranks are kept.
        out: folder of the results.
    """
    unknown = set(systems) - set(SYSTEMS)
    if unknown or seeds < 1:
        raise UserError(f"got systems {sorted(unknown)} and {seeds} seeds: choose from {', '.join(SYSTEMS)}, and at least 1 seed")
    if not learning_rates or min(learning_rates) <= 0:
        raise UserError(f"got learning rates {learning_rates}: expected one or more above 0")
    console = Console(stderr=True)
    config = configured(preset_name, data, text)
    folder, prepared = prepared_folder(work, data, config, console)
    interactions = load_prepared(prepared)
    corpus = build_corpus(interactions, TfidfSvd(dimensions=config.text_dimensions or 64))
    cells: dict[str, list[Cell]] = {}
    for system in systems:
        choose = _tuned(system, learning_rates, config, corpus, prepared, folder, console)
        cells[system] = [_cell(folder / f"{system}-{seed}.npz", partial(choose, seed), console) for seed in range(seeds)]
    table = _table(cells, corpus, seeds, learning_rates)
    write_results(out, f"table-{named(interactions.name, config)}", table, markdown(table), partial(_plot, table), console)
    return table


def _cell(path: Path, make: Callable[[], Cell], console: Console) -> Cell:
    """The stored cell, or a new one that is stored."""
    if not path.exists():
        with console.status(path.stem):
            made = make()
        made.save(path)
        quality = {row: round(float(np.mean(ndcg(ranks, 10))), 4) for row, ranks in made.ranks.items()}
        console.print(f"{path.stem}: {made.seconds:.0f} s, validation ndcg@10 {made.validation_ndcg:.4f}, test {quality}")
    return Cell.load(path)


def _tuned(
    system: str,
    learning_rates: tuple[float, ...],
    config: RunConfig,
    corpus: Corpus,
    prepared: Path,
    folder: Path,
    console: Console,
) -> Callable[[int], Cell]:
    """Makes the cell of a seed, in the setting that seed 0 chose on validation where there is one to choose."""
    if system == OURS:
        return lambda seed: _ours(config, prepared, folder / f"{system}-{seed}", seed)
    make = partial(_sasrec if system == SASREC_CE else partial(_baseline, system), config, corpus, prepared, folder)
    tried = [
        _cell(folder / f"{system}-0{_labelled(setting)}.npz", partial(make, 0, setting), console)
        for setting in settings_of(system, learning_rates)
    ]
    best = max(tried, key=lambda cell: cell.validation_ndcg)
    assert best.setting is not None
    return lambda seed: best if seed == 0 or system in COUNTED else make(seed, best.setting)


def settings_of(system: str, learning_rates: tuple[float, ...]) -> list[Setting]:
    """What a baseline tries: all combinations of what ``COUNTED`` has for it, or of learning rates and what ``BESIDE_RATES`` has."""
    values = COUNTED.get(system, {"learning_rate": learning_rates, **BESIDE_RATES.get(system, {})})
    return [dict(zip(values, combined, strict=True)) for combined in itertools.product(*values.values())]


def _labelled(setting: Setting) -> str:
    return "".join(f"-{name}-{value:g}" for name, value in setting.items())


def _ours(config: RunConfig, prepared: Path, run_path: Path, seed: int) -> Cell:
    """The joint system: the cloud agent alone, one plan, and that plan or the fresh one that is surely better on validation."""
    started = replace(config, train=replace(config.train, seed=seed))
    run = train_resumed(str(prepared), started, run_path)
    trained = load_trained(run.path)
    users = np.arange(trained.corpus.interactions.num_users)
    validation = np.asarray(ndcg(_plan_ranks(trained, Split.VALIDATION, users), 10))
    best = _chosen_plan(validation)
    test = _plan_ranks(trained, Split.TEST, users)
    cloud = trained.population.full_ranks(jax.device_put(trained.weights), users, trained.corpus.target_positions(Split.TEST))
    return Cell(
        ranks={OURS: test[:, best], PLAN: test[:, plan_index(PLAN_NAME)], CLOUD: cloud},
        validation_ndcg=float(np.mean(validation[:, best])),
        seconds=run.read_json("training")["seconds"],
        parameters=_num_parameters(trained),
        curve=_curve(run.path),
        chosen_plan=PLANS[best].name,
    )


def _chosen_plan(quality: Float[np.ndarray, "users plans"]) -> int:
    """``PLAN_NAME``, or the best of the fresh plans whose 95% interval above it is above zero: among 18, some are better by chance."""
    given = plan_index(PLAN_NAME)
    fresh = [plan_index(plan.name) for plan in PLANS if plan.name.startswith("fresh")]
    gains = paired_intervals(quality.T[fresh][:, :, None], quality[None, :, given, None])
    better = {plan: gain.mean_difference for plan, gain in zip(fresh, gains, strict=True) if gain.low > 0}
    return max(better, key=lambda plan: better[plan], default=given)


def _plan_ranks(trained: TrainedSystem, split: Split, users: np.ndarray) -> np.ndarray:
    positions = trained.corpus.target_positions(split)[users]
    return trained.population.records(jax.device_put(trained.weights), trained.world(), users, positions, draws=1).ranks


def _sasrec(config: RunConfig, corpus: Corpus, prepared: Path, folder: Path, seed: int, setting: Setting) -> Cell:
    """SASRec with full cross-entropy, on ids: the cloud decoder of the preset."""
    del corpus
    base = sasrec(config)
    train = replace(base.train, seed=seed, **setting)
    path = folder / f"{SASREC_CE}-{seed}{_labelled(setting)}"
    run = train_run(str(prepared), replace(base, train=train), path, overwrite=True)
    trained = load_trained(run.path)
    weights, users = jax.device_put(trained.weights), np.arange(trained.corpus.interactions.num_users)
    curve = _curve(run.path)
    return Cell(
        ranks={SASREC_CE: trained.population.full_ranks(weights, users, trained.corpus.target_positions(Split.TEST))},
        validation_ndcg=max(quality for _, quality in curve),
        seconds=run.read_json("training")["seconds"],
        parameters=_num_parameters(trained),
        curve=curve,
        setting=setting,
    )


def _baseline(name: str, config: RunConfig, corpus: Corpus, prepared: Path, folder: Path, seed: int, setting: Setting) -> Cell:
    del prepared, folder
    started, curve = time.monotonic(), []

    def watch(progress: Progress) -> None:
        if progress.validation is not None:
            curve.append((time.monotonic() - started, progress.validation["ndcg@10"]))

    fitted: Recommender = BASELINES[name](corpus, _baseline_config(name, config, seed, setting), watch)
    seconds = time.monotonic() - started
    users = np.arange(corpus.interactions.num_users)
    ranks = catalogue_ranks(fitted, corpus, users, corpus.target_positions(Split.TEST))
    chosen_on = sampled(len(users), SELECTION_USERS)
    validation = catalogue_ranks(fitted, corpus, chosen_on, corpus.target_positions(Split.VALIDATION)[chosen_on])
    return Cell(
        ranks={name: ranks},
        validation_ndcg=float(np.mean(ndcg(validation, 10))),
        seconds=seconds,
        parameters=fitted.num_parameters,
        curve=curve,
        setting=setting,
    )


def _baseline_config(name: str, config: RunConfig, seed: int, setting: Setting) -> Any:
    """The baseline's own defaults but for the setting; of those that are trained by gradients, in the sizes of the preset."""
    base = CONFIGS[name]()
    if name in COUNTED:
        return replace(base, **setting)
    others = {name: value for name, value in setting.items() if name != "learning_rate"}
    sizes = sequence_sizes(config, seed, setting["learning_rate"]) | others
    if isinstance(base, LSC4RecConfig):
        device = config.system.device
        assert device is not None
        small = {"width": device.decoder.width, "mlp_hidden": device.decoder.width, "dropout_rate": device.decoder.dropout_rate}
        return replace(
            base, cloud=replace(base.cloud, **sizes, mlp_hidden=sizes["width"]), device=replace(base.device, **sizes | small)
        )
    hidden = {field: sizes["width"] for field in ("mlp_hidden",) if hasattr(base, field)}
    return replace(base, **sizes, **hidden)


def _num_parameters(trained: TrainedSystem) -> int:
    """Trained numbers: everything but frozen text."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(trained.weights)) - int(trained.corpus.text.size)


def _curve(run_path: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["elapsed_s"], line["ndcg@10"]) for line in lines if line["phase"] == "validation"]


def _table(cells: dict[str, list[Cell]], corpus: Corpus, seeds: int, learning_rates: tuple[float, ...]) -> dict[str, Any]:
    """Means and deviations over seeds, and paired intervals: of each row minus SASRec-CE, and of ours minus validation's best baseline."""
    rows = []
    for found in cells.values():
        for row in found[0].ranks:
            values = {name: np.stack([metric(cell.ranks[row]) for cell in found], axis=1) for name, metric in METRICS.items()}
            rows.append({"row": row, "cells": found, "values": values})
    baselines = [row for row in rows if not _is_ours(row["row"])]
    sasrec = next((row for row in baselines if row["row"] == SASREC_CE), None)
    best = max(baselines, key=_validation_ndcg, default=None)
    ours = next((row for row in rows if row["row"] == OURS), None)
    written = []
    for row in rows:
        by_seed = {name: values.mean(axis=0, dtype=np.float64) for name, values in row["values"].items()}
        written.append(
            {
                "system": row["row"],
                "mean": {name: float(values.mean()) for name, values in by_seed.items()},
                "deviation": {name: float(values.std(ddof=1)) if seeds > 1 else None for name, values in by_seed.items()},
                "minus_sasrec_ce": {} if row is sasrec else _minus(row, sasrec),
                **(
                    {"minus_best_baseline": _minus(row, best)} if _is_ours(row["row"]) else {"ours_minus_this": _minus(ours, row)}
                ),
                "training_seconds": float(np.mean([cell.seconds for cell in row["cells"]])),
                "parameters": row["cells"][0].parameters,
                "validation_ndcg@10": _validation_ndcg(row),
                "curve": row["cells"][0].curve if row["row"] in (OURS, SASREC_CE) else [],
                "setting": row["cells"][0].setting,
                "chosen_plans": [cell.chosen_plan for cell in row["cells"]] if row["row"] == OURS else [],
            }
        )
    return {
        "dataset": corpus.interactions.name,
        "num_users": corpus.interactions.num_users,
        "num_items": corpus.interactions.num_items,
        "seeds": seeds,
        "best_baseline": None if best is None else best["row"],
        "protocol": (
            "leave-one-out in time (n-2 train, n-1 validation, n test); full catalogue; seen items removed; ties count against "
            "the target; mean and deviation over seeds; intervals paired by user over the means of seeds, 2000 resamples; "
            + _told(learning_rates)
        ),
        "rows": sorted(written, key=lambda row: -row["mean"]["ndcg@10"]),
        "provenance": provenance(dataset_fingerprint=corpus.interactions.fingerprint),
    }


def _is_ours(row: str) -> bool:
    return row in (OURS, PLAN, CLOUD)


def _validation_ndcg(row: dict[str, Any]) -> float:
    return float(np.mean([cell.validation_ndcg for cell in row["cells"]]))


def _minus(row: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any]:
    """Differences of two rows, paired by user, by metric; none where one of them is not there."""
    if row is None or other is None:
        return {}
    names = ("hit_rate@10", "ndcg@10")
    return {name: asdict(paired_intervals(row["values"][name][None], other["values"][name][None])[0]) for name in names}


def _told(learning_rates: tuple[float, ...]) -> str:
    counted = (
        f"BERT4Rec with shares of masked items from {BESIDE_RATES['bert4rec']['mask_share']} likewise, of EASE and co-occurrence "
        f"{len(settings_of('ease', ()))} and {len(settings_of('cooccurrence', ()))} settings"
    )
    if len(learning_rates) == 1:
        return f"baselines at a learning rate of {learning_rates[0]:g}; {counted}"
    return f"learning rates of baselines from {learning_rates} by validation of seed 0, {counted}"


def markdown(table: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"# {table['dataset']}: {table['num_users']:,} users, {table['num_items']:,} items, {_seeds(table)}",
        "",
        f"| system | hit_rate@10 | ndcg@10 | ndcg@10 - SASRec-CE, 95% | ndcg@10 of {OURS} - this, 95% | training s | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        found = (row["minus_sasrec_ce"].get("ndcg@10"), row.get("ours_minus_this", {}).get("ndcg@10"))
        intervals = [_interval(one) if one else "" for one in found]
        cells = [row["system"], _with_deviation(row, "hit_rate@10"), _with_deviation(row, "ndcg@10"), *intervals]
        lines.append("| " + " | ".join([*cells, f"{row['training_seconds']:.0f}", f"{row['parameters']:,}"]) + " |")
    source = table["provenance"]
    origin = f"Data {source['dataset_fingerprint'][:12]}, commit {str(source['commit'])[:12]}"
    chosen = [plan for row in table["rows"] for plan in row["chosen_plans"]]
    if chosen:
        lines += [
            "",
            f"Plan of `{OURS}`, {PLAN_NAME} unless another is surely better on validation, by seed: {', '.join(chosen)}.",
        ]
    settings = [f"`{row['system']}` {_in_words(row['setting'])}" for row in table["rows"] if row["setting"]]
    if settings:
        lines += ["", f"Chosen on validation: {', '.join(settings)}."]
    best = next((row["minus_best_baseline"] for row in table["rows"] if row["system"] == OURS), {})
    if best:
        found = ", ".join(f"{name} {_interval(interval)}" for name, interval in best.items())
        lines += ["", f"`{OURS}` minus `{table['best_baseline']}`, of these baselines the best on validation: {found}."]
    lines += ["", f"Protocol: {table['protocol']}.", "", f"{origin}, {source['cores']} cores of {source['cpu_model']}.", ""]
    return "\n".join(lines)


def _in_words(setting: Setting) -> str:
    return " and ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in setting.items())


def _interval(interval: dict[str, Any]) -> str:
    return with_interval({**interval, "mean": interval["mean_difference"]}, signed=True)


def _seeds(table: dict[str, Any]) -> str:
    return "one seed" if table["seeds"] == 1 else f"{table['seeds']} seeds"


def _with_deviation(row: dict[str, Any], name: str) -> str:
    deviation = row["deviation"][name]
    return f"{row['mean'][name]:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _plot(table: dict[str, Any], pyplot: Any) -> Any:
    figure, (bars, curves) = pyplot.subplots(1, 2, figsize=(12, 4.5), gridspec_kw={"width_ratios": (1.3, 1)})
    rows = table["rows"][::-1]
    values = [row["mean"]["ndcg@10"] for row in rows]
    spread = [row["deviation"]["ndcg@10"] or 0.0 for row in rows]
    colours = ["tab:blue" if row["system"].startswith(OURS) else "tab:gray" for row in rows]
    bars.barh([row["system"] for row in rows], values, xerr=spread, color=colours)
    bars.set_xlabel("test ndcg@10" + (", bars: one deviation over seeds" if table["seeds"] > 1 else ", one seed"))
    bars.set_title(f"{table['dataset']}: {table['num_users']:,} users, {table['num_items']:,} items")
    for row in table["rows"]:
        if row["curve"]:
            label = f"{row['system']} (cloud agent alone)" if row["system"] == OURS else row["system"]
            curves.plot(*zip(*row["curve"], strict=True), marker="o", markersize=3, label=label)
    curves.set_xlabel("seconds of training")
    curves.set_ylabel("validation ndcg@10")
    if any(row["curve"] for row in table["rows"]):
        curves.legend()
    curves.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main, markdown)
