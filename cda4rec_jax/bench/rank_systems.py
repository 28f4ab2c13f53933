"""The systems of ``cda4rec bench rank``: ours and others, each from NumPy to NumPy, with its scores checked against ours."""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cda4rec_jax.agents.device import ranker_weights
from cda4rec_jax.bench.peers.numpy_ranking import NumpyRanking, Ranking
from cda4rec_jax.bench.systems import System, started
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.rank_candidates import KnownHistory, RankerWeights, ServedRanker
from cda4rec_jax.kernels.rank_candidates.cases import Case, random_inputs, random_weights
from cda4rec_jax.kernels.rank_candidates.native import native_problem
from cda4rec_jax.kernels.rank_candidates.reference import score_candidates_reference, user_state_reference
from cda4rec_jax.runs.artifacts import load_trained

NUM_REQUESTS = 8  # that rotate; a device has one user, whose cache stays where it is fast
TOLERANCE = 1e-4  # of scores, relative to the largest
QUANTISED_TOLERANCE = 0.2  # of scores with 8-bit weights and activations, which are reported, and are no equal answer
QUANTISED = "onnxruntime, int8"


class RankRequest(NamedTuple):
    """One history, which fills the window, and its candidates."""

    number: int
    tokens: np.ndarray
    vectors: np.ndarray
    vector_scales: np.ndarray
    features: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RankSetting:
    """Weights and requests of one size."""

    name: str
    weights: RankerWeights
    requests: tuple[RankRequest, ...]


def case_setting(case: Case) -> RankSetting:
    """Random weights."""
    return RankSetting(name=case.name, weights=random_weights(case), requests=_requests(case))


def run_setting(run: Path, candidates: int) -> RankSetting:
    """The device agent of a run; requests are random."""
    trained = load_trained(run)
    if trained.system.device is None:
        raise UserError(f"{run} holds a baseline without a device agent: --run takes a joint run")
    weights = ranker_weights(trained.system.device, trained.config.history_length)
    sizes = {"heads": weights.num_heads, "kv_heads": weights.num_kv_heads, "mlp_hidden": weights.mlp_hidden}
    case = Case(
        name=trained.corpus.interactions.name,
        layers=weights.num_layers,
        width=weights.width,
        **sizes,
        window=weights.window,
        tokens=weights.window,
        candidates=candidates,
        features=weights.linear.shape[0],
    )
    return RankSetting(name=case.name, weights=weights, requests=_requests(case))


def _requests(case: Case) -> tuple[RankRequest, ...]:
    made = [random_inputs(case, seed) for seed in range(NUM_REQUESTS)]
    return tuple(RankRequest(number, one.tokens, one.vectors, one.vector_scales, one.features) for number, one in enumerate(made))


def ours_of(implementation: str, step: bool) -> str:
    """Name of a system of ours."""
    return f"ours, {implementation}, {'one new event' if step else 'full pass'}"


def rank_systems(setting: RankSetting, peers: Sequence[str]) -> list[System]:
    """Every system, ready; the first is the full pass of ours that is compared with others, the second our step with a cache.

    Raises:
        UserError: scores differ by more than they may.
    """
    weights, requests = setting.weights, setting.requests
    length, candidates = len(requests[0].tokens), len(requests[0].features)
    checked, plain = requests[:4], _plain(weights)
    expected = np.stack([plain(*request[1:]) for request in checked])
    version, ready = f"jax {jax.__version__}", []
    has_native = jax.default_backend() == "cpu" and native_problem() is None
    implementations = ("native", "xla") if has_native else ("xla",)
    for implementation in implementations:
        ranker = ServedRanker(weights, implementation=implementation)
        ready.append((ours_of(implementation, False), version, _whole(ranker)))
        ready.append((ours_of(implementation, True), version, _step(ranker, requests)))
    for name, package, ranking in _others(weights, length, candidates, requests[0], peers):
        found = f"{package} {importlib.metadata.version(package)}"
        ready.append((name, found, lambda request, ranking=ranking: ranking(*request[1:])))
    first, second = ready[0][0], ready[1][0]
    systems = []
    for name, version, run in ready:
        against = () if name.startswith("ours") else (first, second)
        one = started(System(name=name, version=version, against=against, run=run, inputs=requests))
        off = float(np.abs(np.stack([run(request) for request in checked]) - expected).max() / np.abs(expected).max())
        if not off <= (QUANTISED_TOLERANCE if name == QUANTISED else TOLERANCE):
            raise UserError(
                f"{name!r} is {off:.1e} off, relative to the largest score, so speeds say nothing. This is a bug to report"
            )
        systems.append(replace(one, difference=off))
    return systems


def _whole(ranker: ServedRanker) -> Callable[[RankRequest], np.ndarray]:
    return lambda request: ranker(*request[1:])[0]


def _step(ranker: ServedRanker, requests: Sequence[RankRequest]) -> Callable[[RankRequest], np.ndarray]:
    """All but the last token of each history are known; each call adds the last one anew."""
    known = [ranker(one.tokens[:-1], *one[2:])[1] for one in requests]

    def run(request: RankRequest) -> np.ndarray:
        before = known[request.number]
        scores, grown = ranker(request.tokens[-1:], *request[2:], known=before)
        known[request.number] = KnownHistory(grown.entries, before.length)
        return scores

    return run


def _others(
    weights: RankerWeights, length: int, candidates: int, example: RankRequest, peers: Sequence[str]
) -> list[tuple[str, str, Ranking]]:
    """One request runs in one thread. All but plain JAX compute the last token alone in the last layer, as ours does."""
    found: list[tuple[str, str, Ranking]] = []
    if "onnxruntime" in peers:
        from cda4rec_jax.bench.peers.onnx_ranking import onnx_ranking

        for name, quantised in (("onnxruntime, float32", False), (QUANTISED, True)):
            found.append((name, "onnxruntime", onnx_ranking(weights, length, candidates, quantised=quantised, threads=1)))
    if "torch" in peers:
        from cda4rec_jax.bench.peers.torch_ranking import torch_ranking

        found.append(("torch", "torch", torch_ranking(weights, length, example[1:], threads=1)))
    if "jax" in peers:
        found.append(("plain jax", "jax", _plain(weights)))
    if "numpy" in peers:
        found.append(("numpy", "numpy", NumpyRanking(weights, length)))
    return found


def _plain(weights: RankerWeights) -> Ranking:
    """The specification, jitted over constant weights."""

    def scores(tokens: jax.Array, *candidates: jax.Array) -> jax.Array:
        constants = jax.tree.map(jax.numpy.asarray, weights)
        return score_candidates_reference(constants, user_state_reference(constants, tokens), *candidates)

    program = jax.jit(scores)
    return lambda *given: np.asarray(program(*given))
