"""``cda4rec bench train --preset gpu-256|gpu-1024``: long rows and a large catalogue, as a share of what the chip's matrix unit can do.

The decoder alone, on synthetic tokens in packed rows of 2,048. The yardstick is a large matrix product in the same dtype, which takes turns
with the training step in the same run.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from cda4rec_jax.agents.cloud import CloudConfig
from cda4rec_jax.bench.harness import OtherLoad, check_folder, measurement_json, method_lines, say, write_json
from cda4rec_jax.bench.layouts import Segment, num_real_tokens, packed_rows
from cda4rec_jax.bench.systems import measure_calls
from cda4rec_jax.bench.train_systems import (
    Model,
    flat_step,
    initial_state,
    make_model,
    packed_program,
    training_batch,
)
from cda4rec_jax.data.packing import PackingConfig
from cda4rec_jax.data.profiles import prefix_size
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.metrics.system import LatencySummary
from cda4rec_jax.nn import DecoderConfig, ItemTableConfig
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.runs import provenance
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, usable_cores
from cda4rec_jax.training import RunConfig, StepConfig, TrainConfig
from cda4rec_jax.training.mesh import Layout
from cda4rec_jax.training.step import jitted_steps, split_system

ROW_TOKENS = 2048
SHORTEST_SEGMENT = 256
STEPS_PER_CALL = 8  # that are on their way at the same time, so that the host is not what is measured
NUM_BATCHES = 8
MATMUL_SIZE = 8192
MATMULS_PER_CALL = 16
NUM_STEPS = 10_000  # of the learning-rate schedule
STEP, MATMUL = "training step", "matrix product"


@dataclass(frozen=True, kw_only=True)
class AcceleratorPreset:
    """A model, a batch, and a catalogue."""

    config: RunConfig
    num_items: int


def _preset(*, width: int, num_layers: int, num_heads: int, mlp_hidden: int, num_items: int) -> AcceleratorPreset:
    decoder = DecoderConfig(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        mlp_hidden=mlp_hidden,
        dropout_rate=0.1,
        attention_dropout_rate=0.1,
    )
    cloud = CloudConfig(decoder=decoder, item_table=ItemTableConfig(text_dropout_rate=0.0), history_length=ROW_TOKENS - 1)
    config = RunConfig(
        system=SystemConfig(cloud=cloud, device=None),
        packing=PackingConfig(history_length=ROW_TOKENS - 1, row_tokens=ROW_TOKENS, recent_share=0.0, profile_targets=0.0),
        train=TrainConfig(epochs=1, rows_per_batch=8, learning_rate=1e-3, loss_chunk=2048, compute_dtype="bfloat16"),
        text_dimensions=0,
    )
    return AcceleratorPreset(config=config, num_items=num_items)


ACCELERATOR_PRESETS: dict[str, Callable[[], AcceleratorPreset]] = {
    "gpu-256": partial(_preset, width=256, num_layers=4, num_heads=4, mlp_hidden=1024, num_items=131_071),
    "gpu-1024": partial(_preset, width=1024, num_layers=8, num_heads=8, mlp_hidden=4096, num_items=262_143),
}


def synthetic_batch(preset: AcceleratorPreset, seed: int) -> SequenceBatch:
    """Full rows of segments of 256 to 2,048 tokens; few items are popular and most are not."""
    rng = np.random.default_rng(seed)
    rows, row_tokens = preset.config.train.rows_per_batch, preset.config.packing.row_tokens
    shortest = min(SHORTEST_SEGMENT, row_tokens)
    placed = []
    for _ in range(rows):
        left = row_tokens
        placed.append([])
        while left:
            drawn = int(rng.integers(shortest, row_tokens + 1))
            tokens = left if left - drawn < shortest else drawn
            targets = 1 + (preset.num_items * rng.random(tokens) ** 3).astype(np.int32)
            items = np.concatenate([np.zeros(1, np.int32), targets[:-1]])
            placed[-1].append(Segment(item_indices=items, targets=targets, prefix=np.ones(prefix_size(0, 0), np.float32)))
            left -= tokens
    batch = packed_rows(placed, row_tokens)
    missing = rows * (row_tokens // shortest) + 1 - len(batch.prefixes)  # all batches have one shape
    return replace(batch, prefixes=np.pad(batch.prefixes, ((0, missing), (0, 0))))


def model_flops(decoder: DecoderConfig, batch: SequenceBatch, num_items: int) -> float:
    """Floating-point operations of forward and backward pass that the model needs: products of weights, of attention and of the loss.

    A token's own segment, up to it, is what attention needs; nothing that is computed twice counts twice, and nothing elementwise.
    """
    width, head_size = decoder.width, decoder.width // decoder.num_heads
    attention = width * (decoder.num_heads + 2 * decoder.num_kv_heads) * head_size + decoder.num_heads * head_size * width
    weights = decoder.num_layers * (attention + 3 * width * decoder.mlp_hidden) + width * num_items
    tokens = np.asarray(batch.segment_ids) > 0
    reads = float(np.sum(np.where(tokens, np.asarray(batch.positions) + 1, 0), dtype=np.float64))
    mixing = decoder.num_layers * 2 * decoder.num_heads * head_size * reads
    return 3 * 2 * (float(np.sum(tokens)) * weights + mixing)


@dataclass(frozen=True, kw_only=True)
class AcceleratorBenchmark:
    """What was measured."""

    preset_name: str
    preset: AcceleratorPreset
    compile_seconds: float
    temporary_bytes: int
    tokens_per_step: float
    flops_per_step: float
    measurement: Measurement  # work is in floating-point operations
    latency: dict[str, LatencySummary]  # of calls, which are several steps or products
    others: OtherLoad
    provenance: dict[str, Any]

    @property
    def tokens_per_second(self) -> float:
        return self.flops_per_second / self.flops_per_step * self.tokens_per_step

    @property
    def flops_per_second(self) -> float:
        return self.measurement.rates[STEP].median

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "benchmark": "train",
            "preset": self.preset_name,
            "threads": usable_cores(),
            "version": f"jax {jax.__version__}",
            "num_items": self.preset.num_items,
            "decoder": asdict(self.preset.config.system.cloud.decoder),
            "rows": [self.preset.config.train.rows_per_batch, self.preset.config.packing.row_tokens],
            "compile_seconds": self.compile_seconds,
            "temporary_bytes": self.temporary_bytes,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_step": self.flops_per_step,
            "tokens_per_second": self.tokens_per_second,
            "flops_per_second": self.flops_per_second,
            "matmul_flops_per_second": self.measurement.rates[MATMUL].median,
            "share_of_matmul_rate": asdict(self.measurement.ratio(STEP, MATMUL)),
            "calls": {
                STEP: {"steps": STEPS_PER_CALL, "latency": asdict(self.latency[STEP])},
                MATMUL: {"products": MATMULS_PER_CALL, "latency": asdict(self.latency[MATMUL])},
            },
            "measurement": measurement_json(self.measurement, self.others),
            "provenance": self.provenance,
        }

    def print(self, console: Console) -> None:
        """The figures, and how they were measured."""
        share = self.measurement.ratio(STEP, MATMUL)
        lines = [
            f"{self.preset_name} on {', '.join(self.provenance['devices'])}: {self.tokens_per_second:,.0f} tokens/s",
            f"model {self.flops_per_second / 1e12:.1f} TFLOP/s, products of {MATMUL_SIZE} x {MATMUL_SIZE} bfloat16 matrices "
            f"{self.measurement.rates[MATMUL].median / 1e12:.1f} TFLOP/s: a share of {share.median:.1%} [{share.p10:.1%}, {share.p90:.1%}]",
            f"compiled in {self.compile_seconds:.1f} s; temporary memory {self.temporary_bytes / 2**30:.2f} GB",
            *method_lines(self.measurement, usable_cores(), self.others),
        ]
        say(console, lines)


def bench_accelerator(
    preset_name: str,
    *,
    timing: TimingConfig,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> AcceleratorBenchmark:
    """Measure one of ``ACCELERATOR_PRESETS`` on this machine's accelerator, and write JSON into ``out``.

    Raises:
        UserError: there is no accelerator; ``out`` cannot be written to.
    """
    if jax.default_backend() == "cpu":
        raise UserError(
            f"preset {preset_name!r} is for accelerators, and JAX finds none here: --lower-only lowers its step for CUDA without one"
        )
    folder = check_folder(out)
    found = measure_accelerator(preset_name, ACCELERATOR_PRESETS[preset_name](), timing, progress)
    write_json(folder / f"train-{preset_name}.json", found.json())
    return found


def measure_accelerator(
    preset_name: str,
    preset: AcceleratorPreset,
    timing: TimingConfig,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    matmul_size: int = MATMUL_SIZE,
) -> AcceleratorBenchmark:
    """On whatever JAX computes on."""
    text = np.zeros((preset.num_items + 1, 1), np.float32)
    model = make_model(preset.config, text, prefix_size(0, 0), NUM_STEPS)
    progress("preparing and compiling", 0, 1)
    host = [synthetic_batch(preset, seed) for seed in range(NUM_BATCHES)]
    batches = [jax.tree.map(jnp.asarray, batch) for batch in host]
    flops = [model_flops(preset.config.system.cloud.decoder, batch, preset.num_items) for batch in host]
    program = packed_program(model, batches[0])
    progress("preparing and compiling", 1, 1)
    state = initial_state(model)

    def train(number: int) -> float:
        nonlocal state
        places = [(number * STEPS_PER_CALL + step) % NUM_BATCHES for step in range(STEPS_PER_CALL)]
        for place in places:
            state, _ = program.run(state, batches[place])
        jax.block_until_ready(state)
        return sum(flops[place] for place in places)

    contestants = [Contestant(name=STEP, call=train), _matmul(matmul_size)]
    with OtherLoad() as others:
        measurement, latency = measure_calls(contestants, [(STEP, MATMUL)], timing, progress=partial(progress, "measuring"))
    return AcceleratorBenchmark(
        preset_name=preset_name,
        preset=preset,
        compile_seconds=program.compile_seconds,
        temporary_bytes=program.temporary_bytes,
        tokens_per_step=float(np.mean([num_real_tokens(batch) for batch in host])),
        flops_per_step=float(np.mean(flops)),
        measurement=measurement,
        latency=latency,
        others=others,
        provenance=provenance(dataset_fingerprint=f"synthetic tokens of {preset_name}"),
    )


def _matmul(size: int) -> Contestant:
    """Products of square bfloat16 matrices, each of the result of the one before; work is in floating-point operations."""
    keys = jax.random.split(jax.random.key(0), 3)
    # Of such a size that products of products neither vanish nor overflow.
    weights, *starts = (jax.random.normal(key, (size, size), jnp.bfloat16) * size**-0.5 for key in keys)

    @jax.jit
    def chain(start: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, MATMULS_PER_CALL, lambda _, x: x @ weights, start)

    def call(number: int) -> float:
        jax.block_until_ready(chain(starts[number % len(starts)]))
        return MATMULS_PER_CALL * 2.0 * size**3

    return Contestant(name=MATMUL, call=call)


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """A step that was lowered for hardware that need not be here."""

    preset_name: str
    platform: str
    flops_per_step: float
    tokens_per_step: int
    num_parameters: int
    program_bytes: int  # of the StableHLO text

    def print(self, console: Console) -> None:
        """Two lines."""
        lines = [
            f"{self.preset_name}: lowered for {self.platform}, {self.program_bytes / 2**10:,.0f} KB of StableHLO",
            f"{self.num_parameters / 1e6:,.1f} M parameters; a step: {self.tokens_per_step:,} tokens, "
            f"{self.flops_per_step / 1e12:.2f} TFLOP",
        ]
        say(console, lines)


def lower_step(preset_name: str, preset: AcceleratorPreset, platform: str = "cuda") -> Lowering:
    """Trace the training step from shapes alone, and lower it for ``platform``, which JAX need not have."""
    config = preset.config
    step_config = StepConfig(system=config.system, train=config.train)
    text = jax.ShapeDtypeStruct((preset.num_items + 1, 1), jnp.float32)
    system = nnx.eval_shape(lambda text: System(config.system, text, prefix_size(0, 0), rngs=nnx.Rngs(0)), text)
    graph, trunk, deciders, frozen = split_system(system)
    model = Model(graph=graph, frozen=frozen, trunk=trunk, deciders=deciders, config=step_config, num_steps=NUM_STEPS)
    state = jax.eval_shape(partial(initial_state, model), trunk)
    batch = synthetic_batch(preset, 0)
    leaves, structure = jax.tree.flatten((state, training_batch(batch), frozen, None, None))
    step, _ = jitted_steps(graph, step_config, NUM_STEPS, Layout(None, num_rows=preset.num_items + 1), state)
    flat = flat_step(step, structure, len(jax.tree.leaves(state)))
    lowered = flat.trace(*leaves).lower(lowering_platforms=(platform,))
    return Lowering(
        preset_name=preset_name,
        platform=platform,
        flops_per_step=model_flops(config.system.cloud.decoder, batch, preset.num_items),
        tokens_per_step=num_real_tokens(batch),
        num_parameters=sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trunk)),
        program_bytes=len(lowered.as_text()),
    )
