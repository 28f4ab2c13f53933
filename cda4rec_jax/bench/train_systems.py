"""SASRec in JAX, trained on packed and on padded rows: the training step of this package, and what one would write without it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.array_typing import Array, ItemVectors
from cda4rec_jax.bench.harness import temporary_bytes
from cda4rec_jax.bench.layouts import GatheredBatch
from cda4rec_jax.kernels.linear_cross_entropy import linear_cross_entropy
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.system import System
from cda4rec_jax.training import RunConfig
from cda4rec_jax.training.batches import TrainingBatch, TrainingSource
from cda4rec_jax.training.losses import catalogue_loss
from cda4rec_jax.training.mesh import Layout
from cda4rec_jax.training.step import StepConfig, TrainState, jitted_steps, optimizers, split_system

NUM_BATCHES = 16  # that rotate


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trunk-only system at the start of training."""

    graph: nnx.GraphDef
    frozen: Any
    trunk: Any
    deciders: Any  # empty
    config: StepConfig
    num_steps: int

    def weights(self) -> dict[str, np.ndarray]:
        """All weights by name, for a peer: ``ids``, ``prefix``, ``final_norm``, and ``LAYER.NAME`` for each block."""
        cloud = nnx.merge(self.graph, self.trunk, self.deciders, self.frozen).cloud
        found = {
            "ids": cloud.items.vectors(),
            "prefix": cloud.prefix[...],
            "final_norm": cloud.decoder.final_norm.scale[...],
        }
        for layer, block in enumerate(cloud.decoder.blocks):
            found |= {
                f"{layer}.attention_norm": block.attention_norm.scale[...],
                f"{layer}.qkv": block.attention.qkv[...],
                f"{layer}.out": block.attention.out[...],
                f"{layer}.mlp_norm": block.mlp_norm.scale[...],
                f"{layer}.gate_up": block.mlp.gate_up[...],
                f"{layer}.down": block.mlp.down[...],
            }
        return {name: np.asarray(value) for name, value in found.items()}


def initial_state(model: Model, trunk: Any = None) -> TrainState:
    """A fresh state, of ``trunk`` or a copy of the model's; steps take over the memory of the state they are given."""
    trunk_optimizer, decider_optimizer = optimizers(model.config.train, model.num_steps)
    trunk = jax.tree.map(jnp.copy, model.trunk) if trunk is None else trunk
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key_data=jax.random.key_data(jax.random.key(model.config.train.seed, impl="unsafe_rbg")),
        trunk=trunk,
        average=jax.tree.map(jnp.copy, trunk),
        deciders=model.deciders,
        trunk_optimizer=trunk_optimizer.init(trunk),
        decider_optimizer=decider_optimizer.init(model.deciders),
    )


def make_model(config: RunConfig, text: Float[np.ndarray, "i z"], prefix_size: int, num_steps: int) -> Model:
    """Weights as training draws them, except that matrices which start at zero are drawn too.

    A block that starts at zero is the identity, and a comparison of losses would then not see what is inside.
    """
    system = System(config.system, jnp.asarray(text), prefix_size, rngs=nnx.Rngs(config.train.seed))
    graph, trunk, deciders, frozen = split_system(system)
    keys = iter(jax.random.split(jax.random.key(config.train.seed + 1), len(jax.tree.leaves(trunk))))

    def drawn(leaf: Array) -> Array:
        key = next(keys)
        return leaf if bool(jnp.any(leaf != 0)) else leaf.shape[0] ** -0.5 * jax.random.normal(key, leaf.shape, leaf.dtype)

    step = StepConfig(system=config.system, train=config.train)
    trunk = jax.tree.map(drawn, trunk)
    return Model(graph=graph, frozen=frozen, trunk=trunk, deciders=deciders, config=step, num_steps=num_steps)


def packed_batches(corpus: Corpus, config: RunConfig, count: int = NUM_BATCHES) -> tuple[list[SequenceBatch], int]:
    """The first batches of training with this configuration, and the number of steps that it has."""
    train = config.train
    source = TrainingSource(
        corpus,
        config.packing,
        rows_per_batch=train.rows_per_batch,
        epochs=train.epochs,
        seed=train.seed,
        withheld=None,
        withheld_per_step=train.withheld_per_step,
        decider_interval=train.decider_interval,
        stored_events=config.system.stored_events,
    )
    return [source[step].cloud for step in range(min(count, len(source)))], len(source)


LossFunction = Callable[[Float[Array, "r t d"], ItemVectors, GatheredBatch], Float[Array, ""]]


def loss_on_all_slots(hidden: Float[Array, "r t d"], vectors: ItemVectors, batch: GatheredBatch) -> Float[Array, ""]:
    """Logits of every slot, padding included, are materialised; weights of 0 hide what is padding."""
    targets = batch.rows.targets.reshape(-1)
    weights = (targets > 0).astype(jnp.float32)
    tokens = hidden.reshape(-1, hidden.shape[-1])
    return linear_cross_entropy(tokens, vectors, targets, weights, implementation="reference") / jnp.sum(weights)


def loss_at_real_positions(hidden: Float[Array, "r t d"], vectors: ItemVectors, batch: GatheredBatch) -> Float[Array, ""]:
    """Logits of real tokens only are materialised."""
    tokens = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    weights = (batch.targets > 0).astype(jnp.float32)
    return linear_cross_entropy(tokens, vectors, batch.targets, weights, implementation="reference") / jnp.sum(weights)


