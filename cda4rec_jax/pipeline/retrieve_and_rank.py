"""Slates for batches of users under one plan, on one device or on a mesh.

On a mesh ``data=D,items=I`` a device holds one of I parts of the catalogue and of every record, and answers for one of D x I parts of the
users: ``jax.jit`` compiles one program for all, and inside of it ``jax.shard_map`` says who does what. A device asks the others that
share its users' place on ``data`` for the rows that it reads and for their best items (``retrieval/sharded.py``).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int, Shaped

from cda4rec_jax.agents.cloud import CloudAgent
from cda4rec_jax.agents.device import DeviceAgent
from cda4rec_jax.array_typing import Array, ItemCategories, ItemVectors
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Candidates, EgressLevel, Evidence, HistoryBatch, Placement, Plan, Slate, UserAbstract
from cda4rec_jax.pipeline.catalogue import Catalogue, Residents
from cda4rec_jax.pipeline.subtasks import (
    each_once,
    model_semantics,
    model_structure,
    rank_slate,
    release,
    released_items,
    score_features,
    unseen,
    with_residents,
)
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.retrieval.exact import exact_search
from cda4rec_jax.retrieval.index import check_k
from cda4rec_jax.retrieval.sharded import (
    BY_ITEM,
    BY_USER,
    WHOLE,
    check_mesh,
    look_up,
    on_each_device,
    place,
    place_items,
    place_users,
    search_part,
)

DEFAULT_PLAN = "fresh-full-100-device"


class _Tables(NamedTuple):
    """What is read of items: of all, or of one device's part."""

    vectors: ItemVectors
    categories: ItemCategories
    evidence: Evidence


class BatchRanker:
    """Semantic modelling, retrieval and final ranking for batches of users; compiled once for each batch size, plan and k.

    Args:
        system: trained modules, with a device agent.
        catalogue: all items under the weights of ``system``.
        config: of ``system``.
        mesh: with axes ``data`` and ``items``, such as ``training.mesh.make_mesh`` makes; None is one device. In a job of several
            processes all of them make the same ranker and ask it for the same users.

    Raises:
        UserError: the system is a baseline without device agent; the mesh has other axes.
    """

    def __init__(self, system: System, catalogue: Catalogue, config: SystemConfig, *, mesh: Mesh | None = None):
        if system.device is None:
            raise UserError(
                "this system is a baseline without device agent, and nothing could rank: take a run of a joint preset"
            )
        self._graph, items, weights = nnx.split((system.cloud, system.device), nnx.PathContains("items"), ...)
        # The catalogue has the item vectors; what they are made of need not be on every device.
        weights = jax.tree.map(jnp.asarray, (jax.tree.map(lambda leaf: leaf[:0], items), weights))
        tables = _Tables(catalogue.vectors, catalogue.categories, catalogue.evidence)
        weights = (*weights, catalogue.residents)
        if mesh is not None:
            check_mesh(mesh)
            weights = jax.tree.map(lambda leaf: place(np.asarray(leaf), mesh, WHOLE), weights)
            tables = jax.tree.map(lambda table: place_items(np.asarray(table), mesh), tables)
        self._weights, self._tables = weights, tables
        self._config, self._mesh, self._num_items = config, mesh, catalogue.num_items

    def __call__(self, history: HistoryBatch, *, plan: str = DEFAULT_PLAN, k: int = 10) -> Slate:
        """The slate of each user, [b, k], in NumPy arrays; every process has all of them. See ``retrieve_and_rank``."""
        check_k(k, self._num_items)
        chosen = self._config.space.plans[self._config.space.index(plan)]
        if chosen.semantic is not Placement.CLOUD:
            raise UserError(f"plan {plan} makes no fresh embedding to retrieve by: take one that begins with fresh- or cloud-")
        placed = history if self._mesh is None else place_users(history, self._mesh)
        sizes = {"k": k, "num_items": self._num_items, "mesh": self._mesh}
        slate = _slates(self._weights, self._tables, placed, graph=self._graph, config=self._config, plan=chosen, **sizes)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(history.lengths)], slate)


def retrieve_and_rank(
    system: System,
    catalogue: Catalogue,
    history: HistoryBatch,
    config: SystemConfig,
    *,
    plan: str = DEFAULT_PLAN,
    k: int = 10,
    mesh: Mesh | None = None,
) -> Slate:
    """The slates that a plan makes for a batch of users, divided over ``mesh``; a ``BatchRanker`` serves several batches.

    Items are those that one device finds, and scores are equal up to rounding, whatever the mesh. Neither the users nor the items
    need divide among the devices. ::

        trained = load_trained("checkpoints/synthetic-tiny")
        users = np.arange(16)
        num_events = np.diff(trained.corpus.interactions.offsets)[users]
        history = trained.corpus.histories(users, num_events, trained.config.stored_events)
        mesh = make_mesh("items=2")
        slate = retrieve_and_rank(trained.system, trained.catalogue, history, trained.config, mesh=mesh)

    Args:
        system, catalogue, config, mesh: see ``BatchRanker``.
        history: private pasts, of any number of users.
        plan: name of a plan with a fresh embedding. Where the device ranks, the resident items are among what it ranks.
        k: length of the slates.

    Raises:
        UserError: as ``BatchRanker``; there is no such plan, or it makes no fresh embedding; ``k`` does not fit the catalogue.
    """
    return BatchRanker(system, catalogue, config, mesh=mesh)(history, plan=plan, k=k)


