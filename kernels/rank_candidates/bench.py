"""The full pass of one request against the specification; see ``kernels.workloads``. ``cda4rec bench rank`` has the step, and peers."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int8

from cda4rec_jax.kernels.rank_candidates import RankerWeights, empty_cache, rank_candidates
from cda4rec_jax.kernels.rank_candidates.api import Implementation
from cda4rec_jax.kernels.rank_candidates.cases import WORKLOAD_CASES, Case, RankerInputs, random_inputs, random_weights
from cda4rec_jax.kernels.rank_candidates.reference import score_candidates_reference, user_state_reference
from cda4rec_jax.kernels.workloads import PLAIN, Workload

NUM_BATCHES = 8  # requests that take turns
OURS = "rank_candidates"


def plain_ranking(
    weights: RankerWeights,
    tokens: Float[Array, "t e"],
    vectors: Int8[Array, "c e"],
    vector_scales: Float[Array, "c"],
    features: Float[Array, "c f"],
) -> Float[Array, "c"]:
    """What one would write: the last layer computes all tokens too."""
    return score_candidates_reference(weights, user_state_reference(weights, tokens), vectors, vector_scales, features)


def workloads(backend: str) -> Iterator[Workload]:
    """The device agents that we have; the same everywhere."""
    for case in WORKLOAD_CASES:
        yield workload(case, backend)


def workload(case: Case, backend: str) -> Workload:
    """One case with the implementations of a backend; weights are constants of the programs, as in serving."""
    weights = jax.tree.map(jnp.asarray, random_weights(case))
    requests = [random_inputs(case, seed) for seed in range(NUM_BATCHES)]
    names: tuple[Implementation | None, ...] = (None, "xla") if backend == "cpu" else (None,)
    programs: dict[str, Callable[..., Any]] = {PLAIN: partial(plain_ranking, weights)}
    for name in names:
        programs[name or OURS] = partial(_full_pass, weights, name)
    read = [*jax.tree.leaves(weights), *_batch(case, requests[0])]
    return Workload(
        kernel="rank_candidates",
        name=case.name,
        shapes=f"{case.layers} x {case.width}, {case.tokens} tokens, {case.candidates} candidates, float32",
        batches=[_batch(case, request) for request in requests],
        programs=programs,
        flops=_flops(case),
        bytes_moved=sum(array.nbytes for array in read) + 4.0 * case.candidates,
        dtype="float32",
        difference=_relative_difference,
        tolerance=1e-4,
    )


def _full_pass(weights: RankerWeights, implementation: Implementation | None, tokens: Array, *candidates: Array) -> Array:
    cache, num_tokens = empty_cache(weights), tokens.shape[0]
    return rank_candidates(weights, cache, tokens, num_tokens, *candidates, implementation=implementation)[0]


def _batch(case: Case, request: RankerInputs) -> tuple[Array, ...]:
    """Without padding."""
    arrays = (request.tokens[: case.tokens], request.vectors, request.vector_scales, request.features)
    return tuple(map(jnp.asarray, arrays))


def _flops(case: Case) -> float:
    """Of keys and values of all tokens in every layer, of all else of the last token alone in the last layer, and of the head."""
    size, full_tokens = case.width // case.heads, (case.layers - 1) * case.tokens + 1
    reads = (case.layers - 1) * case.tokens * (case.tokens + 1) / 2 + case.tokens
    decoder = case.layers * case.tokens * case.width * 2 * case.kv_heads * size
    decoder += full_tokens * case.width * (2 * case.heads * size + 3 * case.mlp_hidden) + 2 * reads * case.heads * size
    of_candidate = case.width + case.features * (1 + case.moderating + case.head_hidden) + case.moderating + case.head_hidden
    return 2.0 * (decoder + case.candidates * of_candidate)


def _relative_difference(found: Any, expected: Any) -> float:
    """Of scores, relative to the largest."""
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())
