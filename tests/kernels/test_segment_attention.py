"""Contract of segment_attention: every implementation against the specification, and the promises of the blocked one."""

import functools
import math
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels import native_build
from cda4rec_jax.kernels.segment_attention import api, native, segment_attention
from cda4rec_jax.kernels.segment_attention.cases import CONTRACT_CASES, Case
from cda4rec_jax.kernels.segment_attention.dropout import dropout_seeds, keep_weights
from tests.kernels.contract import assert_trees_close, assert_trees_equal, needs_cpu, needs_native, temporary_bytes

pytestmark = pytest.mark.usefixtures("float32_products")
PADDED = CONTRACT_CASES[4]
KINDS = ("softmax", "silu")
NEEDS_NATIVE = needs_native(native.native_problem)
NATIVE = pytest.param("native", marks=NEEDS_NATIVE)
# Every way to compute it, with the specification first.
WAYS = (
    pytest.param({"implementation": "reference"}, id="reference"),
    pytest.param({"implementation": "xla", "block_size": 1000}, id="whole rows"),
    pytest.param({"implementation": "xla", "block_size": 5}, id="blocks"),
    pytest.param({"implementation": "native"}, id="native", marks=NEEDS_NATIVE),
)
FAST_WAYS = WAYS[1:]
# The native code goes by 6 and 24 queries and by vectors and panels of up to 16 and 64 keys.
NATIVE_CASES = (
    Case(name="one token more than a block of queries", rows=2, length=25, heads=2, kv_heads=2, head_size=16, longest=9),
    Case(name="several panels of keys", rows=2, length=150, heads=4, kv_heads=2, head_size=20, longest=70, padding=3),
    Case(name="a wide head that is read across panels", rows=1, length=131, heads=3, kv_heads=1, head_size=72, longest=999),
    Case(name="more rows than a thread takes", rows=37, length=40, heads=2, kv_heads=1, head_size=8, longest=11, padding=1),
)


def make_inputs(case: Case, dtype=jnp.float32, seed: int = 0):
    rng = np.random.default_rng(seed)
    query_shape = (case.rows, case.length, case.heads, case.head_size)
    key_shape = (case.rows, case.length, case.kv_heads, case.head_size)
    query, key, value = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (query_shape, key_shape, key_shape))
    bias = jnp.asarray(rng.normal(size=(case.heads, case.length)), dtype)
    return query, key, value, bias, jnp.asarray(case.segment_ids(seed))


def value_and_gradients(inputs, **options):
    """Output, and the gradients in query, key, value and bias for a cotangent that differs at every element."""
    *operands, segment_ids = inputs
    cotangent = jnp.asarray(np.random.default_rng(9).normal(size=operands[0].shape), operands[0].dtype)

    def both_passes(query, key, value, bias):
        def attend(query, key, value, bias):
            return segment_attention(query, key, value, segment_ids, bias=bias, **options)

        out, pull_back = jax.vjp(attend, query, key, value, bias)
        return out, pull_back(cotangent)

    return jax.jit(both_passes)(*operands)