@partial(jax.jit, static_argnames=("graph", "config", "plan", "k", "num_items", "mesh"))
def _slates(
    weights: Any,
    tables: _Tables,
    history: HistoryBatch,
    *,
    graph: nnx.GraphDef,
    config: SystemConfig,
    plan: Plan,
    k: int,
    num_items: int,
    mesh: Mesh | None,
) -> Slate:
    rows, search = (_take, exact_search) if mesh is None else (look_up, partial(search_part, num_items=num_items))
    options = {"plan": plan, "k": k, "num_items": num_items, "config": config, "rows": rows, "search": search}

    def answer(weights: Any, tables: _Tables, history: HistoryBatch) -> Slate:
        *weights, residents = weights
        cloud, device = nnx.merge(graph, *weights)
        return _rank_users(cloud, device, tables, residents, history, **options)

    on_devices = answer if mesh is None else on_each_device(mesh, answer, in_specs=(WHOLE, BY_ITEM, BY_USER))
    return on_devices(weights, tables, history)


def _rank_users(
    cloud: CloudAgent,
    device: DeviceAgent,
    tables: _Tables,
    residents: Residents,
    history: HistoryBatch,
    *,
    plan: Plan,
    k: int,
    num_items: int,
    config: SystemConfig,
    rows: Callable[[Any, Array], Any],
    search: Callable[[Array, Array, int], tuple[Array, Array]],
) -> Slate:
    """The sub-tasks in their order, over tables that ``rows`` and ``search`` alone read, be they whole or divided.

    Args:
        rows: (tables, items) -> rows of the items, which begin with the axes of ``items``.
        search: (item vectors, queries, number of items) -> the best items, and their scores.
    """
    now = jnp.zeros_like(history.lengths)
    # Functions of agents and abstracts read tables by item; here each reads a table of its users' own events by their place.
    nearby, shares = replace(history, items=_places(history.items)), _by_place(rows(tables.categories, history.items))

    def abstract(level: EgressLevel) -> UserAbstract:
        sizes = {"history_length": config.history_length, "profile_events": config.profile_events}
        most = released_items(level, config.history_length)
        told = release(nearby, shares, jnp.full_like(now, int(level)), now, max_items=most, **sizes)
        return replace(told, items=_by_place(history.items[..., None])[told.items, 0])

    told = abstract(plan.level)
    semantic = model_semantics(cloud, _by_place(rows(tables.vectors, told.items)), replace(told, items=_places(told.items)))
    # Without the barrier XLA on a CPU fuses the search into what reads its results (`subtasks.retrieve`).
    candidates = Candidates.retrieved(
        *jax.lax.optimization_barrier(search(tables.vectors, semantic, min(plan.num_candidates, num_items)))
    )
    structured = None
    if plan.structured is not Placement.SKIP:
        full = told if plan.level is EgressLevel.FULL else abstract(EgressLevel.FULL)
        structured = model_structure(device, full, rows(tables.evidence, full.items))
    if plan.ranking is Placement.DEVICE:
        candidates = each_once(*with_residents(candidates, semantic, told.level > 0, structured, residents, num_items))
    features = score_features(
        candidates,
        rows(tables.evidence, candidates.items),
        structured,
        age_events=now.astype(jnp.float32),
        level=told.level,
        num_items=num_items,
        without=config.without_features,
    )
    return rank_slate(candidates.items, device.head(features), unseen(candidates.items, history.seen, num_items), k)


def _take(tables: Any, items: Int[Array, "b n"]) -> Any:
    """Rows of the items, from tables that are whole."""
    return jax.tree.map(lambda table: table[items], tables)


def _places(items: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """Row of each item in ``_by_place`` of these items' rows; 0 for padding."""
    return jnp.where(items > 0, 1 + jnp.arange(items.size).reshape(items.shape), 0)


def _by_place(rows: Shaped[Array, "b n x"]) -> Shaped[Array, "rows x"]:
    """A row of zeros, and then all rows in their order."""
    return jnp.pad(rows.reshape(-1, rows.shape[-1]), ((1, 0), (0, 0)))
