"""The joint step: both trunks, the fusion head and the planner in one jitted function.

``L = L_cloud + L_device + sum_p rho(p) L_fusion(p) + m(t) (-E_pi[U] / dQ - beta(t) H(pi) + c error(q))``

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

from cda4rec_jax.array_typing import Array, ItemVectors, PackedInts
from cda4rec_jax.links import LinkConfig
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.pipeline.catalogue import ItemTables, build_catalogue
from cda4rec_jax.pipeline.decisions import PlanningWorld, redraw_requests
from cda4rec_jax.pipeline.outcomes import fusion_losses, score_views, target_ranks
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.planner import ContextConfig, plan_quality
from cda4rec_jax.training.batches import TrainingBatch, micro_batch
from cda4rec_jax.training.config import ComputeDtype, TrainConfig
from cda4rec_jax.training.losses import catalogue_loss, decision_loss, fusion_loss, in_batch_loss, sampled_softmax_loss
from cda4rec_jax.training.mesh import Layout
from cda4rec_jax.training.observations import Observation, observe
from cda4rec_jax.training.sampling import ItemShares

NEGATIVES = 71  # keeps the draw of a trunk's negatives apart from its dropout
REDRAW_STRIDE = 1_000_003  # keeps the further contexts of a step apart from the contexts of all other steps


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that training changes; a checkpoint holds all of it. The leaves are arrays, or their shapes or shardings."""

    step: Any
    key_data: Any  # of the PRNG key, from which every step folds its own
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

    @property
    def of_requests(self) -> dict[str, Any]:
        """What ``observe`` is told."""
        return {"config": self.system, "contexts": self.contexts, "links": self.links}


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
    """AdamW with clipping for the trunks; Adam with clipping for the deciders. Vectors and scales are not decayed.

    Head and policy are clipped apart: where the cloud brings little, dQ is small, and the policy's loss, which is in units of it, large.
    """

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    def clip(of_policy: bool) -> optax.GradientTransformation:
        def chosen(params: Any) -> Any:
            return jax.tree_util.tree_map_with_path(lambda path, _: ("policy" in _names(path)) is of_policy, params)

        return optax.masked(optax.clip_by_global_norm(config.clip_norm), chosen)

    trunk = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(trunk_schedule(config, num_steps), b2=0.98, weight_decay=config.weight_decay, mask=matrices),
    )
    deciders = optax.chain(optax.chain(clip(False), clip(True)), optax.adam(config.decider_learning_rate, b2=0.98))
    return trunk, deciders


def compute_dtype(name: ComputeDtype) -> Any:
    """The dtype that a configuration names; ``auto`` is bfloat16 where the default backend is an accelerator."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name)


def _names(path: tuple) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def in_compute_dtype(trunk: Any, dtype: Any) -> Any:
    """The decoders' matrices in ``dtype``. Vectors (scales of norms), the item table and its projections stay as they are."""

    def convert(path: tuple, leaf: Array) -> Array:
        names = _names(path)
        return leaf.astype(dtype) if leaf.ndim > 1 and ("decoder" in names or "prefix" in names) else leaf

    return trunk if dtype == jnp.float32 else jax.tree_util.tree_map_with_path(convert, trunk)


def _num_targets(batch: SequenceBatch | None) -> Float[Array, ""] | None:
    return None if batch is None else jnp.sum(batch.targets > 0, dtype=jnp.float32)


def next_item_loss(
    hidden: Float[Array, "r t d"],
    item_vectors: ItemVectors,
    targets: PackedInts,
    key: PRNGKeyArray,
    num_targets: Float[Array, ""] | None,
    train: TrainConfig,
    layout: Layout,
    shares: ItemShares | None,
) -> Float[Array, ""]:
    """The loss of ``train.loss``; ``shares`` is where a loss other than "full" finds the items' distribution."""
    options: Any = {"num_targets": num_targets, "num_items": layout.num_rows - 1, "mesh": layout.mesh}
    common = (train.loss_chunk, train.label_smoothing)
    if train.loss == "full":
        return catalogue_loss(hidden, item_vectors, targets, *common, **options)
    assert shares is not None
    if train.loss == "in-batch":
        return in_batch_loss(hidden, item_vectors, targets, shares.log_share(targets), *common, **options)
    negatives = shares.draw(jax.random.fold_in(key, NEGATIVES), train.sampled_items)
    return sampled_softmax_loss(hidden, item_vectors, targets, negatives, shares.log_share(negatives), *common, **options)


