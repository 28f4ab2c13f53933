"""The sub-tasks of one request, compiled once per shape: what the runtime calls and what calibration times."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from cda4rec_jax.agents.device import ranker_weights, without_semantics
from cda4rec_jax.array_typing import Array
from cda4rec_jax.kernels.rank_candidates import RankerWeights, empty_cache, extend_history
from cda4rec_jax.messages import Context, EgressLevel, Evidence, HistoryBatch, Slate, UserAbstract
from cda4rec_jax.nn import embed
from cda4rec_jax.pipeline.catalogue import Catalogue, Residents
from cda4rec_jax.pipeline.handover import Handover
from cda4rec_jax.pipeline.subtasks import (
    StructuredState,
    each_once,
    model_semantics,
    rank_slate,
    release,
    released_items,
    score_features,
    structure_sequences,
    unseen,
    with_residents,
)
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.planner import PlanCosts
from cda4rec_jax.retrieval import Index
from cda4rec_jax.retrieval.index import Found


class RequestFunctions:
    """Jitted sub-tasks over batches of one user.

    Modules are split once and passed as flat arrays: flattening a module on every call costs milliseconds.

    Args:
        system: trained modules, with a device agent and a policy.
        catalogue: all items under the weights of ``system``.
        config: of ``system``.
        index: candidate search of the cloud, over the vectors of ``catalogue``.
    """

    def __init__(self, system: System, catalogue: Catalogue, config: SystemConfig, index: Index):
        assert system.device is not None and system.policy is not None
        self.config, self.num_items, self._index = config, catalogue.num_items, index
        self.embedding_size, self.num_categories = catalogue.vectors.shape[1], catalogue.categories.shape[1]
        self._catalogue = catalogue
        # Rows for one request are gathered on the host, where they become bytes anyway.
        self._evidence = jax.tree.map(np.asarray, catalogue.evidence)
        self.held = Held.of(catalogue.residents, self._evidence)
        self._is_resident = np.isin(np.arange(self.num_items + 1), catalogue.residents.items)
        sizes = {"history_length": config.history_length, "profile_events": config.profile_events}
        self._release = partial(compiled_release, **sizes)
        self._semantic = over_flat_arrays(system.cloud, model_semantics)
        ranker = ranker_weights(system.device, config.history_length, config.without_features)
        self._state = jax.jit(partial(_state, ranker, np.asarray(system.device.prefix[...])))
        self._handover = Handover.of(self._evidence)
        shared = {"handover": self._handover, "num_items": self.num_items, "without": config.without_features}
        self._score = over_flat_arrays(system.device.head, _score, **shared)
        self._rank = partial(over_flat_arrays(system.device.head, _rank, **shared), self.held)
        self._finish = partial(_compiled_finish, num_items=self.num_items)
        self._logits = over_flat_arrays(system.policy, _plan_logits)

    def abstract(self, history: HistoryBatch, level: EgressLevel, age_events: int) -> UserAbstract:
        """User abstract at ``level`` of the history as it was ``age_events`` ago."""
        return self._release(
            history,
            self._catalogue.categories,
            np.full(1, int(level), np.int32),
            np.full(1, age_events, np.int32),
            max_items=released_items(level, self.config.history_length),
        )

    def semantic(self, abstract: UserAbstract) -> jax.Array:
        """Semantic embedding, [1, d]."""
        return self._semantic(self._catalogue.vectors, abstract)

    def retrieve(self, semantic: jax.Array | np.ndarray, num_candidates: int) -> Found:
        """The best items for an embedding and their scores, [1, c] each; as many as there are where the catalogue is smaller."""
        return self._index.search(np.asarray(semantic), min(num_candidates, self.num_items))

    def evidence(self, items: np.ndarray) -> Evidence:
        """Records of items, with the leading axes of ``items``; NumPy, as they travel."""
        return jax.tree.map(lambda table: table[items], self._evidence)

    def structured(self, full: UserAbstract, own_evidence: Evidence) -> StructuredState:
        """Structured user modelling over a FULL abstract and the records of its items (leading axes [1, l])."""
        state, lengths = self._state(full, own_evidence)  # what only passes through stays outside of the program
        return StructuredState(state=state, items=full.items, lengths=lengths, evidence=own_evidence)

    def is_resident(self, items: np.ndarray) -> np.ndarray:
        """Which of the items have their records on every device."""
        return self._is_resident[items]

    def score(
        self, items: np.ndarray, scores: np.ndarray, evidence: Evidence, structured: StructuredState | None, level: EgressLevel
    ) -> jax.Array:
        """Final scores, [1, c], of retrieved candidates whose history is not known (ranking in the cloud); those of item 0 are not read."""
        joined = self._handover.join(items, scores, evidence, whole=structured is not None)
        return self._score(joined, np.array([0.0, int(level)], np.float32), structured)

    def rank(
        self,
        items: np.ndarray,
        scores: np.ndarray,
        evidence: Evidence,
        structured: StructuredState | None,
        semantic: np.ndarray | None,
        age_events: float,
        level: EgressLevel,
        seen: Array,
        k: int,
        *,
        by_semantics: bool = True,
    ) -> Slate:
        """The slate, [1, k]: final ranking on the device, of candidates and resident items, without what the user has seen.

        Args:
            items, scores: candidates [1, c] that the cloud retrieved; item 0 is none.
            evidence: their records; those of resident items are not read, as the device has them.
            structured: None where structured user modelling was skipped.
            semantic: the embedding [1, d] behind the candidates; None where the device has none.
            age_events, level: of the embedding.
            by_semantics: False ranks what was found for the embedding without its scores.
        """
        joined = self._handover.join(items, scores, evidence, whole=structured is not None)
        known = semantic is not None
        given = semantic if semantic is not None else np.zeros((1, self.embedding_size), np.float32)
        described = np.array([age_events, int(level), known, by_semantics], np.float32)
        return self._rank(joined, described, given, structured, seen, k=k)

    def finish(self, items: np.ndarray, scores: np.ndarray, seen: Array, k: int) -> Slate:
        """The slate, [1, k], of candidates that the cloud has ranked."""
        return self._finish(items, scores, seen, k=k)

    def plan_logits(self, context: Context, costs: PlanCosts, mask: np.ndarray) -> jax.Array:
        """The learned planner's scores of every plan, [1, p]."""
        return self._logits(context, costs, mask)


