"""The sub-tasks of one request, compiled once per shape: what the runtime calls and what calibration times."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cda4rec_jax.agents.device import ranker_weights
from cda4rec_jax.array_typing import Array
from cda4rec_jax.kernels.rank_candidates import RankerWeights, empty_cache, extend_history
from cda4rec_jax.messages import Candidates, Context, EgressLevel, Evidence, HistoryBatch, Slate, UserAbstract
from cda4rec_jax.nn import embed
from cda4rec_jax.pipeline.catalogue import Catalogue
from cda4rec_jax.pipeline.handover import Handover
from cda4rec_jax.pipeline.subtasks import (
    StructuredState,
    local_candidates,
    model_semantics,
    rank_slate,
    release,
    released_items,
    score_features,
    structure_sequences,
    unseen,
)
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.planner import PlanCosts
from cda4rec_jax.retrieval import Index


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
        sizes = {"history_length": config.history_length, "profile_events": config.profile_events}
        self._release = jax.jit(partial(release, **sizes), static_argnames="max_items")
        self._semantic = _flat(system.cloud, lambda cloud, vectors, abstract: model_semantics(cloud, vectors, abstract))
        ranker = ranker_weights(system.device, config.history_length, config.without_features)
        self._state = jax.jit(partial(_state, ranker, np.asarray(system.device.prefix[...])))
        self._handover = Handover(self._evidence)
        shared = {"handover": self._handover, "num_items": self.num_items, "without": config.without_features}
        self._score = _flat(system.device.head, partial(_score, **shared))
        self._rank = _flat(system.device.head, partial(_rank, **shared), static_argnames="k")
        self._finish = jax.jit(partial(_finish, num_items=self.num_items), static_argnames="k")
        self._local = jax.jit(local_candidates)
        self._logits = _flat(system.policy, lambda policy, context, costs, mask: policy.logits(context, costs, mask))

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

    def retrieve(self, semantic: jax.Array | np.ndarray, num_candidates: int) -> Candidates:
        """The best items for an embedding, [1, c]; as many as there are where the catalogue is smaller."""
        items, scores = self._index.search(np.asarray(semantic), min(num_candidates, self.num_items))
        return Candidates(items=items, scores=scores)

    def evidence(self, items: np.ndarray) -> Evidence:
        """Records of items, with the leading axes of ``items``; NumPy, as they travel."""
        return jax.tree.map(lambda table: table[items], self._evidence)

    def structured(self, full: UserAbstract, own_evidence: Evidence) -> StructuredState:
        """Structured user modelling over a FULL abstract and the records of its items (leading axes [1, l])."""
        state, lengths = self._state(full, own_evidence)  # what only passes through stays outside of the program
        return StructuredState(state=state, items=full.items, lengths=lengths, evidence=own_evidence)

    def local(self, last: Candidates, semantic: jax.Array | np.ndarray, has_cache: bool) -> Candidates:
        """What the device can rank without asking, given its last candidates and embedding (not read without ``has_cache``)."""
        resident = (self._catalogue.resident_items, self._catalogue.resident_vectors)
        return self._local(last, semantic, *resident, np.full(1, has_cache))

    def score(
        self,
        candidates: Candidates,
        evidence: Evidence,
        structured: StructuredState | None,
        present: np.ndarray,
        age_events: float,
        level: EgressLevel,
    ) -> jax.Array:
        """Final scores, [1, c], of candidates whose history is not known (ranking in the cloud). Scores of item 0 are not read."""
        joined = self._handover.join(candidates, evidence, present, whole=structured is not None)
        return self._score(joined, _described(age_events, level), structured)[1]

    def rank(
        self,
        candidates: Candidates,
        evidence: Evidence,
        structured: StructuredState | None,
        present: np.ndarray,
        age_events: float,
        level: EgressLevel,
        seen: Array,
        k: int,
    ) -> Slate:
        """The slate, [1, k]: final ranking on the device, without what the user has seen. Scores of item 0 are not read."""
        joined = self._handover.join(candidates, evidence, present, whole=structured is not None)
        return self._rank(joined, _described(age_events, level), structured, seen, k=k)

    def finish(self, items: np.ndarray, scores: np.ndarray, seen: Array, k: int) -> Slate:
        """The slate, [1, k], of candidates that the cloud has ranked."""
        return self._finish(items, scores, seen, k=k)

    def plan_logits(self, context: Context, costs: PlanCosts, mask: np.ndarray) -> jax.Array:
        """The learned planner's scores of every plan, [1, p]."""
        return self._logits(context, costs, mask)


def _flat(module: nnx.Module, function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
    """``function(module, ...)`` compiled over the module's arrays as a flat list."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)

    def call(arrays: list[jax.Array], *arguments: Any, **options: Any) -> Any:
        return function(nnx.merge(graph, jax.tree.unflatten(tree, arrays)), *arguments, **options)

    return partial(jax.jit(call, **jit_options), [jnp.asarray(leaf) for leaf in leaves])


def _state(weights: RankerWeights, prefix: np.ndarray, full: UserAbstract, evidence: Evidence) -> tuple[jax.Array, jax.Array]:
    """The device user state, [1, e], and the number of events behind it, [1]."""
    sequences, num_tokens, vectors = structure_sequences(full, evidence)
    tokens = embed(jnp.asarray(prefix), sequences, vectors)[0]
    state, _ = extend_history(weights, empty_cache(weights), tokens, num_tokens[0])
    return state[None, :], num_tokens - 1


def _described(age_events: float, level: EgressLevel) -> np.ndarray:
    return np.array([age_events, int(level)], np.float32)


def _score(
    head: Any,
    joined: Any,
    described: Any,
    structured: Any,
    *,
    handover: Handover,
    num_items: int,
    without: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Candidates and their scores."""
    candidates, evidence, present = handover.part(joined, whole=structured is not None)
    # An approximate index marks an empty place by a score of -inf, which no feature could hold.
    is_item = candidates.items > 0
    candidates = Candidates(items=candidates.items, scores=jnp.where(is_item, candidates.scores, 0.0))
    given = {"present": present * is_item, "age_events": described[:1], "level": described[1:].astype(jnp.int32)}
    scores = head(score_features(candidates, evidence, structured, **given, num_items=num_items, without=without))
    return candidates.items, scores


def _rank(head: Any, joined: Any, described: Any, structured: Any, seen: Any, *, num_items: int, k: int, **shared: Any) -> Slate:
    items, scores = _score(head, joined, described, structured, num_items=num_items, **shared)
    return _finish(items, scores, seen, num_items=num_items, k=k)


def _finish(items: Any, scores: Any, seen: Any, *, num_items: int, k: int) -> Slate:
    return rank_slate(items, scores, unseen(items, seen, num_items), k)