def our_loss_at_real_positions(
    hidden: Float[Array, "r t d"], vectors: ItemVectors, batch: GatheredBatch, *, chunk_size: int | None
) -> Float[Array, ""]:
    """Real tokens only, and no logits in memory."""
    tokens = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    return catalogue_loss(tokens[None], vectors, batch.targets[None], chunk_size)


def padded_step(
    state: TrainState, batch: GatheredBatch, frozen: Any, *, model: Model, loss: LossFunction
) -> tuple[TrainState, dict[str, Array]]:
    """``joint_step`` of a trunk-only system, on padded rows and with a loss of choice; all else is the same."""
    config = model.config.train
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data, impl="unsafe_rbg"), state.step)

    def value(trunk: Any) -> Array:
        return decoded_loss(model, trunk, frozen, batch, loss, key)

    total, gradient = jax.value_and_grad(value)(state.trunk)
    updates, trunk_optimizer = optimizers(config, model.num_steps)[0].update(gradient, state.trunk_optimizer, state.trunk)
    trunk = optax.apply_updates(state.trunk, updates)
    decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step)) if config.ema_decay else 0.0
    average = jax.tree.map(lambda old, now: decay * old + (1.0 - decay) * now, state.average, trunk)
    changes = {"step": state.step + 1, "trunk": trunk, "average": average, "trunk_optimizer": trunk_optimizer}
    return replace(state, **changes), {"loss": total}


def decoded_loss(
    model: Model, trunk: Any, frozen: Any, batch: GatheredBatch, loss: LossFunction, key: PRNGKeyArray | None
) -> Float[Array, ""]:
    """The loss on padded rows; dropout is on where there is a key."""
    cloud = nnx.merge(model.graph, trunk, model.deciders, frozen).cloud
    text_key, cloud_key = (None, None) if key is None else jax.random.split(key)
    vectors = cloud.items.vectors(text_key)
    return loss(cloud(batch.rows, vectors, cloud_key), vectors, batch)


def packed_loss(model: Model, trunk: Any, frozen: Any, batch: SequenceBatch) -> Float[Array, ""]:
    """The loss on packed rows without dropout, as ``training.step.trunk_loss`` computes it."""
    cloud = nnx.merge(model.graph, trunk, model.deciders, frozen).cloud
    vectors = cloud.items.vectors()
    return catalogue_loss(cloud(batch, vectors), vectors, batch.targets, model.config.train.loss_chunk)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled step with what compiling it told."""

    run: Callable[..., tuple[TrainState, dict[str, Array]]]
    compile_seconds: float
    temporary_bytes: int


def flat_step(step: Callable[..., Any], structure: Any, num_donated: int) -> Any:
    """``step`` as a jitted function of the leaves of its arguments, the first of which it takes over.

    Lowering hands out arguments whose leaves are no arrays, which dataclasses with typed fields do not take.
    """
    return jax.jit(lambda *leaves: step(*jax.tree.unflatten(structure, leaves)), donate_argnums=range(num_donated))


def compile_step(step: Callable[..., Any], state: TrainState, *arguments: Any) -> Program:
    """Compile for these arguments; the memory is that of XLA's own plan, besides inputs and outputs."""
    leaves, structure = jax.tree.flatten((state, *arguments))
    start = time.perf_counter()
    compiled = flat_step(step, structure, len(jax.tree.leaves(state))).lower(*leaves).compile()
    seconds = time.perf_counter() - start

    def run(*arguments: Any) -> tuple[TrainState, dict[str, Array]]:
        return compiled(*jax.tree.leaves(arguments))

    return Program(run=run, compile_seconds=seconds, temporary_bytes=temporary_bytes(compiled))


def packed_program(model: Model, batch: SequenceBatch) -> Program:
    """The training step of this package."""
    layout = Layout(None, num_rows=model.weights()["ids"].shape[0])
    step, _ = jitted_steps(model.graph, model.config, model.num_steps, layout)
    program = compile_step(step, initial_state(model), training_batch(batch), model.frozen, None, None)
    return replace(program, run=lambda state, one: program.run(state, training_batch(one), model.frozen, None, None))


def padded_program(model: Model, batch: GatheredBatch, loss: LossFunction) -> Program:
    """The same on padded rows, with a loss of choice."""
    program = compile_step(partial(padded_step, model=model, loss=loss), initial_state(model), batch, model.frozen)
    return replace(program, run=lambda state, one: program.run(state, one, model.frozen))


def training_batch(batch: SequenceBatch) -> TrainingBatch:
    """For a step of a trunk-only system."""
    return TrainingBatch(cloud=batch, device=None, withheld=None)


def loss_memory(model: Model, num_tokens: int) -> tuple[int, int]:
    """Temporary bytes of the loss with its gradients, ours and with materialised logits, for so many tokens of this catalogue."""
    ids = model.weights()["ids"]
    tokens = jax.ShapeDtypeStruct((num_tokens, ids.shape[1]), jnp.float32)
    targets = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    weights = jax.ShapeDtypeStruct((num_tokens,), jnp.float32)

    def needed(**options: Any) -> int:
        gradients = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, **options), (0, 1)))
        return temporary_bytes(gradients.lower(tokens, jax.ShapeDtypeStruct(ids.shape, ids.dtype), targets, weights).compile())

    chunk_size = model.config.train.loss_chunk
    return needed(chunk_size=chunk_size), needed(implementation="reference")