compiled_release = jax.jit(release, static_argnames=("max_items", "history_length", "profile_events"))


def over_flat_arrays(module: nnx.Module, function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """``function(module, ..., **static)`` compiled over the module's arrays as a flat list; a keyword ``k`` of a call is static too."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    return partial(_compiled(graph, tree, function, tuple(static.items())), [jnp.asarray(leaf) for leaf in leaves])


@lru_cache(maxsize=64)
def _compiled(graph: nnx.GraphDef, tree: Any, function: Callable[..., Any], static: tuple[tuple[str, Any], ...]) -> Any:
    """Compiled for a structure, not for an object: systems of one structure share programs, found here once and not at every call."""

    def call(arrays: list[jax.Array], *arguments: Any, **options: Any) -> Any:
        return function(nnx.merge(graph, jax.tree.unflatten(tree, arrays)), *arguments, **dict(static), **options)

    return jax.jit(call, static_argnames="k")


def _plan_logits(policy: Any, context: Context, costs: PlanCosts, mask: Any) -> Any:
    return policy.logits(context, costs, mask)


def _state(weights: RankerWeights, prefix: np.ndarray, full: UserAbstract, evidence: Evidence) -> tuple[jax.Array, jax.Array]:
    """The device user state, [1, e], and the number of events behind it, [1]."""
    sequences, num_tokens, vectors = structure_sequences(full, evidence)
    tokens = embed(jnp.asarray(prefix), sequences, vectors)[0]
    state, _ = extend_history(weights, empty_cache(weights), tokens, num_tokens[0])
    return state[None, :], num_tokens - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Held:
    """What every device holds of the catalogue."""

    residents: Residents
    evidence: Evidence  # of the resident items, after a row of padding

    @classmethod
    def of(cls, residents: Residents, evidence: Evidence) -> "Held":
        """The part of these residents in the ``evidence`` of all items, NumPy."""
        padded = np.pad(np.asarray(residents.items), (1, 0))
        return cls(residents=residents, evidence=jax.tree.map(lambda rows: jnp.asarray(rows[padded]), evidence))

    def records(self, items: Int[Array, "1 n"], sent: Evidence) -> Evidence:
        """Records of items, of which the first were sent; no other record is on the device."""
        rows = self.residents.rows_of(items)

        def column(held: Array, came: Array) -> Array:
            if not came.size:
                return came  # it is not read
            own, number = held[rows], came.shape[1]
            is_held = (rows[:, :number] > 0).reshape(1, number, *(1,) * (own.ndim - 2))
            return own.at[:, :number].set(jnp.where(is_held, own[:, :number], came))

        return jax.tree.map(column, self.evidence, sent)


def _score(
    head: Any, joined: Any, described: Any, structured: Any, *, handover: Handover, num_items: int, without: tuple[str, ...]
) -> jax.Array:
    candidates, evidence = handover.part(joined, whole=structured is not None)
    given = {"age_events": described[:1], "level": described[1:2].astype(jnp.int32)}
    return head(score_features(candidates, evidence, structured, **given, num_items=num_items, without=without))


def _rank(
    head: Any,
    held: Held,
    joined: Any,
    described: Any,
    semantic: Any,
    structured: Any,
    seen: Any,
    *,
    handover: Handover,
    num_items: int,
    without: tuple[str, ...],
    k: int,
) -> Slate:
    sent, records = handover.part(joined, whole=structured is not None)
    candidates = each_once(*with_residents(sent, semantic, described[2:3] > 0, structured, held.residents, num_items))
    given = {"age_events": described[:1], "level": described[1:2].astype(jnp.int32)}
    evidence = held.records(candidates.items, records)
    features = score_features(candidates, evidence, structured, **given, num_items=num_items, without=without)
    features = jnp.where(described[3] > 0, features, without_semantics(features))
    return _finish(candidates.items, head(features), seen, num_items=num_items, k=k)


def _finish(items: Any, scores: Any, seen: Any, *, num_items: int, k: int) -> Slate:
    return rank_slate(items, scores, unseen(items, seen, num_items), k)


_compiled_finish = jax.jit(_finish, static_argnames=("num_items", "k"))
