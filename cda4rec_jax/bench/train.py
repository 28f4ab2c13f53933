"""``cda4rec bench train``: real tokens in a second and temporary memory of training SASRec, ours beside others, at equal loss."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.allocator import keep_freed_memory, return_freed_memory
from cda4rec_jax.bench.charts import bar_chart
from cda4rec_jax.bench.harness import (
    OtherLoad,
    check_folder,
    measurement_json,
    megabytes,
    method_lines,
    not_installed_lines,
    say,
    times,
    write_json,
)
from cda4rec_jax.bench.layouts import Batches, both_layouts, num_real_tokens
from cda4rec_jax.bench.peers import chosen_peers
from cda4rec_jax.bench.systems import measure_calls
from cda4rec_jax.bench.train_competitors import OURS, OURS_PADDED, Competitor, Setting, makers
from cda4rec_jax.bench.train_systems import loss_memory, make_model, packed_batches
from cda4rec_jax.data import read_interactions
from cda4rec_jax.data.sources import source_name
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.linear_cross_entropy.native import may_split_operands
from cda4rec_jax.metrics.system import LatencySummary
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.presets import preset
from cda4rec_jax.processor import has_matrix_unit
from cda4rec_jax.runs import provenance
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, usable_cores
from cda4rec_jax.training import RunConfig

LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark:
    """All that was found."""

    data: str
    num_items: int
    config: RunConfig
    batches: Batches
    competitors: tuple[Competitor, ...]
    not_installed: tuple[str, ...]
    same_allocator: bool
    measurement: Measurement
    latency: dict[str, LatencySummary]  # of single steps, in the rounds
    others: OtherLoad
    loss_bytes: int  # temporary memory of our loss with its gradients
    softmax_bytes: int  # of the same with materialised logits
    remarks: tuple[str, ...]
    provenance: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        packed, padded = self.batches.packed, self.batches.padded
        return {
            "benchmark": "train",
            "data": self.data,
            "num_items": self.num_items,
            "decoder": asdict(self.config.system.cloud.decoder),
            "history_length": self.config.packing.history_length,
            "real_tokens_per_step": float(np.mean([num_real_tokens(batch) for batch in packed])),
            "packed": {"shape": list(packed[0].targets.shape), "fill": self.batches.packed_fill},
            "padded": {"shape": list(padded[0].rows.targets.shape), "fill": self.batches.padded_fill},
            "threads": usable_cores(),
            "systems": {one.name: _system_json(one, self.latency[one.name]) for one in self.competitors},
            "not_installed": list(self.not_installed),
            "same_allocator": self.same_allocator,
            "loss_temporary_bytes": {"ours": self.loss_bytes, "materialised": self.softmax_bytes},
            "measurement": measurement_json(self.measurement, self.others),
            "remarks": list(self.remarks),
            "provenance": self.provenance,
        }

    def print(self, console: Console) -> None:
        """The table, and how it was measured."""
        decoder, fills = self.config.system.cloud.decoder, (self.batches.packed_fill, self.batches.padded_fill)
        rows, length = self.batches.packed[0].targets.shape
        padded_rows, padded_length = self.batches.padded[0].rows.targets.shape
        table = Table(
            title=f"Training SASRec on {self.data}: {self.num_items:,} items, {decoder.num_layers} layers, {decoder.num_heads} heads, "
            f"width {decoder.width}, history {self.config.packing.history_length}, full cross-entropy",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        table.add_column("system")
        for column in ("real tokens/s", "ours faster by", "step ms", "loss", "off ours by", "step MB", "compile s"):
            table.add_column(column, justify="right")
        for one in self.competitors:
            ratio = "" if one.against is None else f"{times(self.measurement.ratio(one.against, one.name))}{_mark(one)}"
            equal = one.equal_loss
            losses = ("-", "-") if equal is None else (f"{equal.loss:.5f}", f"{equal.difference:.0e}")
            rate = f"{self.measurement.rates[one.name].median:,.0f}"
            latency = self.latency[one.name]
            steps = " / ".join(f"{value:,.1f}" for value in (latency.p50_ms, latency.p95_ms, latency.p99_ms))
            table.add_row(one.name, rate, ratio, steps, *losses, megabytes(one.temporary_bytes), f"{one.first_call_seconds:.1f}")
        for peer in self.not_installed:
            table.add_row(peer, "not installed")
        console.print(table)
        share = self.softmax_bytes / self.loss_bytes
        lines = [
            f"packed: {rows} x {length} tokens, {fills[0]:.1%} real; padded: {padded_rows} x {padded_length}, {fills[1]:.1%} real. Ratios: "
            f"against {OURS!r}, or against {OURS_PADDED!r} where marked *",
            f"temporary memory of the loss with gradients (XLA's plan): ours {megabytes(self.loss_bytes)} MB, materialised softmax "
            f"{megabytes(self.softmax_bytes)} MB, {share:.1f} times as much",
            "step MB: temporary memory of a training step, by XLA's plan for JAX and by torch's profiler for torch; compile s: less "
            "where the program was in the cache of compiled programs; for torch the first step",
            "step ms: p50, p95 and p99 of single steps, in the rounds",
            f"versions: {', '.join(dict.fromkeys(one.version for one in self.competitors))}",
            *not_installed_lines(self.not_installed),
            *method_lines(self.measurement, usable_cores(), self.others),
            *self.remarks,
        ]
        say(console, lines)


def _precision_remark() -> str | None:
    if jax.default_backend() != "cpu" or not has_matrix_unit() or not may_split_operands():
        return None
    return (
        "our loss splits float32 operands into two bfloat16 (17 of 24 bits) for this processor's matrix unit, and no other does; with "
        "JAX_DEFAULT_MATMUL_PRECISION=highest it keeps all bits"
    )


def _as_published(config: RunConfig) -> RunConfig:
    """SASRec drops attention weights too (Kang and McAuley, arXiv 1808.09781), which our presets do not."""
    cloud = config.system.cloud
    decoder = replace(cloud.decoder, attention_dropout_rate=cloud.decoder.dropout_rate)
    return replace(config, system=replace(config.system, cloud=replace(cloud, decoder=decoder)))


def bench_train(
    source: str,
    *,
    preset_name: str = "sasrec",
    peers: tuple[str, ...] | None = None,
    timing: TimingConfig,
    same_allocator: bool = False,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> TrainBenchmark:
    """Measure, and write JSON and (where matplotlib is installed) a chart into ``out``.

    Args:
        source: anything that ``read_source`` reads.
        preset_name: a trunk-only preset: ``sasrec`` or ``sasrec-NAME``.
        peers: names of ``bench.peers.PEERS``; None takes all that are installed.
        timing: how much to measure.
        same_allocator: let the others keep freed memory too, as ours does (see ``cda4rec_jax.allocator``).
        out: folder of the results.
        progress: hears of the stage, and how much of it is done.

    Raises:
        UserError: bad data, preset, peer or folder; a system whose loss is not ours.
    """
    chosen, not_installed = chosen_peers(peers)
    config = preset(preset_name, source)
    if config.system.device is not None:
        raise UserError(f"preset {preset_name!r} trains both agents: the benchmark takes sasrec, or sasrec-{preset_name}")
    if jax.default_backend() != "cpu" and set(chosen) - {"jax"}:
        raise UserError(
            f"torch is measured on the CPU, and JAX computes on {jax.default_backend()}: set JAX_PLATFORMS=cpu, or --peers jax"
        )
    config = _as_published(config)
    interactions = read_interactions(source)
    folder = check_folder(out)
    text = np.zeros((interactions.num_items + 1, 1), np.float32)
    corpus = Corpus(interactions=interactions, text=text, ids_only=True)
    packed, num_steps = packed_batches(corpus, config)
    batches = both_layouts(packed, config.packing.history_length + 1)
    model = make_model(config, text, corpus.prefix_size, num_steps)
    setting = Setting(model=model, batches=batches, histories=corpus.training_histories())
    memory = loss_memory(model, packed[0].targets.size)
    with ExitStack() as stack:
        competitors = []
        making = makers(chosen, setting)
        for done, make in enumerate(making):
            progress("preparing and compiling", done, len(making))
            competitors.append(make())
            stack.callback(competitors[-1].close)
            _require_equal_loss(competitors[-1])
        progress("preparing and compiling", len(making), len(making))
        with OtherLoad() as others:
            measurement, latency = _measured(competitors, timing, same_allocator, partial(progress, "measuring"))
        remarks = tuple(filter(None, (_precision_remark(), *(one.remark() for one in competitors))))
    found = TrainBenchmark(
        data=source_name(source),
        num_items=interactions.num_items,
        config=config,
        batches=batches,
        competitors=tuple(competitors),
        not_installed=not_installed,
        same_allocator=same_allocator,
        measurement=measurement,
        latency=latency,
        others=others,
        loss_bytes=memory[0],
        softmax_bytes=memory[1],
        remarks=remarks,
        provenance=provenance(dataset_fingerprint=interactions.fingerprint),
    )
    _write(found, folder)
    return found


def _measured(
    competitors: Sequence[Competitor], timing: TimingConfig, same_allocator: bool, progress: Callable[[int, int], None]
) -> tuple[Measurement, dict[str, LatencySummary]]:
    contestants = [Contestant(name=one.name, call=one.call, before=_before(one, same_allocator)) for one in competitors]
    pairs = [(one.against, one.name) for one in competitors if one.against is not None]
    return measure_calls(contestants, pairs, timing, progress=progress)


def _before(one: Competitor, same_allocator: bool) -> Callable[[], object]:
    """Ours trains under the allocator that ``cda4rec train`` sets up, others under the C library's defaults, as their users do.

    Everyone has an untimed step under its own setting first: the turn of another has left the heap in another state, and in training
    that happens once.
    """
    prepare = keep_freed_memory if same_allocator or one.name in (OURS, OURS_PADDED) else return_freed_memory

    def before() -> None:
        prepare()
        one.call(0)

    return before


def _require_equal_loss(one: Competitor) -> None:
    if one.equal_loss is not None and not one.equal_loss.difference <= LOSS_TOLERANCE:
        raise UserError(
            f"{one.name!r} has loss {one.equal_loss.loss:.6f} and ours is {one.equal_loss.ours:.6f}, on the same batch from the same "
            f"weights without dropout: they must agree to {LOSS_TOLERANCE}, or speeds say nothing. This is a bug to report"
        )


def _write(found: TrainBenchmark, folder: Path) -> None:
    write_json(folder / f"train-{found.data}.json", found.json())
    rates = {one.name: found.measurement.rates[one.name] for one in found.competitors}
    title = f"Training SASRec on {found.data}: {found.num_items:,} items, width {found.config.system.cloud.decoder.width}"
    bar_chart(folder / f"train-{found.data}.png", title, "real tokens per second", rates, (OURS, OURS_PADDED))


def _mark(one: Competitor) -> str:
    return " *" if one.against == OURS_PADDED else "  "


def _system_json(one: Competitor, latency: LatencySummary) -> dict[str, Any]:
    return {
        "against": one.against,
        "threads": usable_cores(),
        "version": one.version,
        "temporary_bytes": one.temporary_bytes,
        "memory_by": one.memory_by,
        "first_call_seconds": one.first_call_seconds,
        "latency": asdict(latency),
        "equal_loss": None if one.equal_loss is None else asdict(one.equal_loss) | {"difference": one.equal_loss.difference},
    }
