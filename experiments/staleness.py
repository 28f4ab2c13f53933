"""What is the device worth when the newest n events have not reached the cloud?

    python experiments/staleness.py --data DATA/ml-100k

The cloud's view of every user is made from the history as it was n = 0, 1, 3, 5, 10 events before the target. On the users whose past is
long enough: the cloud alone over the whole catalogue; the fused plan ``local-reuse-device``, which ranks that view's best 100 and the
popular items that the device holds with the full history; the device alone over the whole catalogue, were it to hold the records of
all items (only where these are small enough, and the bytes are told); and the weight of the cloud's score, chosen on validation, that
is best in a plain weighted sum with the device's own score.

Trains the system where ``--work`` does not have it, or takes ``--run``. Writes ``staleness-<dataset>.json``, ``.md``, ``.png``.
"""

from functools import partial
from typing import Any

import numpy as np
from harness import (
    AGES,
    OURS,
    Options,
    Study,
    error_bars,
    estimates,
    markdown_page,
    markdown_table,
    run_script,
    values,
    with_interval,
    write_results,
)

from cda4rec_jax.data import Split
from cda4rec_jax.evaluation.conditions import CLOUD_WEIGHTS, can_be_stale, device_alone_ranks, mixture_ranks
from cda4rec_jax.metrics import MISS_RANK
from cda4rec_jax.pipeline.decisions import record_bytes, resident_item_bytes
from cda4rec_jax.planner import CACHED_CANDIDATES

QUESTION = "What is the device worth when the cloud's view of the user lags by n events?"
FUSED = "local-reuse-device"
MAX_DEVICE_MB = 16.0  # of records that a device is taken to hold of a whole catalogue
OTHER_CATALOGUES = (10_000, 100_000, 1_000_000)
SYSTEMS = {"cloud": "cloud alone", "fused": "fused", "weighted": "weighted sum, best weight", "device": "device alone"}


def main(options: Options) -> dict[str, Any]:
    """Accuracy of cloud, device and both by the age of the cloud's view."""
    study = Study(options)
    positions = study.of_split(Split.TEST)[1]
    bytes_ = _bytes(study)
    alone = _device_alone(study) if bytes_["catalogue_mb"] <= MAX_DEVICE_MB else None
    everywhere = can_be_stale(positions, max(AGES))
    rows = []
    for age in AGES:
        found, weight = _of_age(study, age)
        if alone is not None:
            found["device"] = alone
        own = can_be_stale(positions, age)
        pool = study.test_ranks(FUSED, age)
        rows.append(
            {
                "lag_events": age,
                "users": int(own.sum()),
                "cloud_weight": weight,
                "recall_of_pool": float(np.mean([(ranks[own] < MISS_RANK).mean() for ranks in pool])) if own.any() else None,
                **{metric: _accuracy(found, own, metric) for metric in ("ndcg@10", "hit_rate@10")},
                "users_of_all_lags": {"users": int(everywhere.sum()), "ndcg@10": _accuracy(found, everywhere, "ndcg@10")},
            }
        )
    result = study.result(QUESTION, fused_plan=FUSED, rows=rows, bytes=bytes_)
    draw = partial(_draw, result)
    write_results(options.out, f"staleness-{study.name}", result, page(result), draw, study.console)
    return result


def _of_age(study: Study, age: int) -> tuple[dict[str, list[np.ndarray]], float]:
    """Test ranks of each seed by system, and the weight that validation chose."""
    mixtures = {split: [_mixture(study, seed, split, age) for seed in study.seeds] for split in (Split.VALIDATION, Split.TEST)}
    long_enough = can_be_stale(study.of_split(Split.VALIDATION)[1], age)
    on_validation = mixtures[Split.VALIDATION]
    quality = [values([ranks[long_enough, place] for ranks in on_validation]).mean() for place in range(len(CLOUD_WEIGHTS))]
    best = int(np.argmax(quality))
    found = {
        "cloud": [study.cloud_ranks(OURS, seed, study.ours, age) for seed in study.seeds],
        "fused": study.test_ranks(FUSED, age),
        "weighted": [ranks[:, best] for ranks in mixtures[Split.TEST]],
    }
    return found, CLOUD_WEIGHTS[best]


def _mixture(study: Study, seed: int, split: Split, age: int) -> np.ndarray:
    users, positions = study.of_split(split)

    def make() -> dict[str, np.ndarray]:
        long_enough = can_be_stale(positions, age)
        found = np.zeros((len(users), len(CLOUD_WEIGHTS)), np.int32)
        if long_enough.any():
            found[long_enough] = mixture_ranks(study.ours(seed), users[long_enough], positions[long_enough], age_events=age)
        return {"ranks": found}

    return study.cell(f"{OURS}-{seed}-{split}-mixture-age{age}", make)["ranks"]


