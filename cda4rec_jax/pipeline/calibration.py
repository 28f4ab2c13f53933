"""Warm times of every sub-task on this machine, one request at a time."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.data.splits import Split
from cda4rec_jax.messages import Candidates, EgressLevel
from cda4rec_jax.pipeline.catalogue import Catalogue
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.request import RequestFunctions
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.planner import MeasuredTimes, blank_requests
from cda4rec_jax.retrieval import Index

ROUNDS = 30


def measure_times(system: System, catalogue: Catalogue, corpus: Corpus, config: SystemConfig, index: Index) -> MeasuredTimes:
    """Median warm milliseconds of each sub-task, through the same compiled functions that serve requests."""
    functions = RequestFunctions(system, catalogue, config, index)
    users = np.arange(1)
    history = corpus.histories(users, corpus.target_positions(Split.VALIDATION)[users], config.stored_events)
    abstracts = {level: functions.abstract(history, level, 0) for level in list(EgressLevel)[1:]}
    full = abstracts[EgressLevel.FULL]
    own = functions.evidence(np.asarray(full.items))
    structured = functions.structured(full, own)
    semantic = functions.semantic(full)
    times: dict[str, Any] = {"semantic_ms": {}, "retrieval_ms": {}, "ranking_ms": {}}
    times["abstract_ms"] = _median_ms(lambda: functions.abstract(history, EgressLevel.FULL, 0))
    times["structured_ms"] = _median_ms(lambda: functions.structured(full, own))
    for level, abstract in abstracts.items():
        times["semantic_ms"][level.name.lower()] = _median_ms(lambda abstract=abstract: functions.semantic(abstract))
    for count in (20, 100, 500):
        found = functions.retrieve(semantic, count)
        evidence = functions.evidence(found.items)
        times["retrieval_ms"][str(count)] = _median_ms(lambda count=count: functions.retrieve(semantic, count))
        times["ranking_ms"][str(count)] = _median_ms(
            lambda found=found, evidence=evidence: functions.rank(
                found, evidence, structured, np.ones(found.items.shape, np.float32), 0.0, EgressLevel.FULL, history.seen, 10
            )
        )
        if count == 100:
            times["ranking_cloud_ms"] = times["ranking_ms"]["100"]
    cached = Candidates(items=found.items[:, :100], scores=found.scores[:, :100])
    times["cache_retrieval_ms"] = _median_ms(lambda: functions.cached(cached, True))
    asked = jax.tree.map(np.asarray, blank_requests(1, config.space))
    times["planning_ms"] = _median_ms(lambda: functions.plan_logits(*asked))
    return MeasuredTimes(**times)


def _median_ms(call: Callable[[], Any]) -> float:
    for _ in range(3):
        jax.block_until_ready(call())
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(1e3 * (time.perf_counter() - start))
    return float(jnp.median(jnp.asarray(taken)))
