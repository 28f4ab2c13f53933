"""The joint step: both trunks, the fusion head and the planner in one jitted function.

``L = L_cloud + L_device + sum_p rho(p) CE_fusion(p) - m(t) E_pi[U] - beta(t) H(pi)``

Catalogue losses move the trunks (the two decoders and the item table) only. The head and the policy (the deciders) learn on withheld
positions only, from trunks taken as given, so that the scores they see are as honest as at test time.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.array_typing import Array
from cda4rec_jax.links import LinkConfig
from cda4rec_jax.messages import HistoryBatch
from cda4rec_jax.pipeline.catalogue import ItemTables, build_catalogue
from cda4rec_jax.pipeline.decisions import PlanningWorld, draw_requests, redraw_requests
from cda4rec_jax.pipeline.outcomes import compute_views, fusion_cross_entropy, score_views, target_ranks
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.planner import ContextConfig, context_features, masked_softmax, plan_quality, realised_utility
from cda4rec_jax.training.batches import TrainingBatch
from cda4rec_jax.training.config import TrainConfig
from cda4rec_jax.training.losses import catalogue_loss, fusion_loss, planner_loss, quality_loss

REDRAW_STRIDE = 1_000_003  # keeps the further contexts of a step apart from the contexts of all other steps


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that training changes; a checkpoint holds all of it."""

    step: Array
    key_data: Array  # of the PRNG key, from which every step folds its own
    trunk: Any
    average: Any  # exponential moving average of `trunk`
    deciders: Any
    trunk_optimizer: Any
    decider_optimizer: Any


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What is static in a step."""

    system: SystemConfig
    train: TrainConfig
    contexts: ContextConfig = ContextConfig()
    links: LinkConfig = LinkConfig()


def is_decider(path: tuple, value: Any) -> bool:
    """True for the parameters of the fusion head and the policy."""
    del value
    return "head" in path or "policy" in path


def split_system(system: System) -> tuple[nnx.GraphDef, Any, Any, Any]:
    """Graph definition, trunk parameters, decider parameters, and what is never trained."""
    return nnx.split(system, nnx.All(nnx.Param, nnx.Not(is_decider)), nnx.Param, ...)  # pyright: ignore[reportReturnType]


def trunk_schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine."""
    warmup = max(1, round(config.warmup_share * num_steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(num_steps, warmup + 1), config.learning_rate * config.final_learning_rate_share
    )


def optimizers(config: TrainConfig, num_steps: int) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """AdamW with clipping for the trunks; Adam with clipping for the deciders. Vectors and scales are not decayed."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    trunk = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(trunk_schedule(config, num_steps), b2=0.98, weight_decay=config.weight_decay, mask=matrices),
    )
    deciders = optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(config.decider_learning_rate, b2=0.98))
    return trunk, deciders


def trunk_loss(
    system: System, batch: TrainingBatch, key: PRNGKeyArray, chunk_size: int | None
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Next-item cross-entropy of the cloud agent at its egress levels, and of the device agent on the whole history."""
    text_key, cloud_key, device_key = jax.random.split(key, 3)
    vectors = system.cloud.items.vectors(text_key)
    cloud = catalogue_loss(system.cloud(batch.cloud, vectors, cloud_key), vectors, batch.cloud.targets, chunk_size)
    if system.device is None or batch.device is None:
        return cloud, {"cloud_loss": cloud}
    own = system.device.item_vectors(vectors)
    device = catalogue_loss(system.device(batch.device, own, device_key), own, batch.device.targets, chunk_size)
    return cloud + device, {"cloud_loss": cloud, "device_loss": device}


def decider_loss(
    system: System,
    given: System,
    tables: ItemTables,
    world: PlanningWorld,
    history: HistoryBatch,
    step: Array,
    progress: Float[Array, ""],
    config: StepConfig,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Fusion head and policy on withheld positions.

    Args:
        system: gradients flow to its head and policy.
        given: the same weights behind ``stop_gradient``; computes all that the deciders see.
        progress: share of the joint steps that are done; 1 in the final, planner-only phase.
    """
    train, policy = config.train, system.policy
    assert given.device is not None and system.device is not None and policy is not None
    options = {"max_cache_age": config.system.max_cache_age, "contexts": config.contexts, "links": config.links}
    first = draw_requests(world, history, tables, step, **options)
    catalogue = build_catalogue(given.cloud, given.device, tables)
    views = compute_views(
        given.cloud,
        given.device,
        catalogue,
        history,
        first.context.cache_level,
        first.context.cache_age_events,
        config.system,
    )
    views = jax.lax.stop_gradient(views)
    scores = score_views(system.device.head, views)
    quality = jax.lax.stop_gradient(plan_quality(target_ranks(scores, views, history.targets)))
    losses, present = fusion_cross_entropy(scores, views, history.targets)

    gap = world.scales.quality_gap
    started = (progress >= train.planner_start_share).astype(jnp.float32)
    beta = train.entropy_start + (train.entropy_end - train.entropy_start) * progress

    def one_draw(draw: Array) -> tuple[dict[str, Array], Array]:
        # Outcomes depend on the cache alone, so that one pass over the models serves several contexts of one cache.
        asked = redraw_requests(world, history, tables, draw, first.context, **options)
        chosen = masked_softmax(policy.logits(asked.context, asked.predicted, asked.mask), asked.mask)
        utilities = realised_utility(quality, asked.realised, asked.context, failed=asked.failed, mask=asked.mask)
        estimate = policy.quality(context_features(asked.context))
        terms = {
            "planner_loss": planner_loss(chosen, utilities, gap, beta),
            "quality_loss": quality_loss(estimate, quality, asked.mask, gap),
            "utility": jnp.mean(jnp.sum(jnp.where(asked.mask, chosen * utilities, 0.0), axis=1)),
        }
        return terms, chosen

    terms, chosen = jax.vmap(one_draw)(step + jnp.arange(train.context_draws) * REDRAW_STRIDE)
    mean = jax.tree.map(jnp.mean, terms)
    fusion = fusion_loss(losses, present, jnp.mean(chosen, axis=0), train.practice_share * progress)
    total = fusion + started * (mean["planner_loss"] + train.quality_regression * mean["quality_loss"])
    return total, {"fusion_loss": fusion, **mean}


def joint_step(
    state: TrainState,
    batch: TrainingBatch,
    frozen: Any,
    tables: ItemTables | None,
    world: PlanningWorld | None,
    *,
    graph: nnx.GraphDef,
    config: StepConfig,
    num_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of everything; a trunk-only system (SASRec) has no ``world`` and skips the deciders."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data, impl="unsafe_rbg"), state.step)
    progress = state.step.astype(jnp.float32) / num_steps

    def loss(trunk: Any, deciders: Any) -> tuple[Array, dict[str, Array]]:
        system = nnx.merge(graph, trunk, deciders, frozen)
        total, metrics = trunk_loss(system, batch, key, config.train.loss_chunk)
        if world is not None and tables is not None and batch.withheld is not None:
            given = nnx.merge(graph, *jax.lax.stop_gradient((trunk, deciders, frozen)))
            decided, more = decider_loss(system, given, tables, world, batch.withheld, state.step, progress, config)
            total, metrics = total + decided, metrics | more
        return total, metrics

    (total, metrics), (trunk_gradient, decider_gradient) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        state.trunk, state.deciders
    )
    trunk_optimizer, decider_optimizer = optimizers(config.train, num_steps)
    updates, trunk_state = trunk_optimizer.update(trunk_gradient, state.trunk_optimizer, state.trunk)
    trunk = optax.apply_updates(state.trunk, updates)
    updates, decider_state = decider_optimizer.update(decider_gradient, state.decider_optimizer, state.deciders)
    decay = config.train.ema_decay
    # Early steps average over what there is, so that the start does not weigh on the average for long.
    decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step)) if decay else 0.0
    new = TrainState(
        step=state.step + 1,
        key_data=state.key_data,
        trunk=trunk,
        average=jax.tree.map(lambda old, now: decay * old + (1.0 - decay) * now, state.average, trunk),
        deciders=optax.apply_updates(state.deciders, updates),
        trunk_optimizer=trunk_state,
        decider_optimizer=decider_state,
    )
    return new, metrics | {"loss": total}


def decider_step(
    state: TrainState,
    history: HistoryBatch,
    frozen: Any,
    tables: ItemTables,
    world: PlanningWorld,
    draw: Array,
    *,
    graph: nnx.GraphDef,
    config: StepConfig,
    num_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
    """One planner-only update at the end of training: head and policy against the final (averaged) trunks."""

    def loss(deciders: Any) -> tuple[Array, dict[str, Array]]:
        system = nnx.merge(graph, state.average, deciders, frozen)
        given = nnx.merge(graph, *jax.lax.stop_gradient((state.average, deciders, frozen)))
        return decider_loss(system, given, tables, world, history, draw, jnp.ones(()), config)

    (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.deciders)
    optimizer = optimizers(config.train, num_steps)[1]
    updates, optimizer_state = optimizer.update(gradient, state.decider_optimizer, state.deciders)
    # Linear to zero: the last steps average out the noise of single withheld events.
    remaining = 1.0 - state.step.astype(jnp.float32) / config.train.final_steps
    updates = jax.tree.map(lambda update: remaining * update, updates)
    new = TrainState(
        step=state.step + 1,
        key_data=state.key_data,
        trunk=state.trunk,
        average=state.average,
        deciders=optax.apply_updates(state.deciders, updates),
        trunk_optimizer=state.trunk_optimizer,
        decider_optimizer=optimizer_state,
    )
    return new, metrics | {"loss": total}


def jitted_steps(graph: nnx.GraphDef, config: StepConfig, num_steps: int) -> tuple[Any, Any]:
    """Compiled ``joint_step`` and ``decider_step``; both take over the memory of the state they are given."""
    static = {"graph": graph, "config": config, "num_steps": num_steps}
    return jax.jit(partial(joint_step, **static), donate_argnums=0), jax.jit(partial(decider_step, **static), donate_argnums=0)