def trunk_loss(
    system: System,
    batch: TrainingBatch,
    key: PRNGKeyArray,
    totals: dict[str, Float[Array, ""] | None],
    train: TrainConfig,
    layout: Layout,
    shares: ItemShares | None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Next-item cross-entropy of the cloud agent at its egress levels, and of the device agent on the whole history.

    Args:
        totals: targets of the cloud's and the device's batch, whose sum of losses is divided by them; None counts those of ``batch``.
    """
    text_key, cloud_key, device_key = jax.random.split(key, 3)
    vectors = system.cloud.items.vectors(text_key)
    loss = partial(next_item_loss, train=train, layout=layout, shares=shares)
    hidden = system.cloud(batch.cloud, vectors, cloud_key)
    cloud = loss(hidden, vectors, batch.cloud.targets, cloud_key, totals["cloud"])
    if system.device is None or batch.device is None:
        return cloud, {"cloud_loss": cloud}
    own = system.device.item_vectors(vectors)
    hidden = system.device(batch.device, own, device_key)
    device = loss(hidden, own, batch.device.targets, device_key, totals["device"])
    return cloud + device, {"cloud_loss": cloud, "device_loss": device}


def decider_loss(
    system: System,
    observation: Observation,
    world: PlanningWorld,
    draw: Array,
    progress: Float[Array, ""],
    config: StepConfig,
    ndcg_weight: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Fusion head and policy on withheld positions.

    Args:
        system: gradients flow to its head and policy alone.
        observation: requests at the withheld positions, seen through trunks taken as given.
        draw: number of the contexts; each draws ``config.train.context_draws`` of them.
        progress: share of the joint steps that are done; 1 in the final, planner-only phase.
        ndcg_weight: of the smoothed ndcg in the head's loss, see ``fusion_losses``.
    """
    train, policy = config.train, system.policy
    assert system.device is not None and policy is not None
    options = {"contexts": config.contexts, "links": config.links}
    observation = jax.lax.stop_gradient(observation.with_features_as(jnp.float32))
    history, views = observation.history, observation.views
    scores = score_views(system.device.head, views)
    quality = jax.lax.stop_gradient(plan_quality(target_ranks(scores, views, history.targets, world.space)))
    losses, present = fusion_losses(scores, views, history.targets, world.space, ndcg_weight)

    gap = world.scales.quality_gap
    started = (progress >= train.planner_start_share).astype(jnp.float32)
    beta = train.entropy_start + (train.entropy_end - train.entropy_start) * progress
    weights = {"quality_regression": train.quality_regression, "entropy_weight": beta}

    def one_draw(draw: Array) -> tuple[dict[str, Array], Array]:
        # Outcomes depend on the cache alone, so that one pass over the models serves several contexts of one cache.
        asked = redraw_requests(world, observation.context, history.event_ids, draw, **options)
        key = jax.random.fold_in(jax.random.key(train.seed), draw)
        loss, terms, chosen = decision_loss(policy, asked, quality, gap, train.objective, key=key, **weights)
        return {"decision_loss": loss, **terms}, chosen

    terms, chosen = jax.vmap(one_draw)(draw + jnp.arange(train.context_draws) * REDRAW_STRIDE)
    mean = jax.tree.map(jnp.mean, terms)
    fusion = fusion_loss(losses, present, jnp.mean(chosen, axis=0), train.practice_share * progress)
    return fusion + started * mean["decision_loss"], {"fusion_loss": fusion, **mean}


def trunk_gradient(
    state: TrainState,
    batch: TrainingBatch,
    frozen: Any,
    key: PRNGKeyArray,
    graph: nnx.GraphDef,
    config: StepConfig,
    layout: Layout,
    shares: ItemShares | None = None,
) -> tuple[tuple[Float[Array, ""], dict[str, Array]], Any]:
    """Loss, its parts, and the gradient of the trunks, in float32 whatever the decoders compute in."""
    dtype, parts = compute_dtype(config.train.compute_dtype), config.train.accumulation_steps

    def loss(trunk: Any, batch: TrainingBatch, key: PRNGKeyArray, totals: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
        system = nnx.merge(graph, in_compute_dtype(trunk, dtype), state.deciders, frozen)
        return trunk_loss(system, batch, key, totals, config.train, layout, shares)

    with_gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return with_gradient(state.trunk, batch, key, {"cloud": None, "device": None})
    totals = {"cloud": _num_targets(batch.cloud), "device": _num_targets(batch.device)}

    def of_part(part: Array) -> Any:
        cut = TrainingBatch(
            cloud=micro_batch(batch.cloud, part, parts),
            device=None if batch.device is None else micro_batch(batch.device, part, parts),
            withheld=None,
        )
        return with_gradient(state.trunk, cut, jax.random.fold_in(key, part), totals)

    numbers = jnp.arange(parts)
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_part, numbers[0]))
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None), start, numbers)[0]