def _device_alone(study: Study) -> list[np.ndarray]:
    users, positions = study.of_split(Split.TEST)
    cells = [
        study.cell(
            f"{OURS}-{seed}-test-device-alone",
            lambda seed=seed: {"ranks": device_alone_ranks(study.ours(seed), users, positions)},
        )
        for seed in study.seeds
    ]
    return [cell["ranks"] for cell in cells]


def _bytes(study: Study) -> dict[str, Any]:
    """What the records of candidates weigh, with their ids and scores, as they travel."""
    catalogue = study.ours(0).catalogue
    record, num_resident = record_bytes(catalogue) + 8, len(catalogue.residents.items)  # with id and score
    return {
        "record_bytes": int(record),
        "resident_items": num_resident,
        "held_kb": (record * CACHED_CANDIDATES + resident_item_bytes(catalogue) * num_resident) / 1e3,
        "catalogue_mb": record * study.interactions.num_items / 1e6,
        "catalogue_mb_at_items": {str(count): record * count / 1e6 for count in OTHER_CATALOGUES},
        "limit_mb": MAX_DEVICE_MB,
    }


def _accuracy(found: dict[str, list[np.ndarray]], users: np.ndarray, metric: str) -> dict[str, Any]:
    """Each system, and fused minus cloud and minus device alone."""
    columns = {name: values([of_seed[users] for of_seed in ranks], metric) for name, ranks in found.items()}
    compared = {f"fused_minus_{name}": columns["fused"] - columns[name] for name in ("cloud", "device") if name in columns}
    return estimates(columns | compared)


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    systems = [name for name in SYSTEMS if name in result["rows"][0]["ndcg@10"]]
    columns = [
        "lag",
        "users",
        *(f"{SYSTEMS[name]}, ndcg@10" for name in systems),
        "fused - cloud, 95%",
        "best cloud weight",
        "recall",
    ]
    rows = []
    for row in result["rows"]:
        found = row["ndcg@10"]
        means = ["-" if found[name]["mean"] is None else f"{found[name]['mean']:.4f}" for name in systems]
        gain = with_interval(found["fused_minus_cloud"], signed=True)
        recall = "-" if row["recall_of_pool"] is None else f"{row['recall_of_pool']:.3f}"
        rows.append([str(row["lag_events"]), f"{row['users']:,}", *means, gain, f"{row['cloud_weight']:.1f}", recall])
    weights = result["bytes"]
    larger = ", ".join(f"{float(mb):,.0f} MB at {int(count):,} items" for count, mb in weights["catalogue_mb_at_items"].items())
    held = "" if "device" in systems else f" That is above {weights['limit_mb']:.0f} MB, so the device alone was not evaluated."
    note = (
        f"Recall: the share of targets in the pool of the fused plan (`{result['fused_plan']}`). One record with its id and score has "
        f"{weights['record_bytes']:,} bytes. For that plan the device holds those of {weights['resident_items']:,} resident items, and "
        f"of the {CACHED_CANDIDATES} last candidates where they are none of these, {weights['held_kb']:,.0f} KB at most; the whole "
        f"catalogue, which the device alone would hold, has {weights['catalogue_mb']:,.1f} MB ({larger}).{held}"
    )
    return markdown_page(result, "Staleness", [*markdown_table(columns, rows), note, ""])


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, (accuracy, gains, weight) = pyplot.subplots(1, 3, figsize=(16, 4.5))
    rows, ages = result["rows"], [str(row["lag_events"]) for row in result["rows"]]
    common = [row["users_of_all_lags"]["ndcg@10"] for row in rows]
    colours = {"cloud": "tab:gray", "fused": "tab:blue", "weighted": "tab:cyan", "device": "tab:orange"}
    for name, label in SYSTEMS.items():
        if name in common[0]:
            accuracy.plot(ages, error_bars([found[name] for found in common])[0], marker="o", color=colours[name], label=label)
        if f"fused_minus_{name}" in common[0]:
            means, bars = error_bars([found[f"fused_minus_{name}"] for found in common])
            gains.errorbar(ages, means, bars, marker="o", capsize=3, color=colours[name], label=f"fused - {label}")
    accuracy.set_ylim(bottom=0)
    accuracy.set_ylabel("test ndcg@10")
    figure.suptitle(result["dataset"])
    accuracy.set_title(f"{rows[0]['users_of_all_lags']['users']:,} users long enough for every lag")
    gains.axhline(0.0, color="black", linewidth=0.8)
    gains.set_title("what fusion gains, 95% paired by user")
    gains.set_ylabel("difference in ndcg@10, the same users")
    weight.plot(ages, [row["cloud_weight"] for row in rows], marker="o", color="tab:cyan")
    weight.set_ylim(-0.05, 1.05)
    weight.set_title("best weight of the cloud's score (by validation)")
    for axes in (accuracy, gains):
        axes.legend()
    for axes in (accuracy, gains, weight):
        axes.set_xlabel("events by which the cloud's view lags")
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main, page)
