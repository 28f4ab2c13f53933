"""Contract of linear_cross_entropy with sampled items and with label smoothing: every implementation against the specification."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.linear_cross_entropy import linear_cross_entropy, native, pallas
from cda4rec_jax.kernels.linear_cross_entropy.sampled import sampled_cross_entropy
from tests.kernels.contract import (
    assert_trees_close,
    assert_trees_equal,
    interpreted,
    needs_cpu,
    needs_native,
    temporary_bytes,
)

pytestmark = pytest.mark.usefixtures("float32_products")
NATIVE = pytest.param("native", marks=needs_native(native.native_problem))
IMPLEMENTATIONS = ("reference", "xla", "triton", NATIVE)
VARIANTS = {"smoothed": (False, 0.1), "sampled": (True, 0.0), "both": (True, 0.1)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """``num_items`` counts the padding row."""

    name: str
    tokens: int
    num_items: int
    width: int
    num_sampled: int
    chunk_size: int


ODD = Case(name="odd everything", tokens=131, num_items=101, width=13, num_sampled=47, chunk_size=37)
CASES = (
    Case(name="one of everything", tokens=1, num_items=2, width=1, num_sampled=1, chunk_size=8),
    ODD,
    Case(name="more samples than items", tokens=33, num_items=9, width=15, num_sampled=70, chunk_size=16),
)
WIDE = Case(name="several blocks of rows", tokens=300, num_items=900, width=112, num_sampled=701, chunk_size=128)


def make_inputs(case: Case, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """Hidden states, items, weights, targets, sampled items (with padding and repeats) and the logs of their counts."""
    rng = np.random.default_rng(0)
    hidden, items = (jnp.asarray(rng.normal(size=(size, case.width)), dtype) for size in (case.tokens, case.num_items))
    targets, sampled = (jnp.asarray(rng.integers(0, case.num_items, size), jnp.int32) for size in (case.tokens, case.num_sampled))
    sampled = jnp.where(jnp.arange(case.num_sampled) % 9 == 8, 0, sampled)
    weights = jnp.asarray(rng.integers(0, 3, case.tokens) / 2, dtype)
    return hidden, items, weights, targets, sampled, jnp.asarray(rng.uniform(-7, 1, case.num_sampled), jnp.float32)


def by(implementation: str, **options: Any) -> dict[str, Any]:
    return {"implementation": implementation, "interpret": interpreted(implementation), **options}


def value_and_gradients(inputs: tuple[Any, ...], variant: str = "sampled", **options: Any) -> tuple[Any, tuple[Any, ...]]:
    hidden, items, weights, *others = inputs
    is_sampled, label_smoothing = VARIANTS[variant]

    def loss(hidden: Any, items: Any, weights: Any, targets: Any, sampled: Any, log_counts: Any) -> Any:
        chosen = {"sampled": sampled, "log_counts": log_counts} if is_sampled else {}
        return 1.5 * linear_cross_entropy(hidden, items, targets, weights, label_smoothing=label_smoothing, **chosen, **options)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(hidden, items, weights, *others)


def in_float64(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(array.astype(jnp.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array for array in inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sampled_equals_hand_computed_fraction(implementation: str) -> None:
    """exp(logits) are 1, 2, 5, 7 for the items 1 to 4. 2 was drawn twice and 3 once; counts are 1/2, 1/2, 1/4.

    Of target 3 the normaliser is 5 + 2 / .5 + 2 / .5, since its own draw is left out; of target 1 it is 1 + 4 + 4 + 5 / .25.
    """
    items = jnp.log(jnp.array([[100.0], [1.0], [2.0], [5.0], [7.0]]))
    sampled, counts = jnp.array([2, 0, 3, 2]), jnp.array([0.5, 0.001, 0.25, 0.5])
    inputs = (jnp.ones((2, 1)), items, jnp.array([3, 1]), jnp.array([2.0, 0.5]))
    loss = linear_cross_entropy(*inputs, sampled=sampled, log_counts=jnp.log(counts), **by(implementation))
    np.testing.assert_allclose(loss, 2 * np.log(13 / 5) + 0.5 * np.log(29), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_smoothed_equals_cross_entropy_with_a_mixed_label(implementation: str) -> None:
    """exp(logits) are 1, 2, 5 for the items 1, 2, 3, and so are the probabilities in eighths; row 4 is padding."""
    items = jnp.log(jnp.array([[100.0], [1.0], [2.0], [5.0], [9.0]]))
    inputs = (jnp.ones((2, 1)), items, jnp.array([3, 0]), jnp.array([2.0, 0.5]))
    loss = linear_cross_entropy(*inputs, label_smoothing=0.3, num_items=3, **by(implementation))
    np.testing.assert_allclose(loss, -2 * (0.8 * np.log(5 / 8) + 0.1 * np.log(2 / 8) + 0.1 * np.log(1 / 8)), rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_value_and_gradients_equal_reference_in_float64(implementation: str, case: Case, variant: str) -> None:
    with jax.enable_x64(True):
        inputs = in_float64(make_inputs(case))
        expected = value_and_gradients(inputs, variant, implementation="reference")
        actual = value_and_gradients(inputs, variant, **by(implementation, chunk_size=case.chunk_size))
        assert_trees_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", (*CASES, WIDE), ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["xla", NATIVE])
def test_float32_is_as_near_to_the_reference_in_float64_as_rounding_allows(implementation: str, case: Case, variant: str) -> None:
    inputs = make_inputs(case)
    with jax.enable_x64(True):
        expected = value_and_gradients(in_float64(inputs), variant, implementation="reference")
    actual = value_and_gradients(inputs, variant, **by(implementation, chunk_size=case.chunk_size))
    assert_trees_close(actual, expected, rtol=2e-5, atol=2e-5)


@needs_native(native.native_problem)
def test_native_keeps_offsets_whole_where_it_may_split_operands() -> None:
    inputs = make_inputs(WIDE)
    expected = value_and_gradients(inputs, implementation="xla")
    with jax.default_matmul_precision("high"):
        assert_trees_close(value_and_gradients(inputs, **by("native")), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_is_no_negative_and_gets_no_gradient(implementation: str) -> None:
    hidden, items, weights, targets, sampled, log_counts = make_inputs(ODD)
    assert np.any(sampled == 0) and np.any(targets == 0)
    inputs = (hidden, items, weights, targets, sampled, log_counts)
    value, (d_hidden, d_items, _) = value_and_gradients(inputs, "both", **by(implementation))
    other, _ = value_and_gradients((hidden, items.at[0].set(50.0), *inputs[2:]), "both", **by(implementation))
    assert value == other
    assert not np.any(d_items[0])
    assert not np.any(np.asarray(d_hidden)[(targets == 0) | (weights == 0)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_another_item_among_the_samples_the_loss_and_its_gradients_are_zero(implementation: str) -> None:
    hidden, items, weights, targets, _, log_counts = make_inputs(ODD)
    inputs = (hidden, items, weights + 1.0, targets * 0 + 5, jnp.where(jnp.arange(47) < 20, 5, 0), log_counts)
    value, gradients = value_and_gradients(inputs, **by(implementation))
    assert value == 0 and not any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("scale", [0.3, 1e3])
@pytest.mark.parametrize("implementation", ["xla", NATIVE])
def test_hits_are_left_out_also_where_their_logits_are_above_all_others(implementation: str, scale: float) -> None:
    """Every target was sampled. With the larger scale it has a logit of about 10,000 and all of the probability."""
    _, items, weights, targets, sampled, log_counts = make_inputs(CASES[2])
    inputs = (scale * items[targets], items, weights, targets, sampled, log_counts)
    assert {*np.unique(targets)} <= {*np.unique(sampled)}
    with jax.enable_x64(True):
        expected = value_and_gradients(in_float64(inputs), implementation="reference")
    actual = value_and_gradients(inputs, **by(implementation, chunk_size=16))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    assert (float(expected[0]) > 1) == (scale < 1)
    for found, wanted in zip(actual[1], expected[1], strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max() + 1e-28)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_products_of_bfloat16_accumulate_in_float32_and_gradients_keep_the_dtypes_of_their_inputs(
    implementation: str, variant: str
) -> None:
    hidden, items, *others = make_inputs(ODD)
    rounded = (hidden.astype(jnp.bfloat16), items, *others)
    value, gradients = value_and_gradients(rounded, variant, **by(implementation, chunk_size=37))
    widened = (rounded[0].astype(jnp.float32), items.astype(jnp.bfloat16).astype(jnp.float32), *others)
    expected, expected_gradients = value_and_gradients(widened, variant, implementation="reference")
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, rtol=2e-2, atol=3e-2)


@needs_cpu  # a GPU adds up the rows of one item in any order
@pytest.mark.parametrize("implementation", ["xla", NATIVE])
def test_two_runs_agree_bit_for_bit(implementation: str) -> None:
    first, second = (value_and_gradients(make_inputs(WIDE), "both", **by(implementation)) for _ in range(2))
    assert_trees_equal(first, second)


def test_the_order_of_the_samples_does_not_matter() -> None:
    *inputs, sampled, log_counts = make_inputs(ODD)
    expected = value_and_gradients((*inputs, sampled, log_counts))
    actual = value_and_gradients((*inputs, sampled[::-1], log_counts[::-1]))
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_vmap_equals_a_loop() -> None:
    hidden, items, weights, targets, sampled, log_counts = make_inputs(ODD)
    batch = (jnp.stack([hidden, -hidden]), jnp.stack([sampled, sampled[::-1] // 2]))

    def gradient(hidden: Any, sampled: Any) -> Any:
        options = {"sampled": sampled, "log_counts": log_counts, "label_smoothing": 0.1}
        return jax.grad(lambda h: linear_cross_entropy(h, items, targets, weights, **options))(hidden)

    together = jax.jit(jax.vmap(gradient))(*batch)
    apart = jnp.stack([jax.jit(gradient)(*inputs) for inputs in zip(*batch, strict=True)])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


def test_no_token_gives_zero_loss() -> None:
    none = Case(name="none", tokens=0, num_items=4, width=3, num_sampled=2, chunk_size=8)
    value, (d_hidden, d_items, _) = value_and_gradients(make_inputs(none), "both")
    assert value == 0 and d_hidden.shape == (0, 3) and not np.any(d_items)


@pytest.mark.parametrize("implementation", ["xla", NATIVE])
def test_temporary_memory_is_far_below_that_of_the_sampled_logits(implementation: str) -> None:
    case = Case(name="in-batch", tokens=8192, num_items=5000, width=32, num_sampled=8192, chunk_size=128)
    hidden, items, weights, targets, sampled, log_counts = make_inputs(case)
    options = by(implementation, sampled=sampled, log_counts=log_counts, label_smoothing=0.1)
    step = jax.value_and_grad(partial(linear_cross_entropy, **options), (0, 1))
    assert temporary_bytes(step, hidden, items, targets, weights) < case.tokens * case.num_sampled * 4 / 16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_pallas_kernels_lower_for_cuda_without_one(dtype: Any) -> None:
    shapes = (((1000, 100), dtype), ((503, 100), jnp.float32), ((503,), jnp.float32), ((1000, 2), jnp.int32))
    more = (((1000, 100), jnp.float32), ((1000,), jnp.float32))
    inputs = tuple(jax.ShapeDtypeStruct(shape, of) for shape, of in (*shapes, *more))
    step = jax.value_and_grad(partial(sampled_cross_entropy, partial(pallas.sampled_pallas, False)), (0, 1))
    lowered = jax.jit(step).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("__gpu$xla.gpu.triton") == 3
    assert "1000x503" not in lowered and "1024x512" not in lowered  # logits are nowhere


def make_mesh(data: int, items: int) -> jax.sharding.Mesh:
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, items), ("data", "items"), axis_types=kinds)


@pytest.mark.skipif(jax.device_count() < 2, reason="a mesh of two devices")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["tokens divided", "items divided"])
def test_sharded_value_and_gradients_equal_reference_in_float64(sizes: tuple[int, int], variant: str) -> None:
    """Also where tokens and items do not divide among the devices, and where the last rows are no items."""
    num_items = ODD.num_items - 4
    with jax.enable_x64(True):
        hidden, items, weights, targets, sampled, log_counts = in_float64(make_inputs(ODD))
        inputs = (hidden, items, weights, jnp.minimum(targets, num_items), jnp.minimum(sampled, num_items), log_counts)
        expected = value_and_gradients(inputs, variant, num_items=num_items, implementation="reference")
        actual = value_and_gradients(inputs, variant, num_items=num_items, chunk_size=37, mesh=make_mesh(*sizes))
        assert_trees_close(actual, expected, rtol=1e-11, atol=1e-11)
        assert not np.any(actual[1][1][num_items + 1 :]) and not np.any(actual[1][1][0])


@pytest.mark.skipif(jax.device_count() < 2, reason="a mesh of two devices")
def test_no_device_gathers_a_table_that_is_divided() -> None:
    mesh = make_mesh(1, 2)
    hidden, items, weights, targets, sampled, log_counts = make_inputs(WIDE)
    items = jax.device_put(items, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("items")))

    def loss(hidden: Any, items: Any) -> Any:
        options = {"sampled": sampled, "log_counts": log_counts, "label_smoothing": 0.1, "mesh": mesh}
        return linear_cross_entropy(hidden, items, targets, weights, **options)

    program = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, items).compile().as_text() or ""
    gathered = re.findall(r"= \(?(\w+\[[\d,]+\])\S* all-gather", program)
    assert not any(re.search(r"\[(900|902),", shape) for shape in gathered), gathered
    assert "all-reduce" in program


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampled": (3,)}, "sampled has shape (3,) and log_counts None; expected both [k]"),
        ({"log_counts": (3,)}, "sampled has shape None and log_counts (3,); expected both [k]"),
        ({"sampled": (3,), "log_counts": (4,)}, "sampled has shape (3,) and log_counts (4,)"),
        ({"sampled": (0,), "log_counts": (0,)}, "expected both [k] with k at least 1"),
        ({"sampled": (8, 3), "log_counts": (8, 3)}, "sampled has shape (8, 3)"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; expected 0 to less than 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ],
)
def test_bad_arguments_raise_a_user_error(options: dict[str, Any], message: str) -> None:
    made: dict[str, Any] = {
        name: jnp.ones(value, jnp.int32 if name == "sampled" else jnp.float32) if isinstance(value, tuple) else value
        for name, value in options.items()
    }
    with pytest.raises(UserError, match=re.escape(message)):
        linear_cross_entropy(jnp.ones((8, 5)), jnp.ones((6, 5)), jnp.ones(8, jnp.int32), jnp.ones(8), **made)
