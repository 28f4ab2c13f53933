"""Public entry of the operation: checks, the choice of implementation, and the whole as one call."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Int8

from cda4rec_jax.array_typing import Array
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.rank_candidates.native import extend_history_native, native_problem, score_candidates_native
from cda4rec_jax.kernels.rank_candidates.weights import KeyValueCache, RankerWeights, cache_shapes
from cda4rec_jax.kernels.rank_candidates.xla import extend_history_xla, score_candidates_xla

Implementation = Literal["xla", "native"]
IMPLEMENTATIONS = ("xla", "native")


def rank_candidates(
    weights: RankerWeights,
    cache: KeyValueCache,
    tokens: Float[Array, "t e"],
    num_tokens: int | Int[Array, ""],
    vectors: Int8[Array, "c e"],
    vector_scales: Float[Array, "c"],
    features: Float[Array, "c f"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "c"], KeyValueCache]:
    """Scores of one user's candidates after the tokens that are new: ``extend_history``, then ``score_candidates``.

    With an empty cache and all tokens of a history this is the full pass; with the cache that an earlier call returned and the one
    token that came since, it costs one step. Jit it with ``weights`` closed over, so that they are constants of the program: a call then
    passes the request alone, and native code finds the weights in its own form, made when the program is compiled.

    Args:
      weights: Decoder and head.
      cache: Of the tokens before; ``empty_cache`` if there are none.
      tokens: Embeddings of new tokens, oldest first.
      num_tokens: How many of them are real, 1 to t.
      vectors: Codes of the candidates' vectors, in the width of the decoder.
      vector_scales: What a candidate's codes are multiplied with.
      features: Of the candidates; that of the inner product is computed, whatever stands there.
      implementation: ``xla`` runs everywhere. ``native`` is a pair of C++ custom calls for float32 on a CPU, which need a compiler on
        their first use, and have no gradients: JAX then raises ValueError, also where None has chosen them. None takes ``native`` where
        it can be had, else ``xla``, whose gradients with regard to tokens need padding that is finite.

    Returns:
      Scores, in the dtype of the inputs, and the cache with the new tokens. A cache with more tokens than ``weights.window`` does not
      exist: scores are then NaN, and the caller makes a full pass over the newest events. It cannot be had by dropping the oldest
      token: later tokens of the second layer on have seen it, and what the prefix says has changed.

    Raises:
      UserError: the implementation is unknown, needs another backend or dtype, or cannot be compiled; shapes do not fit.
    """
    state, cache = extend_history(weights, cache, tokens, num_tokens, implementation=implementation)
    return score_candidates(weights, state, vectors, vector_scales, features, implementation=implementation), cache


def extend_history(
    weights: RankerWeights,
    cache: KeyValueCache,
    tokens: Float[Array, "t e"],
    num_tokens: int | Int[Array, ""],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "e"], KeyValueCache]:
    """State of the user after new tokens, and the cache with them; the first half of ``rank_candidates``, which says the rest.

    Equals the state of a full pass over all tokens up to rounding, however they are cut into calls. NaN where they do not fit.
    """
    check_tokens(weights, tokens)
    given, expected = (cache.keys.shape, cache.values.shape), cache_shapes(weights)
    if given != expected:
        raise UserError(f"keys and values of the cache have the shapes {given}; expected {expected}: begin with `empty_cache`.")
    if chosen_implementation(implementation, tokens.dtype, weights.qkv.dtype) == "native":
        return extend_history_native(weights, cache, tokens, jnp.asarray(num_tokens, jnp.int32))
    return extend_history_xla(weights, cache, tokens, num_tokens)


def score_candidates(
    weights: RankerWeights,
    state: Float[Array, "e"],
    vectors: Int8[Array, "c e"],
    vector_scales: Float[Array, "c"],
    features: Float[Array, "c f"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "c"]:
    """Scores of candidates for the state of a user; the second half of ``rank_candidates``, which says the rest."""
    if state.shape != (weights.width,):
        raise UserError(f"the state has shape {state.shape}; expected {(weights.width,)}, the width of the decoder.")
    check_candidates(weights, vectors, vector_scales, features)
    if chosen_implementation(implementation, features.dtype, weights.hidden.dtype) == "native":
        return score_candidates_native(weights, state, vectors, vector_scales, features)
    return score_candidates_xla(weights, state, vectors, vector_scales, features)


def check_tokens(weights: RankerWeights, tokens: Array) -> None:
    """UserError where these are no tokens for the decoder."""
    if tokens.shape[1:] != (weights.width,) or len(tokens) < 1:
        raise UserError(f"tokens have shape {tokens.shape}; expected one or more of width {weights.width}.")


def check_candidates(weights: RankerWeights, vectors: Array, vector_scales: Array, features: Array) -> None:
    """UserError where shapes do not fit each other, the decoder or the head."""
    given, rows = (vectors.shape, vector_scales.shape, features.shape), features.shape[:1]
    width, num_features = weights.width, weights.linear.shape[0]
    if given != ((*rows, width), rows, (*rows, num_features)):
        raise UserError(
            f"vectors, vector_scales and features have the shapes {', '.join(map(str, given))}; expected [c, {width}], [c] and "
            f"[c, {num_features}] for c candidates."
        )


def chosen_implementation(implementation: Implementation | None, *dtypes: jnp.dtype) -> Implementation:
    """What ``rank_candidates`` does for these dtypes. Raises its UserError."""
    on_cpu, single = jax.default_backend() == "cpu", all(dtype == jnp.float32 for dtype in dtypes)
    if implementation is None:
        return "native" if on_cpu and single and native_problem() is None else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation is {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}, or None.")
    if implementation == "native":
        if not on_cpu:
            raise UserError(
                f"implementation 'native' runs on a CPU, and JAX is on {jax.default_backend()}: choose 'xla', or None."
            )
        if not single:
            raise UserError(f"implementation 'native' takes float32, got {', '.join(map(str, dtypes))}: choose 'xla'.")
        if (problem := native_problem()) is not None:
            raise UserError(f"implementation 'native' cannot be had: {problem}. Choose 'xla', which gives the same scores.")
    return implementation
