"""Contract of rank_candidates: every implementation against a full pass in float64, however a history is cut into calls."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.rank_candidates import (
    KnownHistory,
    ServedRanker,
    api,
    empty_cache,
    extend_history,
    native,
    rank_candidates,
    score_candidates,
)
from cda4rec_jax.kernels.rank_candidates.cases import CONTRACT_CASES, SMALL_CASE, Case, random_inputs, random_weights
from cda4rec_jax.kernels.rank_candidates.reference import score_candidates_reference, user_state_reference
from tests.kernels.contract import needs_cpu, needs_native

pytestmark = pytest.mark.usefixtures("float32_products")
NEEDS_NATIVE = needs_native(native.native_problem)
WAYS = ["xla", pytest.param("native", marks=NEEDS_NATIVE)]


@functools.cache
def expected_by_hand(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """State and scores in float64."""
    with jax.enable_x64(True):
        weights, inputs = (
            jax.tree.map(lambda leaf: leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf, given)
            for given in (random_weights(case), vars(random_inputs(case)))
        )
        weights = jax.tree.map(jnp.asarray, weights)
        state = jax.jit(user_state_reference)(weights, jnp.asarray(inputs["tokens"][: case.tokens]))
        given = {name: jnp.asarray(inputs[name]) for name in ("vectors", "vector_scales", "features")}
        return np.asarray(state), np.asarray(jax.jit(score_candidates_reference)(weights, state, **given))


def candidates_of(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inputs = random_inputs(case)
    return inputs.vectors, inputs.vector_scales, inputs.features


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("case", CONTRACT_CASES, ids=lambda case: case.name)
def test_a_full_pass_equals_the_reference_in_float64(case, implementation):
    """Tokens after the real ones are NaN: who reads padding fails."""
    weights, tokens = random_weights(case), random_inputs(case).tokens
    program = jax.jit(lambda *given: rank_candidates(weights, empty_cache(weights), *given, implementation=implementation))
    scores, cache = program(tokens, np.int32(case.tokens), *candidates_of(case))
    close(scores, expected_by_hand(case)[1])
    assert (scores.dtype, int(cache.length)) == (jnp.float32, case.tokens)


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("case", (CONTRACT_CASES[1], CONTRACT_CASES[3]), ids=lambda case: case.name)
def test_a_cached_history_equals_a_full_pass_however_it_is_cut(case, implementation):
    weights, tokens = random_weights(case), random_inputs(case).tokens
    piece = 4
    extend = jax.jit(lambda *given: extend_history(weights, *given, implementation=implementation))
    # What an empty cache holds must not matter.
    cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan) if leaf.ndim else leaf, empty_cache(weights))
    done, state = 0, None
    for count in (4, 1, 3, 2, *([1] * case.tokens)):
        count = min(count, case.tokens - done)
        if count:
            given = np.full((piece, case.width), np.nan, np.float32)
            given[:count] = tokens[done : done + count]
            state, cache = extend(cache, given, np.int32(count))
            done += count
    close(state, expected_by_hand(case)[0])


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("case", (SMALL_CASE, CONTRACT_CASES[2]), ids=lambda case: case.name)
def test_serving_equals_the_reference_whole_and_step_by_step(case, implementation):
    ranker, inputs = ServedRanker(random_weights(case), implementation=implementation), random_inputs(case)
    given, expected = candidates_of(case), expected_by_hand(case)[1]
    padded, _ = ranker(inputs.tokens, *given, num_tokens=case.tokens)
    _, known = ranker(inputs.tokens[: case.tokens - 2], *given)
    assert known.length == case.tokens - 2
    for place in (case.tokens - 2, case.tokens - 1):
        scores, known = ranker(inputs.tokens[place : place + 1], *given, known=known)
    close(padded, expected)
    close(scores, expected)
    again, _ = ranker(inputs.tokens[case.tokens - 1 : case.tokens], *given, known=KnownHistory(known.entries, case.tokens - 1))
    np.testing.assert_array_equal(again, scores)


@pytest.mark.parametrize("implementation", WAYS)
def test_a_history_beyond_the_window_has_no_scores(implementation):
    weights, tokens = random_weights(SMALL_CASE), np.ones((2, SMALL_CASE.width), np.float32)
    vectors, scales, features = candidates_of(SMALL_CASE)

    @jax.jit
    def program(cache, tokens, count):
        return rank_candidates(weights, cache, tokens, count, vectors, scales, features, implementation=implementation)[0]

    for length, count, fits in ((7, 2, True), (8, 2, False), (9, 1, False), (0, 3, False), (0, 0, False)):
        cache = empty_cache(weights)
        cache = type(cache)(keys=cache.keys, values=cache.values, length=jnp.int32(length))
        assert np.isfinite(program(cache, tokens, np.int32(count))).all() == fits, (length, count)
    ranker = ServedRanker(weights, implementation=implementation)
    with pytest.raises(UserError, match="2 of 2 tokens after 8 do not fit into a window of 9"):
        ranker(tokens, *candidates_of(SMALL_CASE), known=KnownHistory(jnp.zeros(0), 8))


@pytest.mark.parametrize("implementation", WAYS)
def test_a_score_does_not_depend_on_the_candidates_behind(implementation):
    """Vectors of the processor hold several candidates; each is on its own. Only the first one is compared with."""
    case = CONTRACT_CASES[1]
    weights, state = random_weights(case), np.float32(expected_by_hand(case)[0])
    vectors, scales, features = candidates_of(case)
    score = jax.jit(functools.partial(score_candidates, weights, state, implementation=implementation))
    whole = score(vectors, scales, features)
    for count in (1, 20):
        close(score(vectors[:count], scales[:count], features[:count]), whole[:count], 1e-6)
    assert score(vectors[:0], scales[:0], features[:0]).shape == (0,)


@pytest.mark.parametrize("implementation", WAYS)
def test_a_state_that_is_not_a_number_gives_no_number(implementation):
    weights = random_weights(SMALL_CASE)
    state = np.full(SMALL_CASE.width, np.nan, np.float32)
    assert np.isnan(score_candidates(weights, state, *candidates_of(SMALL_CASE), implementation=implementation)).all()


@NEEDS_NATIVE
def test_native_runs_agree_bit_for_bit_and_leave_a_kept_cache_as_it_was():
    weights, tokens = random_weights(SMALL_CASE), random_inputs(SMALL_CASE).tokens
    cache = jax.jit(lambda given: extend_history(weights, empty_cache(weights), given, 4))(tokens)[1]
    before = jax.tree.map(np.array, cache)
    step = jax.jit(lambda *given: extend_history(weights, *given, implementation="native"))
    first, second = step(cache, tokens[4:5], 1), step(cache, tokens[4:5], 1)
    for actual, expected in ((first, second), (before, cache)):
        for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("implementation", WAYS)
def test_vmap_equals_a_loop(implementation):
    weights = random_weights(SMALL_CASE)
    tokens = np.stack([random_inputs(SMALL_CASE, seed).tokens[: SMALL_CASE.tokens] for seed in (1, 2)])

    def state(given):
        return extend_history(weights, empty_cache(weights), given, SMALL_CASE.tokens, implementation=implementation)[0]

    alone = jax.jit(state)
    for row, actual in enumerate(jax.jit(jax.vmap(state))(tokens)):
        close(actual, alone(tokens[row]))


def test_xla_computes_in_float64_where_inputs_are():
    with jax.enable_x64(True):
        weights, inputs = random_weights(SMALL_CASE), random_inputs(SMALL_CASE)
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64 if leaf.dtype == np.float32 else None), weights)
        tokens = jnp.asarray(inputs.tokens, jnp.float64)
        state, _ = jax.jit(extend_history)(wide, empty_cache(wide), tokens, SMALL_CASE.tokens)
        assert state.dtype == jnp.float64
        np.testing.assert_allclose(state, expected_by_hand(SMALL_CASE)[0], rtol=1e-12)


def test_xla_has_the_gradients_of_the_reference_in_float64():
    """With regard to weights, tokens and features; tokens that are padding have none."""
    inputs, (vectors, scales, features) = random_inputs(SMALL_CASE), candidates_of(SMALL_CASE)
    tokens, share = np.nan_to_num(inputs.tokens), np.cos(np.arange(SMALL_CASE.candidates)).astype(np.float32)

    def reference(weights, tokens, features):
        state = user_state_reference(weights, tokens[: SMALL_CASE.tokens])
        return jnp.dot(share, score_candidates_reference(weights, state, vectors, scales, features))

    def by_xla(weights, tokens, features):
        given = (weights, empty_cache(weights), tokens, SMALL_CASE.tokens, vectors, scales, features)
        return jnp.dot(share, rank_candidates(*given, implementation="xla")[0])

    def gradients(function, dtype):
        """Of all leaves that are no whole numbers, the features last and the tokens before them."""
        leaves, structure = jax.tree.flatten((random_weights(SMALL_CASE), tokens, features))
        places = [place for place, leaf in enumerate(leaves) if leaf.dtype == np.float32]

        def of_floats(floats):
            whole = list(map(jnp.asarray, leaves))
            for place, leaf in zip(places, floats, strict=True):
                whole[place] = leaf
            return function(*jax.tree.unflatten(structure, whole))

        return list(map(np.asarray, jax.jit(jax.grad(of_floats))([jnp.asarray(leaves[place], dtype) for place in places])))

    with jax.enable_x64(True):
        expected = gradients(reference, jnp.float64)
    actual = gradients(by_xla, jnp.float32)
    assert len(actual) == len(expected) == 17 and not actual[-2][SMALL_CASE.tokens :].any()
    for found, wanted in zip(actual, expected, strict=True):
        close(found, wanted, 1e-4)


@NEEDS_NATIVE
@pytest.mark.parametrize("chosen", [None, "native"])
def test_native_has_no_gradients_and_refuses_them(chosen):
    weights, state, given = random_weights(SMALL_CASE), jnp.ones(SMALL_CASE.width), candidates_of(SMALL_CASE)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda state: jnp.sum(score_candidates(weights, state, *given, implementation=chosen)))(state)
    tokens = jnp.ones((2, SMALL_CASE.width))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda tokens: jnp.sum(extend_history(weights, empty_cache(weights), tokens, 2, implementation=chosen)[0]))(
            tokens
        )


def test_bfloat16_inputs_give_bfloat16_scores_near_those_of_float64():
    def narrowed(leaf):
        return jnp.asarray(leaf, jnp.bfloat16 if leaf.dtype == np.float32 else None)

    weights = jax.tree.map(narrowed, random_weights(SMALL_CASE))
    given = map(narrowed, (random_inputs(SMALL_CASE).tokens, *candidates_of(SMALL_CASE)))

    def program(weights, tokens, *candidates):
        return rank_candidates(weights, empty_cache(weights), tokens, SMALL_CASE.tokens, *candidates)

    scores, cache = jax.jit(program)(weights, *given)
    assert scores.dtype == cache.keys.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(scores, np.float32), expected_by_hand(SMALL_CASE)[1], rtol=0.03, atol=0.5)


@pytest.mark.parametrize("platform", ("cuda", "tpu"))
def test_it_lowers_for_accelerators_without_the_hardware(platform):
    weights, tokens = random_weights(SMALL_CASE), jnp.zeros((SMALL_CASE.window, SMALL_CASE.width))

    def program(tokens, *given):
        return rank_candidates(weights, empty_cache(weights), tokens, 3, *given, implementation="xla")

    traced = jax.jit(program).trace(tokens, *map(jnp.asarray, candidates_of(SMALL_CASE)))
    assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()


@needs_cpu
def test_none_chooses_native_where_it_can_be_had(monkeypatch):
    weights = random_weights(SMALL_CASE)

    def program():
        return str(jax.make_jaxpr(lambda tokens: extend_history(weights, empty_cache(weights), tokens, 1))(jnp.ones((1, 12))))

    assert ("ffi_call" in program()) == (native.native_problem() is None)
    monkeypatch.setattr(api, "native_problem", lambda: "there is no C++ compiler")
    assert "ffi_call" not in program()
    with pytest.raises(UserError, match=r"'native' cannot be had: there is no C\+\+ compiler"):
        ServedRanker(weights, implementation="native")


@needs_cpu
def test_native_refuses_what_it_does_not_compute():
    weights, cache = random_weights(SMALL_CASE), empty_cache(random_weights(SMALL_CASE))
    with pytest.raises(UserError, match="'native' takes float32"):
        extend_history(weights, cache, jnp.ones((1, 12), jnp.bfloat16), 1, implementation="native")


def ones(**changed) -> dict[str, Any]:
    """A request of ``SMALL_CASE``, with other shapes where they are given."""
    shapes = {"tokens": (3, 12), "vectors": (5, 12), "vector_scales": (5,), "features": (5, 4)} | changed
    return {name: np.ones(shape, np.int8 if name == "vectors" else np.float32) for name, shape in shapes.items()}


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("implementation", (None, *WAYS))
@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"tokens": (3, 11)}, "tokens have shape (3, 11); expected one or more of width 12"),
        ({"tokens": (12,)}, "tokens have shape (12,)"),
        ({"vectors": (5, 11)}, "(5, 11), (5,), (5, 4); expected [c, 12], [c] and [c, 4]"),
        ({"vectors": (4, 12)}, "(4, 12), (5,), (5, 4)"),
        ({"vector_scales": (6,)}, "(5, 12), (6,), (5, 4)"),
        ({"vector_scales": (5, 1)}, "(5, 12), (5, 1), (5, 4)"),
        ({"features": (5, 3)}, "(5, 12), (5,), (5, 3)"),
        ({"features": (4, 4)}, "(5, 12), (5,), (4, 4)"),
    ),
)
def test_shapes_that_do_not_fit_raise_a_user_error(implementation, changed, message):
    weights, given = random_weights(SMALL_CASE), ones(**changed)
    with pytest.raises(UserError, match=re.escape(message)):
        rank_candidates(weights, empty_cache(weights), num_tokens=1, **given, implementation=implementation)
    with pytest.raises(UserError, match=re.escape(message)):
        ServedRanker(weights, implementation=implementation)(**given, num_tokens=1)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("implementation", (None, *WAYS))
def test_a_state_or_a_history_of_other_weights_raises_a_user_error(implementation):
    weights, given = random_weights(SMALL_CASE), ones()
    with pytest.raises(UserError, match="keys and values of the cache have the shapes"):
        cache = empty_cache(random_weights(CONTRACT_CASES[4]))
        extend_history(weights, cache, given["tokens"], 1, implementation=implementation)
    with pytest.raises(UserError, match=re.escape("the state has shape (11,); expected (12,)")):
        score_candidates(weights, np.ones(11, np.float32), *candidates_of(SMALL_CASE), implementation=implementation)
    ranker = ServedRanker(weights, implementation=implementation)
    _, known = ranker(**given)
    with pytest.raises(UserError, match="the known history has entries of shape"):
        ranker(**given, known=KnownHistory(known.entries[1:], known.length))