@pytest.mark.parametrize("way", WAYS)
def test_softmax_equals_hand_computed_fractions(way):
    """exp(logits) are 1, 2, 5 in the first segment; the second reads itself alone; the last token is padding."""
    query, key = jnp.ones((1, 5, 1, 1)), jnp.log(jnp.array([1.0, 2.0, 5.0, 9.0, 9.0])).reshape(1, 5, 1, 1)
    value = jnp.array([8.0, 4.0, 16.0, 7.0, 3.0]).reshape(1, 5, 1, 1)
    out = segment_attention(query, key, value, jnp.array([[1, 1, 1, 2, 0]]), **way)
    expected = [8, (8 + 2 * 4) / 3, (8 + 2 * 4 + 5 * 16) / 8, 7, 0]
    np.testing.assert_allclose(out[0, :, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_silu_equals_hand_computed_fractions(way):
    """Logits are log 3 with distance 0 and 2 log 3 with distance 1, so the sigmoids are 3/4 and 9/10."""
    query, key = jnp.ones((1, 3, 1, 1)), jnp.zeros((1, 3, 1, 1))
    value = jnp.array([5.0, 2.0, 1.0]).reshape(1, 3, 1, 1)
    bias = math.log(3) * jnp.array([[1.0, 2.0, 50.0]])
    out = segment_attention(query, key, value, jnp.array([[1, 1, 2]]), bias=bias, kind="silu", **way)
    expected = math.log(3) * np.array([0.75 * 5, (1.8 * 5 + 0.75 * 2) / 2, 0.75 * 1])
    np.testing.assert_allclose(out[0, :, 0, 0], expected, rtol=1e-6)


def inputs_and_options(case: Case, kind: str, with_bias: bool):
    """With a bias there is dropout too, so that both meet."""
    query, key, value, bias, segment_ids = make_inputs(case)
    inputs = (query * case.head_size**-0.5, key, value, bias if with_bias else None, segment_ids)
    return inputs, {"kind": kind, "dropout_rate": 0.3, "dropout_key": jax.random.key(1) if with_bias else None}


@functools.cache
def reference_in_float64(case: Case, kind: str, with_bias: bool):
    """Inputs and results, both in float64; for all tests that ask for them."""
    inputs, options = inputs_and_options(case, kind, with_bias)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda array: array.astype(jnp.float64) if array.dtype == jnp.float32 else array, inputs)
        return exact, value_and_gradients(exact, implementation="reference", **options)


@pytest.mark.parametrize("with_bias", (False, True), ids=("no bias", "bias"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CONTRACT_CASES, ids=lambda case: case.name)
def test_values_and_gradients_equal_reference_in_float64(case, kind, with_bias):
    _, options = inputs_and_options(case, kind, with_bias)
    inputs, expected = reference_in_float64(case, kind, with_bias)
    with jax.enable_x64(True):
        actual = value_and_gradients(inputs, implementation="xla", block_size=case.block_size, **options)
        assert_trees_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("with_bias", (False, True), ids=("no bias", "bias"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CONTRACT_CASES + NATIVE_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ("xla", NATIVE))
def test_float32_is_as_near_to_the_reference_in_float64_as_rounding_allows(implementation, case, kind, with_bias):
    inputs, options = inputs_and_options(case, kind, with_bias)
    _, expected = reference_in_float64(case, kind, with_bias)
    assert_trees_close(value_and_gradients(inputs, implementation=implementation, **options), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_padding_gives_zero_reads_nothing_and_is_read_by_nothing(way, kind):
    query, key, value, bias, segment_ids = make_inputs(PADDED)
    padding = np.asarray(segment_ids) == 0
    out, gradients = value_and_gradients((query, key, value, bias, segment_ids), kind=kind, **way)
    assert np.all(np.asarray(out)[padding] == 0)
    for gradient in gradients[:3]:
        assert np.all(np.asarray(gradient)[padding] == 0)
    at_padding = jnp.asarray(padding)[:, :, None, None]
    loud = (jnp.where(at_padding, 1e10, array) for array in (query, key, value))
    actual = value_and_gradients((*loud, bias, segment_ids), kind=kind, **way)
    expected = value_and_gradients((query, key, value, bias, segment_ids), kind=kind, **way)
    assert_trees_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_padding_alone_gives_zero(way):
    query, key, value, bias, segment_ids = make_inputs(PADDED)
    result = value_and_gradients((query, key, value, bias, jnp.zeros_like(segment_ids)), **way)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", FAST_WAYS)
def test_packing_changes_nothing(way, kind):
    query, key, value, bias, segment_ids = make_inputs(CONTRACT_CASES[2])
    packed = segment_attention(query, key, value, segment_ids, bias=bias, kind=kind, **way)
    ids = np.asarray(segment_ids[0])
    for segment in np.unique(ids):
        tokens = slice(np.argmax(ids == segment), np.argmax(ids == segment) + np.sum(ids == segment))
        alone = segment_attention(
            query[:1, tokens],
            key[:1, tokens],
            value[:1, tokens],
            jnp.ones_like(segment_ids[:1, tokens]),
            bias=bias[:, : np.sum(ids == segment)],
            kind=kind,
            **way,
        )
        np.testing.assert_allclose(packed[:1, tokens], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", FAST_WAYS)
@pytest.mark.parametrize("case", (CONTRACT_CASES[2], NATIVE_CASES[1]), ids=lambda case: case.name)
def test_segments_that_do_not_rise_along_the_row_are_right_too(case, way):
    query, key, value, bias, _ = make_inputs(case)
    segment_ids = jnp.asarray(np.random.default_rng(3).integers(-1, 4, query.shape[:2]), jnp.int32)
    inputs = (query * case.head_size**-0.5, key, value, bias, segment_ids)
    actual = value_and_gradients(inputs, **way)
    assert_trees_close(actual, value_and_gradients(inputs, implementation="reference"), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("way", FAST_WAYS)
def test_vmap_equals_a_loop(way):
    """The number of block distances differs between the elements of the batch."""
    case = CONTRACT_CASES[2]
    batch = [make_inputs(case, seed=seed) for seed in range(3)]
    batch[1] = (*batch[1][:4], jnp.ones_like(batch[1][4]))
    stacked = tuple(np.stack(arrays) for arrays in zip(*batch, strict=True))

    def gradients(query, key, value, bias, segment_ids):
        return value_and_gradients((query, key, value, bias, segment_ids), **way)

    together = jax.jit(jax.vmap(gradients))(*stacked)
    for row, inputs in enumerate(batch):
        alone = jax.tree.map(lambda array, row=row: array[row], together)
        assert_trees_close(alone, gradients(*inputs), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("way", FAST_WAYS)
def test_vmap_over_some_operands_and_dropout_equals_a_loop(way):
    """Twice, over queries and over keys of dropout; all else is shared."""
    query, key, value, bias, segment_ids = make_inputs(CONTRACT_CASES[3])
    queries, dropout_keys = jnp.stack([query, 2.0 * query]), jax.random.split(jax.random.key(0), 3)

    def gradients(query, dropout_key):
        return value_and_gradients((query, key, value, bias, segment_ids), dropout_rate=0.4, dropout_key=dropout_key, **way)

    together = jax.vmap(jax.vmap(gradients, in_axes=(None, 0)), in_axes=(0, None))(queries, dropout_keys)
    for first in range(2):
        for second in range(3):
            alone = jax.tree.map(lambda array, first=first, second=second: array[first, second], together)
            assert_trees_close(alone, gradients(queries[first], dropout_keys[second]), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("way", FAST_WAYS)
def test_logits_of_ten_thousand_stay_finite(way):
    query, *others = make_inputs(PADDED)
    inputs = (1e4 * query, *others)
    expected, actual = value_and_gradients(inputs, implementation="reference"), value_and_gradients(inputs, **way)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(actual))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", (*WAYS[:3], pytest.param({}, id="what None chooses")))
def test_bfloat16_inputs_accumulate_in_float32_and_keep_their_dtype(way, kind):
    inputs = make_inputs(PADDED, jnp.bfloat16)
    actual = value_and_gradients(inputs, kind=kind, **way)
    widened = tuple(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array for array in inputs)
    expected = value_and_gradients(widened, kind=kind, implementation="reference")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(actual))
    assert_trees_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), actual), expected, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("way", FAST_WAYS)
def test_two_runs_agree_bit_for_bit(way):
    inputs = make_inputs(NATIVE_CASES[3])
    options = {**way, "dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    assert_trees_equal(*(value_and_gradients(inputs, **options) for _ in range(2)))


def test_dropout_is_off_without_a_key():
    inputs = make_inputs(PADDED)
    assert_trees_equal(value_and_gradients(inputs, dropout_rate=0.5), value_and_gradients(inputs))


def test_dropout_drops_its_share_of_weights_that_have_nothing_to_do_with_each_other():
    """Shares within five standard errors, for single weights and for pairs of neighbours in each direction and of two keys."""
    rate, shape = 0.3, (4, 3, 128, 128)
    positions = jnp.arange(128)
    first, second = (
        np.asarray(
            keep_weights(
                dropout_seeds(jax.random.key(seed), *shape[:2])[:, :, None, None],
                positions[None, None, :, None],
                positions[None, None, None, :],
                rate,
            )
        )
        for seed in (0, 1)
    )
    error = 5 / math.sqrt(first.size)
    assert abs(first.mean() - 0.7) < error * math.sqrt(0.3 * 0.7)
    pairs = [(first, second)]
    for axis in range(4):
        size = shape[axis]
        pairs.append((np.take(first, range(1, size), axis), np.take(first, range(size - 1), axis)))
    for one, other in pairs:
        assert abs((one & other).mean() - 0.49) < error * math.sqrt(0.49 * 0.51) * math.sqrt(first.size / one.size)


def test_dropout_keeps_the_output_on_average():
    query, key, value, _, segment_ids = make_inputs(CONTRACT_CASES[2])

    def dropped(dropout_key):
        return segment_attention(query, key, value, segment_ids, dropout_rate=0.5, dropout_key=dropout_key)

    mean = jnp.mean(jax.jit(jax.vmap(dropped))(jax.random.split(jax.random.key(0), 2000)), axis=0)
    np.testing.assert_allclose(mean, segment_attention(query, key, value, segment_ids), atol=0.35)


def test_padding_a_row_drops_the_same_weights():
    query, key, value, _, segment_ids = make_inputs(CONTRACT_CASES[2])
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    short = segment_attention(query, key, value, segment_ids, **options)
    query, key, value = (jnp.pad(array, ((0, 0), (0, 9), (0, 0), (0, 0))) for array in (query, key, value))
    long = segment_attention(query, key, value, jnp.pad(segment_ids, ((0, 0), (0, 9))), **options)
    np.testing.assert_allclose(long[:, : short.shape[1]], short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "length"), ((0, 5), (2, 0)))
def test_no_token_gives_an_empty_output(rows, length):
    empty = jnp.zeros((rows, length, 2, 4))
    result = value_and_gradients((empty, empty, empty, jnp.ones((2, length)), jnp.zeros((rows, length), jnp.int32)))
    assert result[0].shape == empty.shape
    assert not np.any(result[1][3])


@NEEDS_NATIVE
@pytest.mark.parametrize("place", range(3), ids=("query", "key", "value"))
@pytest.mark.parametrize("kind", KINDS)
def test_native_passes_on_what_is_not_finite(kind, place):
    *operands, segment_ids = make_inputs(CONTRACT_CASES[5])
    operands[place] = operands[place].at[1, 3].set(jnp.nan)
    out, gradients = value_and_gradients((*operands, segment_ids), kind=kind, implementation="native")
    assert np.all(np.isnan(out[1, 3])) and np.all(np.isfinite(out[0]))
    assert np.any(np.isnan(gradients[0][1])) and not np.any(np.isnan(gradients[0][0]))


@NEEDS_NATIVE
def test_native_computes_the_same_without_vector_instructions(monkeypatch):
    inputs = make_inputs(NATIVE_CASES[1])
    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(1), "implementation": "native"}
    expected = value_and_gradients(inputs, **options)
    flags = [flag for flag in native_build._FLAGS if not flag.startswith(("-march", "-O"))]
    monkeypatch.setattr(native_build, "_FLAGS", (*flags, "-O1"))
    targets = {"plain_segment_attention": "SegmentAttention", "plain_backward": "SegmentAttentionBackward"}
    assert native_build.provide(native.SOURCE, targets) is None
    monkeypatch.setattr(native, "_FORWARD", "plain_segment_attention")
    monkeypatch.setattr(native, "_BACKWARD", "plain_backward")
    jax.clear_caches()
    assert_trees_close(value_and_gradients(inputs, **options), expected, rtol=2e-4, atol=2e-5)


@NEEDS_NATIVE
def test_none_chooses_native_for_float32_without_a_block_size_or_a_mesh():
    def program(dtype=jnp.float32, **options):
        inputs = make_inputs(PADDED, dtype)
        return str(jax.make_jaxpr(lambda: segment_attention(*inputs[:3], inputs[4], **options))())

    assert "ffi_call" in program()
    assert "ffi_call" not in program(block_size=8)
    assert "ffi_call" not in program(jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert "ffi_call" not in program()


@needs_cpu
def test_without_a_compiler_none_chooses_xla_and_native_raises(monkeypatch):
    monkeypatch.setattr(api, "native_problem", lambda: "there is no C++ compiler")
    inputs = make_inputs(PADDED)
    program = jax.make_jaxpr(lambda: segment_attention(*inputs[:3], inputs[4]))()
    assert "ffi_call" not in str(program)
    with pytest.raises(UserError, match=r"'native' cannot be had: there is no C\+\+ compiler"):
        segment_attention(*inputs[:3], inputs[4], implementation="native")


@needs_cpu
def test_native_refuses_what_it_does_not_compute():
    query, key, value, _, segment_ids = make_inputs(PADDED, jnp.bfloat16)
    with pytest.raises(UserError, match="'native' computes in float32, and the inputs want bfloat16"):
        segment_attention(query, key, value, segment_ids, implementation="native")
    with pytest.raises(UserError, match="block_size is 8; expected None"):
        segment_attention(query, key, value, segment_ids, block_size=8, implementation="native")


@pytest.mark.parametrize("implementation", ("xla", NATIVE))
def test_temporary_memory_of_long_rows_stays_far_below_the_weights(implementation):
    case = Case(name="memory", rows=4, length=2048, heads=2, kv_heads=2, head_size=8, longest=50)
    query, key, value, _, segment_ids = make_inputs(case)

    def loss(query, key, value):
        return jnp.sum(segment_attention(query, key, value, segment_ids, implementation=implementation))

    weights = case.rows * case.heads * case.length**2 * 4
    assert temporary_bytes(jax.grad(loss, argnums=(0, 1, 2)), query, key, value) < weights / 8


def test_bad_arguments_raise_a_user_error():
    query, key, value, bias, segment_ids = make_inputs(PADDED)
    with pytest.raises(UserError, match="query has 3 heads and key 2"):
        segment_attention(query[:, :, :3], key, value, segment_ids)
    with pytest.raises(UserError, match=r"bias has shape \(4, 28\)"):
        segment_attention(query, key, value, segment_ids, bias=bias[:, 1:])
    with pytest.raises(UserError, match=r"dropout_rate is 1\.0"):
        segment_attention(query, key, value, segment_ids, dropout_rate=1.0)
    with pytest.raises(UserError, match="block_size is 0"):
        segment_attention(query, key, value, segment_ids, block_size=0)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("implementation", (None, *get_args(api.Implementation)))
@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"query": (2, 7, 4)}, "query has shape (2, 7, 4), key (2, 7, 2, 3)"),
        ({"key": (2, 6, 2, 3)}, "key (2, 6, 2, 3) and value (2, 7, 2, 3)"),
        ({"key": (2, 7, 2, 4), "value": (2, 7, 2, 4)}, "query has shape (2, 7, 4, 3), key (2, 7, 2, 4)"),
        ({"value": (2, 7, 1, 3)}, "value (2, 7, 1, 3)"),
        ({"segment_ids": (1, 7)}, "segment_ids have shape (1, 7); expected (2, 7)"),
    ),
)
def test_shapes_that_do_not_fit_raise_a_user_error(implementation, changed, message):
    shapes = {"query": (2, 7, 4, 3), "key": (2, 7, 2, 3), "value": (2, 7, 2, 3), "segment_ids": (2, 7)} | changed
    inputs = [jnp.ones(shape, jnp.int32 if name == "segment_ids" else jnp.float32) for name, shape in shapes.items()]
    with pytest.raises(UserError, match=re.escape(message)):
        segment_attention(*inputs, implementation=implementation)
