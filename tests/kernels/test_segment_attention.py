"""Contract of segment_attention: every implementation against the specification, and the promises of the blocked one."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.segment_attention import segment_attention
from cda4rec_jax.kernels.segment_attention.cases import CONTRACT_CASES, Case
from cda4rec_jax.kernels.segment_attention.dropout import dropout_seeds, keep_weights
from tests.kernels.contract import assert_trees_close, assert_trees_equal, temporary_bytes

pytestmark = pytest.mark.usefixtures("float32_products")
PADDED = CONTRACT_CASES[4]
KINDS = ("softmax", "silu")
# Every way to compute it: the specification, whole rows, and blocks.
WAYS = (
    {"implementation": "reference"},
    {"implementation": "xla", "block_size": 1000},
    {"implementation": "xla", "block_size": 5},
)
WAY_NAMES = ("reference", "whole rows", "blocks")


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


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_softmax_equals_hand_computed_fractions(way):
    """exp(logits) are 1, 2, 5 in the first segment; the second reads itself alone; the last token is padding."""
    query, key = jnp.ones((1, 5, 1, 1)), jnp.log(jnp.array([1.0, 2.0, 5.0, 9.0, 9.0])).reshape(1, 5, 1, 1)
    value = jnp.array([8.0, 4.0, 16.0, 7.0, 3.0]).reshape(1, 5, 1, 1)
    out = segment_attention(query, key, value, jnp.array([[1, 1, 1, 2, 0]]), **way)
    expected = [8, (8 + 2 * 4) / 3, (8 + 2 * 4 + 5 * 16) / 8, 7, 0]
    np.testing.assert_allclose(out[0, :, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_silu_equals_hand_computed_fractions(way):
    """Logits are log 3 with distance 0 and 2 log 3 with distance 1, so the sigmoids are 3/4 and 9/10."""
    query, key = jnp.ones((1, 3, 1, 1)), jnp.zeros((1, 3, 1, 1))
    value = jnp.array([5.0, 2.0, 1.0]).reshape(1, 3, 1, 1)
    bias = math.log(3) * jnp.array([[1.0, 2.0, 50.0]])
    out = segment_attention(query, key, value, jnp.array([[1, 1, 2]]), bias=bias, kind="silu", **way)
    expected = math.log(3) * np.array([0.75 * 5, (1.8 * 5 + 0.75 * 2) / 2, 0.75 * 1])
    np.testing.assert_allclose(out[0, :, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("with_bias", (False, True), ids=("no bias", "bias"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CONTRACT_CASES, ids=lambda case: case.name)
def test_values_and_gradients_equal_reference_in_float64(case, kind, with_bias):
    """With a bias there is dropout too, so that both meet."""
    with jax.enable_x64(True):
        query, key, value, bias, segment_ids = make_inputs(case, jnp.float64)
        inputs = (query, key, value, bias if with_bias else None, segment_ids)
        options = {"kind": kind, "dropout_rate": 0.3, "dropout_key": jax.random.key(1) if with_bias else None}
        expected = value_and_gradients(inputs, implementation="reference", **options)
        actual = value_and_gradients(inputs, implementation="xla", block_size=case.block_size, **options)
        assert_trees_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
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


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_a_batch_of_padding_alone_gives_zero(way):
    query, key, value, bias, segment_ids = make_inputs(PADDED)
    result = value_and_gradients((query, key, value, bias, jnp.zeros_like(segment_ids)), **way)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", (None, 5), ids=("whole rows", "blocks"))
def test_packing_changes_nothing(block_size, kind):
    query, key, value, bias, segment_ids = make_inputs(CONTRACT_CASES[2])
    packed = segment_attention(query, key, value, segment_ids, bias=bias, kind=kind, block_size=block_size)
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
        )
        np.testing.assert_allclose(packed[:1, tokens], alone, rtol=1e-5, atol=1e-6)


def test_segments_that_do_not_rise_along_the_row_are_right_too():
    query, key, value, bias, _ = make_inputs(CONTRACT_CASES[2])
    segment_ids = jnp.asarray(np.random.default_rng(3).integers(0, 4, query.shape[:2]), jnp.int32)
    inputs = (query, key, value, bias, segment_ids)
    actual = value_and_gradients(inputs, block_size=5)
    assert_trees_close(actual, value_and_gradients(inputs, implementation="reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", (None, 8), ids=("whole rows", "blocks"))
def test_vmap_equals_a_loop(block_size):
    """The number of block distances differs between the elements of the batch."""
    case = CONTRACT_CASES[2]
    batch = [make_inputs(case, seed=seed) for seed in range(3)]
    batch[1] = (*batch[1][:4], jnp.ones_like(batch[1][4]))
    stacked = tuple(np.stack(arrays) for arrays in zip(*batch, strict=True))

    def gradients(query, key, value, bias, segment_ids):
        return value_and_gradients((query, key, value, bias, segment_ids), block_size=block_size)

    together = jax.jit(jax.vmap(gradients))(*stacked)
    for row, inputs in enumerate(batch):
        alone = jax.tree.map(lambda array, row=row: array[row], together)
        assert_trees_close(alone, gradients(*inputs), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", (None, 5), ids=("whole rows", "blocks"))
def test_logits_of_ten_thousand_stay_finite(block_size):
    query, *others = make_inputs(PADDED)
    inputs = (1e4 * query, *others)
    expected, actual = value_and_gradients(inputs, implementation="reference"), value_and_gradients(inputs, block_size=block_size)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(actual))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_bfloat16_inputs_accumulate_in_float32_and_keep_their_dtype(way, kind):
    inputs = make_inputs(PADDED, jnp.bfloat16)
    actual = value_and_gradients(inputs, kind=kind, **way)
    widened = tuple(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array for array in inputs)
    expected = value_and_gradients(widened, kind=kind, implementation="reference")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(actual))
    assert_trees_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), actual), expected, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("block_size", (None, 8), ids=("whole rows", "blocks"))
def test_two_runs_agree_bit_for_bit(block_size):
    inputs = make_inputs(CONTRACT_CASES[2])
    options = {"block_size": block_size, "dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
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


def test_temporary_memory_of_long_rows_stays_far_below_the_weights():
    case = Case(name="memory", rows=4, length=2048, heads=2, kv_heads=2, head_size=8, longest=50)
    query, key, value, _, segment_ids = make_inputs(case)

    def loss(query, key, value):
        return jnp.sum(segment_attention(query, key, value, segment_ids))

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
@pytest.mark.parametrize("implementation", (None, "reference", "xla"))
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