def joint_step(
    state: TrainState,
    batch: TrainingBatch,
    frozen: Any,
    tables: ItemTables | None,
    world: PlanningWorld | None,
    shares: ItemShares | None = None,
    *,
    graph: nnx.GraphDef,
    config: StepConfig,
    num_steps: int,
    layout: Layout,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of everything; without a ``world`` (SASRec; most steps of a joint run) the deciders stay as they are.

    Negatives are a function of the state's key and step, so that a run that goes on draws those of one that was not stopped.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data, impl="unsafe_rbg"), state.step)
    progress = state.step.astype(jnp.float32) / num_steps
    (total, metrics), trunk_gradients = trunk_gradient(state, batch, frozen, key, graph, config, layout, shares)

    def loss(deciders: Any) -> tuple[Array, dict[str, Array]]:
        if world is None or tables is None or batch.withheld is None:
            return jnp.zeros(()), {}
        trunk, constant = layout.whole((state.trunk, frozen))
        system = nnx.merge(graph, trunk, deciders, constant)
        given = nnx.merge(graph, *jax.lax.stop_gradient((trunk, deciders, constant)))
        assert given.device is not None
        catalogue = build_catalogue(given.cloud, given.device, tables)
        observation = observe(given, catalogue, batch.withheld, tables, world, state.step, **config.of_requests)
        return decider_loss(system, observation, world, state.step, progress, config)

    (decided, more), decider_gradients = jax.value_and_grad(loss, has_aux=True)(state.deciders)
    trunk_optimizer, decider_optimizer = optimizers(config.train, num_steps)
    updates, trunk_state = trunk_optimizer.update(trunk_gradients, state.trunk_optimizer, state.trunk)
    trunk = optax.apply_updates(state.trunk, updates)
    deciders, decider_state = state.deciders, state.decider_optimizer
    if world is not None:
        updates, decider_state = decider_optimizer.update(decider_gradients, decider_state, deciders)
        deciders = optax.apply_updates(deciders, updates)
    decay = config.train.ema_decay
    # Early steps average over what there is, so that the start does not weigh on the average for long.
    decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step)) if decay else 0.0
    new = TrainState(
        step=state.step + 1,
        key_data=state.key_data,
        trunk=trunk,
        average=jax.tree.map(lambda old, now: decay * old + (1.0 - decay) * now, state.average, trunk),
        deciders=deciders,
        trunk_optimizer=trunk_state,
        decider_optimizer=decider_state,
    )
    return new, metrics | more | {"loss": total + decided}


def decider_step(
    state: TrainState,
    observation: Observation,
    frozen: Any,
    world: PlanningWorld,
    draw: Array,
    practised: Array | None = None,
    *,
    graph: nnx.GraphDef,
    config: StepConfig,
    num_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of head and policy alone, on what they see through the final (averaged) trunks.

    ``practised`` is the share that is done of the steps that the deciders would have had beside the trunks, for those that learn all of
    them afterwards; None is the planner-only phase at the end of training.
    """

    def loss(deciders: Any) -> tuple[Array, dict[str, Array]]:
        system = nnx.merge(graph, state.average, deciders, frozen)  # whose trunks are not read
        if practised is None:
            return decider_loss(system, observation, world, draw, jnp.ones(()), config, config.train.final_ndcg_weight)
        return decider_loss(system, observation, world, draw, practised, config)

    (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.deciders)
    optimizer = optimizers(config.train, num_steps)[1]
    updates, optimizer_state = optimizer.update(gradient, state.decider_optimizer, state.deciders)
    if practised is None:
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


def jitted_steps(
    graph: nnx.GraphDef, config: StepConfig, num_steps: int, layout: Layout, state: TrainState | None = None
) -> tuple[Any, Any]:
    """Compiled ``joint_step`` and ``decider_step`` for a ``state`` that ``layout`` has placed; both take over its memory.

    On one device the step takes any state, and ``state`` may be None.
    """
    static = {"graph": graph, "config": config, "num_steps": num_steps}
    # Arguments are where they were placed. Results are told to stay there, so that no step is compiled a second time.
    places: Any = {} if layout.mesh is None else {"out_shardings": (layout.shardings(state), layout.everywhere())}
    steps = partial(joint_step, **static, layout=layout), partial(decider_step, **static)
    return tuple(jax.jit(layout.in_context(step), donate_argnums=0, **places) for step in steps)  # pyright: ignore[reportReturnType]
