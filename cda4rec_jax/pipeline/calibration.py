"""How long sub-tasks take on this machine: calls that take turns, and the fit of measured times to what they took."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from cda4rec_jax.data.splits import Split
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.pipeline.catalogue import Catalogue
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.request import RequestFunctions
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.planner import CACHED_CANDIDATES, MeasuredTimes, blank_requests
from cda4rec_jax.planner.plan_space import CANDIDATE_COUNTS, RELEASING_LEVELS
from cda4rec_jax.retrieval import Index

ROUNDS = 30
WARM_UP_ROUNDS = 3
SLATE = 10
CLOUD_CANDIDATES = 100  # that the cloud ranks

Bucket = tuple[str, str]  # a field of ``MeasuredTimes``, and the key in it ("" where it is one number)
_Name = TypeVar("_Name")
_Result = TypeVar("_Result")


def in_turns(
    calls: Mapping[_Name, Callable[[int], _Result]],
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[_Name, list[tuple[float, _Result]]]:
    """What every call took (milliseconds) and gave, round by round, after rounds to warm up that are not kept.

    A round has every call once, in an order of its own (seeded), so that a slow spell of the machine hits all of them alike and no
    call always follows the same other one.

    Args:
        calls: told the number of the round, from 0; each waits for its result itself. Warm-up rounds have numbers from 0, too.
        rounds: that are kept.
        progress: hears how many rounds are done, and of how many.
    """
    found: dict[_Name, list[tuple[float, _Result]]] = {name: [] for name in calls}
    names, rng, total = list(calls), np.random.default_rng(0), WARM_UP_ROUNDS + rounds
    for done in range(total):
        kept = done - WARM_UP_ROUNDS
        for place in rng.permutation(len(names)):
            name = names[place]
            start = time.perf_counter()
            result = calls[name](kept if kept >= 0 else done)
            taken_ms = 1e3 * (time.perf_counter() - start)
            if kept >= 0:
                found[name].append((taken_ms, result))
        progress(done + 1, total)
    return found


def fit_times(samples: Mapping[Bucket, Sequence[float]]) -> MeasuredTimes:
    """The median of every bucket.

    Raises:
        UserError: a bucket is missing.
    """
    tables: dict[str, Any] = {}
    for (name, key), values in samples.items():
        median = float(np.median(values))
        if key:
            tables.setdefault(name, {})[key] = median
        else:
            tables[name] = median
    return MeasuredTimes(**tables)


def measure_times(
    system: System,
    catalogue: Catalogue,
    corpus: Corpus,
    config: SystemConfig,
    index: Index,
    rounds: int = ROUNDS,
) -> MeasuredTimes:
    """Median warm milliseconds of the bare functions of each sub-task, through the same compiled functions that serve requests.

    ``runtime.calibration`` measures whole requests, and so also what goes on between the functions.
    """
    functions = RequestFunctions(system, catalogue, config, index)
    taken = in_turns(subtask_calls(functions, corpus, config), rounds)
    return fit_times({bucket: [taken_ms for taken_ms, _ in turns] for bucket, turns in taken.items()})


def subtask_calls(functions: RequestFunctions, corpus: Corpus, config: SystemConfig) -> dict[Bucket, Callable[[int], None]]:
    """The bare functions of every sub-task in every shape that it has, on one user; shapes are padded, so users take equally long.

    Planning is the planner's network alone, and sending a kept embedding is no work.
    """
    users = np.arange(1)
    history = corpus.histories(users, corpus.target_positions(Split.VALIDATION)[users], config.stored_events)
    abstracts = {level: functions.abstract(history, level, 0) for level in RELEASING_LEVELS}
    full = abstracts[EgressLevel.FULL]
    own = functions.evidence(np.asarray(full.items))
    structured, semantic = functions.structured(full, own), functions.semantic(full)
    asked = jax.tree.map(np.asarray, blank_requests(1, config.space))
    calls: dict[Bucket, Callable[[], Any]] = {("planning_ms", ""): lambda: functions.plan_logits(*asked)}
    for level, abstract in abstracts.items():
        name = level.name.lower()
        for field in ("abstract_ms", "abstract_beside_ms"):
            calls[field, name] = lambda level=level: functions.abstract(history, level, 0)
        calls["semantic_ms", name] = lambda abstract=abstract: functions.semantic(abstract)
    calls["abstract_ms", "reuse"] = calls["abstract_beside_ms", "reuse"] = lambda: None
    for name in ("structured_ms", "structured_cloud_ms"):
        calls[name, ""] = lambda: functions.structured(full, own)
    calls["cache_retrieval_ms", ""] = lambda: None  # what is kept is at hand
    for count in CANDIDATE_COUNTS:
        calls["retrieval_ms", str(count)] = lambda count=count: functions.retrieve(semantic, count)
        calls["retrieval_evidence_ms", str(count)] = lambda count=count: _with_records(functions, semantic, count)
    for name, count in {**{str(count): count for count in CANDIDATE_COUNTS}, "cache": CACHED_CANDIDATES}.items():
        items, scores = functions.retrieve(semantic, count)
        for field, state in (("ranking_ms", structured), ("ranking_skip_ms", None)):
            of_cloud = (items, scores, functions.evidence(items), state)
            given = (*of_cloud, np.asarray(semantic), 0.0, EgressLevel.FULL, history.seen, SLATE)
            calls[field, name] = lambda given=given: functions.rank(*given)
            if name == str(CLOUD_CANDIDATES):
                key = "skip" if state is None else "cloud"
                calls["ranking_cloud_ms", key] = lambda of_cloud=of_cloud: functions.score(*of_cloud, EgressLevel.FULL)
    return {bucket: lambda number, call=call: _done(call()) for bucket, call in calls.items()}


def _with_records(functions: RequestFunctions, semantic: jax.Array, count: int) -> Any:
    return functions.evidence(functions.retrieve(semantic, count)[0])


def _done(result: Any) -> None:
    jax.block_until_ready(result)
