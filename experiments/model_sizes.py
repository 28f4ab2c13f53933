"""What do larger agents bring, and what do they cost?

    python experiments/model_sizes.py --data DATA/ml-100k

Width of the cloud agent (and of the item table) x width of the device agent, each trained alike: test accuracy of the cloud agent alone,
of ``fresh-full-100-device``, and of ``local-reuse-device`` where the cloud's view is three events old; milliseconds of computing one
request on this machine (medians measured when the run was trained, one request at a time, without any link), bytes of the agents'
weights, and bytes on the wire.

Trains what ``--work`` does not have. Without widths it takes those of the preset and their halves. Writes ``model-sizes-<dataset>.json``,
``.md``, ``.png``.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import (
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
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.conditions import can_be_stale
from cda4rec_jax.pipeline.decisions import facts_of
from cda4rec_jax.planner import ContextConfig, plan_bytes, plan_index, typical_contexts
from cda4rec_jax.runs.artifacts import TrainedSystem
from cda4rec_jax.training import RunConfig

QUESTION = "What do wider cloud and device agents bring in accuracy, and cost in milliseconds and bytes?"
PLAN, LAGGING_PLAN, LAG_EVENTS = "fresh-full-100-device", "local-reuse-device", 3
METRICS = ("ndcg@10", "hit_rate@10")


def main(options: Options, cloud_widths: tuple[int, ...] = (), device_widths: tuple[int, ...] = ()) -> dict[str, Any]:
    """Accuracy and costs of every pair of widths.

    Args:
        options: of every experiment.
        cloud_widths: of the cloud agent; each a multiple of twice its heads.
        device_widths: of the device agent; each a multiple of twice its heads.
    """
    if options.run is not None:
        raise UserError("this experiment trains a system for every pair of widths: name --data instead of --run")
    study = Study(options)
    device = study.config.system.device
    if device is None:
        raise UserError(f"preset {options.preset_name!r} has no device agent: name a joint preset")
    own = (study.config.system.cloud.decoder.width, device.decoder.width)
    pairs = [
        (cloud, of_device)
        for cloud in cloud_widths or (own[0] // 2, own[0])
        for of_device in device_widths or (own[1] // 2, own[1])
    ]
    for cloud, of_device in pairs:
        _check(study.config, cloud, of_device)
    reference = own if own in pairs else max(pairs)
    compared = _ranks(study, *reference, own)
    rows = [_sized(study, cloud, of_device, own, compared) for cloud, of_device in pairs]
    widths = {"cloud": reference[0], "device": reference[1]}
    lagging = {"plan": LAGGING_PLAN, "lag_events": LAG_EVENTS}
    result = study.result(QUESTION, plan=PLAN, lagging=lagging, reference_widths=widths, rows=rows)
    draw = partial(_draw, result)
    write_results(options.out, f"model-sizes-{study.name}", result, page(result), draw, study.console)
    return result


def with_widths(config: RunConfig, cloud: int, device: int) -> RunConfig:
    """The configuration at other widths; the blocks' hidden layers keep their share of them."""
    system = config.system
    assert system.device is not None

    def resized(decoder: Any, width: int) -> Any:
        return replace(decoder, width=width, mlp_hidden=decoder.mlp_hidden * width // decoder.width)

    return replace(
        config,
        system=replace(
            system,
            cloud=replace(system.cloud, decoder=resized(system.cloud.decoder, cloud)),
            device=replace(system.device, decoder=resized(system.device.decoder, device)),
        ),
    )


def _check(config: RunConfig, cloud: int, device: int) -> None:
    assert config.system.device is not None
    for name, width, decoder in (("cloud", cloud, config.system.cloud.decoder), ("device", device, config.system.device.decoder)):
        step = 2 * decoder.num_heads  # rotary positions turn pairs of each head's features
        if width < step or width % step:
            raise UserError(f"{name} width {width}: expected a multiple of {step}, twice the {decoder.num_heads} heads")


def _load(study: Study, cloud: int, device: int, own: tuple[int, int], seed: int) -> TrainedSystem:
    return study.trained(_variant(cloud, device, own), seed, with_widths(study.config, cloud, device))


def _variant(cloud: int, device: int, own: tuple[int, int]) -> str:
    return OURS if (cloud, device) == own else f"{OURS}-cloud{cloud}-device{device}"


def _ranks(study: Study, cloud: int, device: int, own: tuple[int, int]) -> dict[str, list[np.ndarray]]:
    """Test ranks of each seed by the cloud agent alone, by the fused plan, and with a lagging view for those who can have one."""
    variant, load = _variant(cloud, device, own), partial(_load, study, cloud, device, own)
    plan, lagging = plan_index(PLAN), plan_index(LAGGING_PLAN)
    long_enough = can_be_stale(study.of_split(Split.TEST)[1], LAG_EVENTS)
    return {
        "cloud_alone": [study.cloud_ranks(variant, seed, load) for seed in study.seeds],
        "fused": [study.plan_ranks(variant, seed, load, Split.TEST)[:, plan] for seed in study.seeds],
        "lagging": [study.plan_ranks(variant, seed, load, Split.TEST, LAG_EVENTS)[long_enough, lagging] for seed in study.seeds],
    }


def _sized(study: Study, cloud: int, device: int, own: tuple[int, int], reference: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Accuracy of one pair of widths, also against that of the ``reference`` widths, and what it costs."""
    ranks = _ranks(study, cloud, device, own)
    row: dict[str, Any] = {"cloud_width": cloud, "device_width": device}
    for metric in METRICS:
        columns = {name: values(found, metric) for name, found in ranks.items()}
        gains = {name: columns[name] - values(reference[name], metric) for name in ("fused", "lagging")}
        row[metric] = {
            **estimates({name: columns[name] for name in ("cloud_alone", "fused")} | {"fused_minus_reference": gains["fused"]}),
            **estimates({"lagging": columns["lagging"], "lagging_minus_reference": gains["lagging"]}),
        }
    trained = _load(study, cloud, device, own, 0)
    return row | {"ms": _milliseconds(trained), "bytes": _bytes(trained)}


def _milliseconds(trained: TrainedSystem) -> dict[str, float]:
    """Measured computing of one request under the plan: each side, and the longest path."""
    times = trained.measured_times
    cloud = times.semantic_ms["full"] + times.retrieval_evidence_ms["100"]
    abstract, after = times.abstract_beside_ms["full"], times.ranking_ms["100"]
    path = times.planning_ms + max(abstract + cloud, times.structured_ms) + after
    return {"cloud": cloud, "device": times.planning_ms + abstract + times.structured_ms + after, "longest_path": path}


def _bytes(trained: TrainedSystem) -> dict[str, int]:
    """Float32 weights of what each side holds, and what one request of a median history puts on the link."""
    system = trained.system
    assert system.device is not None and system.policy is not None
    on_device = _size(system.device.decoder) + _size(system.device.head) + _size(system.policy)
    on_device += int(system.device.prefix[...].nbytes)
    lengths = trained.corpus.target_positions(Split.TEST)
    user = np.array([np.argsort(lengths)[len(lengths) // 2]])
    history = trained.corpus.histories(user, lengths[user], trained.config.stored_events)
    facts = facts_of(jax.tree.map(jnp.asarray, history), trained.tables, trained.config.max_cache_age)
    world = trained.world()
    up, down = plan_bytes(typical_contexts(facts, world.scales, config=ContextConfig()), world.sizes)
    plan = plan_index(PLAN)
    return {
        "cloud_decoder": _size(system.cloud.decoder),
        "item_vectors": int(np.prod(trained.catalogue.vectors.shape)) * 4,
        "device": on_device,
        "uplink": int(up[0, plan]),
        "downlink": int(down[0, plan]),
    }


def _size(module: nnx.Module) -> int:
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(nnx.state(module)))


def _against(found: dict[str, Any], name: str) -> str:
    if found[name]["mean"] is None:
        return "no user"
    return f"{found[name]['mean']:.4f}, {with_interval(found[f'{name}_minus_reference'], signed=True)}"


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    columns = [
        "cloud width",
        "device width",
        "cloud alone, ndcg@10",
        "fused, ndcg@10, 95%",
        f"{LAG_EVENTS} events late, 95%",
        "ms cloud",
        "ms device",
        "ms longest path",
    ]
    columns += ["cloud decoder KB", "item vectors MB", "device KB", "up KB", "down KB"]
    rows = []
    for row in result["rows"]:
        ms, bytes_, found = row["ms"], row["bytes"], row["ndcg@10"]
        times = [f"{ms[name]:.2f}" for name in ("cloud", "device", "longest_path")]
        sizes = [f"{bytes_['cloud_decoder'] / 1e3:,.0f}", f"{bytes_['item_vectors'] / 1e6:,.1f}"]
        sizes += [f"{bytes_[name] / 1e3:,.1f}" for name in ("device", "uplink", "downlink")]
        quality = [f"{found['cloud_alone']['mean']:.4f}", *(_against(found, name) for name in ("fused", "lagging"))]
        rows.append([str(row["cloud_width"]), str(row["device_width"]), *quality, *times, *sizes])
    widths = result["reference_widths"]
    note = (
        f"Fused is `{result['plan']}`; late is `{LAGGING_PLAN}` with a cloud's view that is {LAG_EVENTS} events old, on the users who can "
        f"have one; both also less the same at widths {widths['cloud']} and {widths['device']}. Milliseconds are computing on this "
        "machine, without a link; weights are float32."
    )
    return markdown_page(result, "Model sizes", [*markdown_table(columns, rows), note, ""])


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, (accuracy, gains, time) = pyplot.subplots(1, 3, figsize=(16, 4.5))
    widths = {agent: sorted({row[f"{agent}_width"] for row in result["rows"]}) for agent in ("cloud", "device")}
    along, beside = sorted(widths, key=lambda agent: -len(widths[agent]))  # the agent of more widths is on the axis
    for number, width in enumerate(widths[beside]):
        rows = sorted((row for row in result["rows"] if row[f"{beside}_width"] == width), key=lambda row: row[f"{along}_width"])
        labels, label = [str(row[f"{along}_width"]) for row in rows], f"fused, {beside} width {width}"
        means, _ = error_bars([row["ndcg@10"]["fused"] for row in rows])
        (line,) = accuracy.plot(labels, means, marker="o", label=label)
        late, _ = error_bars([row["ndcg@10"]["lagging"] for row in rows])
        accuracy.plot(labels, late, marker="v", linestyle=":", color=line.get_color(), label=f"{LAG_EVENTS} events late, {width}")
        alone, _ = error_bars([row["ndcg@10"]["cloud_alone"] for row in rows])
        if beside == "cloud" or number == 0:
            accuracy.plot(
                labels,
                alone,
                marker="s",
                linestyle="--",
                color="tab:gray",
                label="cloud alone" + f", {width}" * (beside == "cloud"),
            )
        milliseconds = [row["ms"]["longest_path"] for row in rows]
        time.plot(milliseconds, means, marker="o", color=line.get_color(), label=label)
        for row, x, y in zip(rows, milliseconds, means, strict=True):
            time.annotate(f" {row['cloud_width']}x{row['device_width']}", (x, y), fontsize=8)
        means, bars = error_bars([row["ndcg@10"]["fused_minus_reference"] for row in rows])
        place = [widths[along].index(row[f"{along}_width"]) + 0.1 * (number - (len(widths[beside]) - 1) / 2) for row in rows]
        gains.errorbar(place, means, bars, fmt="o", capsize=3, color=line.get_color(), label=label)
    accuracy.set_ylabel("test ndcg@10")
    accuracy.set_title(f"{result['dataset']}: accuracy")
    accuracy.legend(fontsize=8)
    reference = result["reference_widths"]
    gains.set_xticks(range(len(widths[along])), [str(width) for width in widths[along]])
    gains.set_xlim(-0.5, len(widths[along]) - 0.5)
    gains.axhline(0.0, color="black", linewidth=0.8)
    gains.set_title(f"minus {reference['cloud']}x{reference['device']}, 95% paired by user")
    time.set_xlabel("ms of computing one request, longest path")
    time.set_title("accuracy against time (cloud width x device width)")
    time.margins(x=0.15)
    for axes in (accuracy, gains):
        axes.set_xlabel(f"{along} width")
    for axes in (accuracy, gains, time):
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main, page)
