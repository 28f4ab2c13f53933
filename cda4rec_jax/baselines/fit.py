"""The one trainer of all sequence baselines: AdamW, warm-up and cosine, early stopping on validation ndcg@10."""

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
from jaxtyping import Float, Int, PRNGKeyArray

from cda4rec_jax.array_typing import Array
from cda4rec_jax.baselines.protocol import Watch, catalogue_ranks
from cda4rec_jax.data.packing import PackingConfig
from cda4rec_jax.data.splits import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import HistoryBatch, SequenceBatch
from cda4rec_jax.metrics import hit_rate, ndcg
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.training import Progress
from cda4rec_jax.training.batches import TrainingSource

LOG_EVERY_STEPS = 10

Loss = Callable[[Any, SequenceBatch, PRNGKeyArray], Array]  # of a model on one batch
Score = Callable[[Any, HistoryBatch], Array]  # [b, i] of a model


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Optimisation of one model, in the terms in which the system's own training is told."""

    seed: int = 0
    epochs: int = 20
    rows_per_batch: int = 16
    learning_rate: float = 2e-3
    final_learning_rate_share: float = 0.05  # of the cosine schedule
    warmup_share: float = 0.05
    weight_decay: float = 0.01  # of matrices; vectors and scales are not decayed
    clip_norm: float = 5.0
    ema_decay: float = 0.0  # of the weights that are evaluated and kept; 0 takes the weights themselves
    max_seconds: float = 0.0  # stop after so much wall time; 0 has no limit
    patience: int = 3  # evaluations without a better validation ndcg@10
    evaluations_per_epoch: float = 1.0
    validation_users: int = 4096  # for early stopping


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceRecommender:
    """A trained model: compiled scores under its weights."""

    weights: tuple[Any, Any]  # trained, and never trained
    compiled: Callable[[tuple[Any, Any], HistoryBatch], Array]
    history_length: int

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.weights[0]))

    def score(self, history: HistoryBatch) -> Float[Array, "b i"]:
        """Score of every item as the next one."""
        return self.compiled(self.weights, history)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FitState:
    """What a step changes."""

    step: Array
    key_data: Array  # of the PRNG key, from which every step folds its own
    weights: Any
    average: Any  # exponential moving average of `weights`
    optimizer: Any


def validation_users(corpus: Corpus, config: FitConfig) -> Int[np.ndarray, "n"]:
    """The seeded sample of users on whose validation targets choices are made; the same for every baseline."""
    return np.sort(np.random.default_rng(config.seed).permutation(corpus.interactions.num_users)[: config.validation_users])


def fit_sequences(
    corpus: Corpus, model: nnx.Module, loss: Loss, score: Score, packing: PackingConfig, config: FitConfig, watch: Watch
) -> SequenceRecommender:
    """Train on packed rows, each user's whole training history once an epoch, and keep the weights that validate best.

    Args:
        corpus: what the prefixes of segments may tell; baselines pass ``sequences.without_profiles``.
        loss: of the model on one batch, with dropout and sampling from the key.
        score: of every item as each user's next one.
        watch: hears of the loss every few steps, and of each validation.

    Raises:
        UserError: the loss is not finite.
    """
    source = TrainingSource(
        corpus,
        packing,
        rows_per_batch=config.rows_per_batch,
        epochs=config.epochs,
        seed=config.seed,
        withheld=None,
        withheld_per_step=0,
        decider_interval=1,
        stored_events=packing.history_length,
    )
    num_steps = len(source)
    graph, weights, frozen = nnx.split(model, nnx.Param, ...)
    optimizer = _optimizer(config, num_steps)
    step = jax.jit(partial(_step, graph=graph, loss=loss, optimizer=optimizer, decay=config.ema_decay), donate_argnums=0)
    state = FitState(
        step=jnp.zeros((), jnp.int32),
        key_data=jax.random.key_data(jax.random.key(config.seed, impl="unsafe_rbg")),
        weights=_copied(weights),  # a step takes over the memory of its state, and the model stays whole
        average=_copied(weights),
        optimizer=jax.jit(optimizer.init)(weights),
    )
    best = fitted = SequenceRecommender(
        weights=(weights, frozen),
        compiled=jax.jit(lambda weights, history: score(nnx.merge(graph, *weights), history)),
        history_length=packing.history_length,
    )
    users = validation_users(corpus, config)
    positions = corpus.target_positions(Split.VALIDATION)[users]
    best_ndcg, worse, started = -1.0, 0, time.monotonic()
    evaluate_every = max(1, round(source.steps_per_epoch / config.evaluations_per_epoch))
    for index in range(num_steps):
        state, value = step(state, source[index].cloud, frozen)
        done = index + 1
        if done % LOG_EVERY_STEPS == 0 or done == num_steps:
            watch(Progress(phase="fit", step=done, num_steps=num_steps, values={"loss": _finite(value, done)}))
        late = bool(config.max_seconds) and time.monotonic() - started > config.max_seconds
        if not (done % evaluate_every == 0 or done == num_steps or late):
            continue
        now = replace(fitted, weights=(_copied(state.average), frozen))
        ranks = catalogue_ranks(now, corpus, users, positions)
        quality = float(np.mean(ndcg(ranks, 10)))
        found = {"ndcg@10": quality, "hit_rate@10": float(np.mean(hit_rate(ranks, 10)))}
        watch(Progress(phase="fit", step=done, num_steps=num_steps, validation=found))
        best, best_ndcg, worse = (now, quality, 0) if quality > best_ndcg else (best, best_ndcg, worse + 1)
        if late or worse >= config.patience:
            break
    return best


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _optimizer(config: FitConfig, num_steps: int) -> optax.GradientTransformation:
    warmup = max(1, round(config.warmup_share * num_steps))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(num_steps, warmup + 1), config.learning_rate * config.final_learning_rate_share
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b2=0.98, weight_decay=config.weight_decay, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
    )


def _step(
    state: FitState,
    batch: SequenceBatch,
    frozen: Any,
    *,
    graph: nnx.GraphDef,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    decay: float,
) -> tuple[FitState, Float[Array, ""]]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data, impl="unsafe_rbg"), state.step)
    value, gradient = jax.value_and_grad(lambda weights: loss(nnx.merge(graph, weights, frozen), batch, key))(state.weights)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.weights)
    weights = optax.apply_updates(state.weights, updates)
    # Early steps average over what there is, so that the start does not weigh on the average for long.
    share = 1.0 - jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
    return (
        FitState(
            step=state.step + 1,
            key_data=state.key_data,
            weights=weights,
            average=jax.tree.map(lambda old, now: old + share * (now - old), state.average, weights),
            optimizer=optimizer_state,
        ),
        value,
    )


def _finite(value: Array, step: int) -> float:
    if not np.isfinite(value):
        raise UserError(f"the loss is {float(value)} at step {step}: train with a lower learning_rate")
    return float(value)
