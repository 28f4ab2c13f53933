"""The device's part of one request, as the runtime executes it, and the kernels that it consists of, each by itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.agents.device import ranker_weights
from cda4rec_jax.bench.request_systems import SLATE, Device, ask
from cda4rec_jax.bench.systems import System, started
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.rank_candidates import empty_cache, extend_history
from cda4rec_jax.messages import Candidates, EgressLevel, Evidence, Slate
from cda4rec_jax.nn import embed
from cda4rec_jax.pipeline.request import Held
from cda4rec_jax.pipeline.subtasks import (
    StructuredState,
    each_once,
    rank_slate,
    score_features,
    structure_sequences,
    unseen,
    with_residents,
)
from cda4rec_jax.runs.artifacts import TrainedSystem
from cda4rec_jax.runtime.functions import CandidatePool
from cda4rec_jax.runtime.models import device_functions
from cda4rec_jax.runtime.recommend import Recommender

PATH, KERNELS, EMPTY = "device path", "its kernels", "an empty program"
TOLERANCE = 1e-4  # of scores


@dataclass(frozen=True, kw_only=True)
class DevicePath:
    """One request on the device.

    Attributes:
        candidates: of the cloud that it ranks, beside resident items.
        tokens: of the history and its prefix.
        path: from the history and the candidates as they came over the wire to the slate, NumPy to NumPy.
        together: the kernels one after the other, from arrays that are in place.
        kernels: each one by itself.
        empty: a call that computes next to nothing, of which every kernel's time contains one.
    """

    candidates: int
    tokens: int
    path: System
    together: System
    kernels: tuple[System, ...]
    empty: System

    @property
    def systems(self) -> tuple[System, ...]:
        """All that are timed."""
        return self.path, self.together, *self.kernels, self.empty


def device_path(recommender: Recommender, trained: TrainedSystem, devices: list[Device], plan: str) -> DevicePath:
    """The device's part of ``plan`` for the device with the longest history.

    Raises:
        UserError: path and kernels give different slates.
    """
    device = max(devices, key=lambda one: int(one.history.lengths[0]))
    pool = ask(recommender, device, recommender.space.index(plan), with_link=False).answer.pool
    assert pool is not None
    functions = device_functions(recommender.functions, device.state, SLATE)

    def path() -> tuple[np.ndarray, np.ndarray]:
        return functions.rank(pool, functions.structured())

    kernels, slate, tokens = _kernels(recommender, trained, device, pool)

    def together() -> None:
        for kernel in kernels:
            kernel.run(None)

    items, scores = path()
    if not (np.array_equal(items, slate.items[0]) and np.allclose(scores, slate.scores[0], TOLERANCE, TOLERANCE)):
        raise UserError(
            f"the kernels of {plan} give another slate than the runtime, so times say nothing. This is a bug to report"
        )
    empty, nothing = jax.jit(lambda x: x + 1.0), jnp.zeros(16)
    return DevicePath(
        candidates=len(pool.items),
        tokens=tokens,
        path=_system(PATH, path),
        together=_system(KERNELS, together),
        kernels=kernels,
        empty=_system(EMPTY, lambda: jax.block_until_ready(empty(nothing))),
    )


def _system(name: str, run: Callable[[], object]) -> System:
    return started(System(name=name, version=f"jax {jax.__version__}", against=(), run=lambda _: run(), inputs=(None,)))


def _kernels(
    recommender: Recommender, trained: TrainedSystem, device: Device, pool: CandidatePool
) -> tuple[tuple[System, ...], Slate, int]:
    """Each kernel over arrays that are in place, the slate of the last one, and the number of tokens that the first one reads."""
    kernels = []

    def result(name: str, program: Callable[..., Any], *given: Any) -> Any:
        kernels.append(_system(name, lambda: jax.block_until_ready(program(*given))))
        return program(*given)

    agent, config = trained.system.device, trained.config
    assert agent is not None
    weights = ranker_weights(agent, config.history_length, config.without_features)
    full = recommender.functions.abstract(device.history, EgressLevel.FULL, 0)
    sequences, num_tokens, vectors = structure_sequences(full, device.state.own_evidence)
    tokens = embed(jnp.asarray(agent.prefix[...]), sequences, vectors)[0]
    decoder = jax.jit(lambda tokens, count: extend_history(weights, empty_cache(weights), tokens, count)[0][None, :])
    count = num_tokens[0]
    state = result("decoder", decoder, tokens, count)
    own = StructuredState(state=state, items=full.items, lengths=num_tokens - 1, evidence=device.state.own_evidence)

    num_items, without, held = recommender.functions.num_items, config.without_features, recommender.functions.held
    assert pool.embedding is not None

    def search(found: Candidates, sent: Evidence, semantic: Any, own: StructuredState, held: Held) -> tuple[Candidates, Evidence]:
        known = jnp.ones(1, bool)
        candidates = each_once(*with_residents(found, semantic, known, own, held.residents, num_items))
        return candidates, held.records(candidates.items, sent)

    sent = {name: values[None, ...] for name, values in pool.evidence.items()}
    found = Candidates.retrieved(pool.items[None, :], pool.scores[None, :])
    of_cloud = jax.device_put((found, Evidence(**sent), pool.embedding.values[None, :]))
    candidates, evidence = result("resident items", jax.jit(search), *of_cloud, own, held)
    features = jax.jit(
        lambda candidates, evidence, own, age, level: score_features(
            candidates, evidence, own, age_events=age, level=level, num_items=num_items, without=without
        )
    )
    about = (np.full(1, pool.embedding.age_events, np.float32), np.full(1, int(pool.embedding.level), np.int32))
    given = (candidates, evidence, own, *jax.device_put(about))
    described = result("features", features, *given)
    scores = result("fusion head", jax.jit(agent.head), described)
    items, seen = given[0].items, jnp.asarray(device.history.seen)
    slate = result(
        "unseen, top-k",
        jax.jit(lambda items, scores, seen: rank_slate(items, scores, unseen(items, seen, num_items), SLATE)),
        items,
        scores,
        seen,
    )
    return tuple(kernels), jax.tree.map(np.asarray, slate), int(count)
