"""The operation at serving speed: NumPy in, NumPy out, one dispatch.

A step with a cache takes five microseconds of arithmetic, and passing an array to a compiled program takes one to two. So a request
is one array, its cache is another, and the weights are constants of the program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8

from cda4rec_jax.array_typing import Array
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.rank_candidates.api import (
    Implementation,
    check_candidates,
    check_tokens,
    chosen_implementation,
    rank_candidates,
)
from cda4rec_jax.kernels.rank_candidates.native import rank_request_native
from cda4rec_jax.kernels.rank_candidates.weights import KeyValueCache, RankerWeights, cache_size, empty_cache


class KnownHistory(NamedTuple):
    """Keys and values of the first ``length`` tokens of a user's history, as a ranker left them. Good for one more call."""

    entries: jax.Array
    length: int


class ServedRanker:
    """``rank_candidates`` for one user after the other. Safe to share between threads, as long as each history is in one of them.

    Args:
        weights: of decoder and head, float32; later changes are not seen.
        implementation: as ``rank_candidates`` takes it.

    Raises:
        UserError: as ``rank_candidates``.
    """

    def __init__(self, weights: RankerWeights, *, implementation: Implementation | None = None) -> None:
        self._weights, self._window = jax.tree.map(np.array, weights), weights.window
        self._implementation = chosen_implementation(implementation, self._weights.qkv.dtype)
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}  # by shapes, so that known ones need no check

    def __call__(
        self,
        tokens: Float[np.ndarray, "t e"],
        vectors: Int8[np.ndarray, "c e"],
        vector_scales: Float[np.ndarray, "c"],
        features: Float[np.ndarray, "c f"],
        *,
        known: KnownHistory | None = None,
        num_tokens: int | None = None,
    ) -> tuple[Float[np.ndarray, "c"], KnownHistory]:
        """Scores of the candidates, and the history with the new tokens, for the next call.

        Args:
            tokens: embeddings of new tokens; each number of rows is compiled for.
            vectors, vector_scales, features: of the candidates, as ``rank_candidates`` takes them.
            known: what an earlier call returned; its memory is used again. None: the tokens are the whole history.
            num_tokens: how many of the tokens are real; None for all.

        Raises:
            UserError: the history becomes longer than the window: call again with all tokens of a window and nothing known; shapes do
                not fit.
        """
        rows = len(tokens)
        count, first = rows if num_tokens is None else num_tokens, 0 if known is None else known.length
        if not (1 <= count <= rows and first + count <= self._window):
            raise UserError(
                f"{count} of {rows} tokens after {first} do not fit into a window of {self._window}: rank with the newest tokens alone"
            )
        given = (tokens, vectors, vector_scales, features)
        shapes = (tokens.shape, vectors.shape, vector_scales.shape, features.shape, known is None)
        program = self._programs.get(shapes) or self._programs.setdefault(shapes, self._program(*given, known is None))
        request = self._packed(first, count, *given)
        scores, entries = program(request) if known is None else program(known.entries, request)
        return np.asarray(scores), KnownHistory(entries, first + count)

    def _program(
        self, tokens: np.ndarray, vectors: np.ndarray, vector_scales: np.ndarray, features: np.ndarray, whole: bool
    ) -> Callable[..., Any]:
        """For requests of these shapes."""
        check_tokens(self._weights, tokens)
        check_candidates(self._weights, vectors, vector_scales, features)
        rows, candidates, size = len(tokens), len(features), cache_size(self._weights)
        run = rank_request_native if self._implementation == "native" else _rank_request_xla

        def with_known(entries: Float[Array, "cache"], request: Float[Array, "request"]) -> tuple[Array, Array]:
            if entries.shape != (size,):
                raise UserError(f"the known history has entries of shape {entries.shape}; expected {(size,)}, from this ranker.")
            return run(self._weights, entries, request, rows, candidates)

        if whole:
            return jax.jit(lambda request: run(self._weights, None, request, rows, candidates))
        return jax.jit(with_known, donate_argnums=0)

    @staticmethod
    def _packed(
        first: int, count: int, tokens: np.ndarray, vectors: np.ndarray, vector_scales: np.ndarray, features: np.ndarray
    ) -> Float[np.ndarray, "request"]:
        """First place and number of the tokens, tokens, scales, features, and codes, four to a float."""
        scales = 2 + tokens.size
        values = scales + vector_scales.size
        codes = values + features.size
        packed = np.empty(codes - (-vectors.size // 4), np.float32)
        packed[0], packed[1] = first, count
        packed[2:scales] = tokens.ravel()
        packed[scales:values] = vector_scales
        packed[values:codes] = features.ravel()
        packed[codes:].view(np.int8)[: vectors.size] = vectors.ravel()
        return packed


def _rank_request_xla(
    weights: RankerWeights,
    cache: Float[Array, "cache"] | None,
    request: Float[Array, "request"],
    num_tokens: int,
    num_candidates: int,
) -> tuple[Float[Array, "c"], Float[Array, "cache"]]:
    """As ``rank_request_native``."""
    width, num_features = weights.width, weights.linear.shape[0]
    ends = np.cumsum([2, num_tokens * width, num_candidates, num_candidates * num_features])
    header, tokens, scales, features, codes = jnp.split(request, ends)
    vectors = jax.lax.bitcast_convert_type(codes, jnp.int8).ravel()[: num_candidates * width].reshape(num_candidates, width)
    known, count = empty_cache(weights), header[1].astype(jnp.int32)
    if cache is not None:
        keys = cache[: known.keys.size].reshape(known.keys.shape)
        values = cache[known.keys.size :].reshape(known.values.shape)
        known = KeyValueCache(keys=keys, values=values, length=header[0].astype(jnp.int32))
    features = features.reshape(num_candidates, num_features)
    given = (tokens.reshape(num_tokens, width), count, vectors, scales, features)
    scores, known = rank_candidates(weights, known, *given, implementation="xla")
    return scores, jnp.concatenate([known.keys.ravel(), known.values.ravel()])
