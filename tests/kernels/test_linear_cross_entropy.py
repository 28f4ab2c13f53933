"""Contract of linear_cross_entropy: every implementation against the specification, and the promises of the chunked one."""

import ctypes
import math
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels import native_build
from cda4rec_jax.kernels.linear_cross_entropy import linear_cross_entropy, native, pallas
from cda4rec_jax.kernels.linear_cross_entropy.api import Implementation, default_chunk_size
from cda4rec_jax.kernels.linear_cross_entropy.cases import CONTRACT_CASES, WORKLOAD_CASES, Case
from cda4rec_jax.processor import has_matrix_unit
from tests.kernels.contract import (
    assert_trees_close,
    assert_trees_equal,
    interpreted,
    needs_cpu,
    needs_native,
    temporary_bytes,
)

pytestmark = pytest.mark.usefixtures("float32_products")
NEEDS_NATIVE = needs_native(native.native_problem)
NATIVE = pytest.param("native", marks=NEEDS_NATIVE)
IMPLEMENTATIONS = ("reference", "xla", "triton", NATIVE)
WIDE_CASES = (
    Case(name="several blocks of items, several chunks of tokens", tokens=300, num_items=700, width=64, chunk_size=128),
    Case(name="panels of every width", tokens=70, num_items=128, width=112, chunk_size=64),
    Case(name="one item more than a block", tokens=65, num_items=128, width=48, chunk_size=64),
)


@pytest.fixture(params=["highest", "high"])
def precision(request):
    """Of products of float32; native may split operands of the second."""
    with jax.default_matmul_precision(request.param):
        yield request.param


def make_inputs(case: Case, dtype=jnp.float32, seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(case.tokens, case.width)), dtype)
    items = jnp.asarray(rng.normal(size=(case.num_items, case.width)), dtype)
    targets = jnp.asarray(rng.integers(0, case.num_items, case.tokens), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, case.tokens) / 2, dtype)
    return hidden, items, targets, weights


def by(implementation: str, **options):
    return {"implementation": implementation, "interpret": interpreted(implementation), **options}


def value_and_gradients(inputs, **options):
    def loss(hidden, items, weights):
        return 1.5 * linear_cross_entropy(hidden, items, inputs[2], weights, **options)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(inputs[0], inputs[1], inputs[3])


def value_alone(inputs, **options):
    return jax.jit(lambda *arrays: 1.5 * linear_cross_entropy(*arrays, **options))(*inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_hand_computed_fraction(implementation):
    """exp(logits) are 1, 2, 5 for the items 1, 2, 3, so the losses are log(8 / 5) and log(8 / 1)."""
    items = jnp.log(jnp.array([[100.0], [1.0], [2.0], [5.0]]))
    loss = linear_cross_entropy(jnp.ones((2, 1)), items, jnp.array([3, 1]), jnp.array([2.0, 0.5]), **by(implementation))
    np.testing.assert_allclose(loss, 2 * np.log(8 / 5) + 0.5 * np.log(8), rtol=1e-6)


@pytest.mark.parametrize("case", CONTRACT_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_value_alone_and_with_gradients_equal_reference_in_float64(implementation, case):
    options = by(implementation, chunk_size=case.chunk_size)
    with jax.enable_x64(True):
        inputs = make_inputs(case, jnp.float64)
        expected = value_and_gradients(inputs, implementation="reference")
        actual = value_and_gradients(inputs, **options)
        assert_trees_close(actual, expected, rtol=1e-11, atol=1e-12)
        alone = value_alone(inputs, **options)
        np.testing.assert_allclose(alone, expected[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CONTRACT_CASES + WIDE_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["xla", NATIVE])
def test_float32_is_as_near_to_the_reference_in_float64_as_rounding_allows(implementation, case):
    inputs = make_inputs(case)
    options = by(implementation, chunk_size=case.chunk_size)
    with jax.enable_x64(True):
        exact = tuple(array.astype(jnp.float64) if array.dtype == jnp.float32 else array for array in inputs)
        expected = value_and_gradients(exact, implementation="reference")
    actual = value_and_gradients(inputs, **options)
    assert_trees_close(actual, expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(value_alone(inputs, **options), expected[0], rtol=2e-5, atol=1e-5)


def lends_matrix_unit() -> bool:
    """Whether the processor has one that computes with bfloat16, and the system lends it to this process (as matrix_unit.h asks)."""
    return has_matrix_unit() and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


@NEEDS_NATIVE
@pytest.mark.skipif(not lends_matrix_unit(), reason="no matrix unit (AMX) here, so no operands are split")
@pytest.mark.parametrize("case", WIDE_CASES, ids=lambda case: case.name)
def test_operands_are_split_on_the_matrix_unit_and_only_where_that_is_allowed(case):
    inputs = make_inputs(case)
    split, again, whole = (_with_precision(name, inputs, case.chunk_size) for name in ("high", "high", "highest"))
    assert_trees_equal(split, again)
    assert any(not np.array_equal(*pair) for pair in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True))


def _with_precision(name: str, inputs, chunk_size: int):
    with jax.default_matmul_precision(name):
        return value_and_gradients(inputs, **by("native", chunk_size=chunk_size))


def test_the_matrix_unit_compiles_also_where_there_is_none():
    compiler = shutil.which("g++")
    flags = ["-std=c++17", "-fsyntax-only", "-w", "-march=sapphirerapids", f"-I{jax.ffi.include_dir()}"]
    if compiler is None or subprocess.run([compiler, *flags, "-x", "c++", "/dev/null"], capture_output=True).returncode:
        pytest.skip("no g++ that knows this processor")
    source = Path(native.__file__).with_name("native.cc")
    asked = [compiler, *flags, "-x", "c++", "-"]
    program = f'#include "{source}"\nstatic_assert(CDA4REC_MATRIX_UNIT == 1);\n'
    done = subprocess.run(asked, input=program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@NEEDS_NATIVE
@pytest.mark.skipif(not lends_matrix_unit(), reason="no matrix unit (AMX) here, so no operands are split")
@pytest.mark.parametrize("case", CONTRACT_CASES + WIDE_CASES, ids=lambda case: case.name)
def test_operands_that_are_split_lose_few_of_their_bits(case):
    inputs = make_inputs(case)
    expected, actual = (_with_precision(name, inputs, case.chunk_size) for name in ("highest", "high"))
    for found, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_row_is_no_class_and_gets_no_gradient(implementation):
    hidden, items, targets, weights = make_inputs(CONTRACT_CASES[4])
    value, (_, d_items, _) = value_and_gradients((hidden, items, targets, weights), **by(implementation))
    other, _ = value_and_gradients((hidden, items.at[0].set(50.0), targets, weights), **by(implementation))
    assert value == other
    assert np.all(np.asarray(d_items[0]) == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_with_target_0_or_weight_0_count_nothing(implementation):
    hidden, items, targets, weights = make_inputs(CONTRACT_CASES[4])
    counted = np.asarray((targets > 0) & (weights > 0))
    assert counted.any() and not counted.all()
    value, (d_hidden, _, _) = value_and_gradients((hidden, items, targets, weights), **by(implementation))
    kept, _ = value_and_gradients((hidden[counted], items, targets[counted], weights[counted]), **by(implementation))
    np.testing.assert_allclose(value, kept, rtol=1e-6)
    assert np.all(np.asarray(d_hidden)[~counted] == 0)


def test_all_weights_0_give_zero_loss_and_gradients():
    hidden, items, targets, weights = make_inputs(CONTRACT_CASES[4])
    value, (d_hidden, d_items, _) = value_and_gradients((hidden, items, targets, jnp.zeros_like(weights)))
    assert value == 0
    assert not np.any(d_hidden) and not np.any(d_items)


def test_no_token_gives_zero_loss():
    value, (d_hidden, d_items, _) = value_and_gradients(make_inputs(Case(name="none", tokens=0, num_items=4, width=3)))
    assert value == 0
    assert d_hidden.shape == (0, 3)
    assert not np.any(d_items)


def test_vmap_equals_a_loop():
    case = CONTRACT_CASES[3]
    batch = [make_inputs(case, seed=seed) for seed in range(3)]
    stacked = tuple(np.stack(arrays) for arrays in zip(*batch, strict=True))

    @jax.jit
    def gradients(*inputs):
        return jax.value_and_grad(linear_cross_entropy, argnums=(0, 1))(*inputs, chunk_size=case.chunk_size)

    together = jax.jit(jax.vmap(gradients))(*stacked)
    for row, inputs in enumerate(batch):
        alone = jax.tree.map(lambda array, row=row: array[row], together)
        assert_trees_close(alone, gradients(*inputs), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", NATIVE])
def test_logits_of_ten_thousand_stay_finite(implementation):
    hidden, items, targets, weights = make_inputs(CONTRACT_CASES[4])
    inputs = (1e4 * hidden, items, targets, weights)
    options = by(implementation, chunk_size=37)
    expected, actual = value_and_gradients(inputs, implementation="reference"), value_and_gradients(inputs, **options)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(actual))
    # Logits of 10,000 are rounded by 1e-3, and where two items are nearly equal, a gradient of 40,000 by 1e-3 of that.
    assert_trees_close(actual, expected, rtol=1e-3, atol=40.0)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
def test_bfloat16_inputs_accumulate_in_float32_and_keep_their_dtype_in_gradients(implementation):
    inputs = make_inputs(CONTRACT_CASES[4], jnp.bfloat16)
    value, gradients = value_and_gradients(inputs, **by(implementation))
    widened = tuple(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array for array in inputs)
    expected, expected_gradients = value_and_gradients(widened, implementation="reference")
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(gradient.astype(jnp.float32), expected_gradient, rtol=1e-2, atol=1e-2)


@needs_cpu  # a GPU adds up the rows of one item in any order
@pytest.mark.parametrize("implementation", ["xla", NATIVE])
def test_two_runs_agree_bit_for_bit(implementation, precision):
    inputs = make_inputs(WIDE_CASES[0])
    first, second = (value_and_gradients(inputs, **by(implementation, chunk_size=37)) for _ in range(2))
    assert_trees_equal(first, second)


@NEEDS_NATIVE
@pytest.mark.parametrize("place", ["hidden", "an item"])
def test_native_passes_on_what_is_not_finite(place, precision):
    hidden, items, targets, weights = make_inputs(WIDE_CASES[0])
    hidden = hidden.at[7].set(jnp.nan) if place == "hidden" else hidden
    items = items.at[300, 5].set(jnp.inf) if place == "an item" else items
    inputs = (hidden, items, jnp.maximum(targets, 1), jnp.ones_like(weights))
    assert not np.isfinite(value_and_gradients(inputs, **by("native"))[0])


@NEEDS_NATIVE
def test_a_target_beyond_the_items_writes_nothing_past_them(precision):
    hidden, items, targets, weights = make_inputs(WIDE_CASES[0])
    targets = targets.at[3].set(items.shape[0] + 10**6)
    actual, expected = (value_and_gradients((hidden, items, targets, weights), **by(name)) for name in ("native", "xla"))
    rtol, atol = (2e-5, 1e-5) if precision == "highest" else (1e-3, 1e-3)
    assert_trees_close(actual, expected, rtol=rtol, atol=atol)


@NEEDS_NATIVE
def test_native_computes_the_same_without_vector_instructions(monkeypatch):
    inputs = make_inputs(WIDE_CASES[0])
    expected = value_and_gradients(inputs, **by("native"))
    flags = [flag for flag in native_build._FLAGS if not flag.startswith(("-march", "-O"))]
    monkeypatch.setattr(native_build, "_FLAGS", (*flags, "-O1"))
    assert native_build.provide(native.SOURCE, {"plain_linear_cross_entropy": "LinearCrossEntropy"}) is None
    monkeypatch.setattr(native, "_TARGET", "plain_linear_cross_entropy")
    jax.clear_caches()
    assert_trees_close(value_and_gradients(inputs, **by("native")), expected, rtol=2e-5, atol=1e-5)


@needs_cpu
def test_native_refuses_what_it_does_not_compute():
    inputs = make_inputs(CONTRACT_CASES[0], jnp.bfloat16)
    with pytest.raises(UserError, match="native' computes in float32, and the inputs want bfloat16"):
        linear_cross_entropy(*inputs, implementation="native")


@pytest.mark.parametrize("implementation", ["xla", NATIVE])
@pytest.mark.parametrize("case", WORKLOAD_CASES, ids=lambda case: case.name)
def test_temporary_memory_of_a_training_step_is_an_eighth_of_that_with_materialised_logits(case, implementation):
    inputs = make_inputs(case)
    ours, materialised = (
        temporary_bytes(jax.value_and_grad(partial(linear_cross_entropy, **by(implementation)), (0, 1)), *inputs)
        for implementation in (implementation, "reference")
    )
    assert 8 * ours <= materialised


@needs_cpu
def test_the_chunk_that_is_chosen_shrinks_with_the_catalogue_within_its_bounds():
    assert [default_chunk_size(num_items) for num_items in (100, 3_417, 12_102, 1_000_000)] == [256, 256, 80, 64]


@pytest.mark.parametrize("programs", [1, 4], ids=["one loop over all blocks", "segments of several blocks"])
def test_the_loops_of_the_pallas_kernels_may_be_cut_anywhere(monkeypatch, programs):
    monkeypatch.setattr(pallas, "PROGRAMS", programs)
    inputs = make_inputs(Case(name="five blocks of tokens, six of items", tokens=260, num_items=350, width=5))
    expected, actual = (value_and_gradients(inputs, **by(name)) for name in ("reference", "triton"))
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_pallas_kernels_lower_for_cuda_without_one(dtype):
    inputs = tuple(
        jax.ShapeDtypeStruct(shape, of)
        for shape, of in (((1000, 100), dtype), ((5003, 100), jnp.float32), ((1000,), jnp.int32), ((1000,), jnp.float32))
    )
    step = jax.value_and_grad(partial(pallas.linear_cross_entropy_pallas, False), (0, 1))
    lowered = jax.jit(step).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("__gpu$xla.gpu.triton") == 3
    assert "1000x5003" not in lowered and "1024x5056" not in lowered  # logits are nowhere


def test_bad_arguments_raise_a_user_error():
    hidden, items, targets, weights = make_inputs(CONTRACT_CASES[0])
    with pytest.raises(UserError, match="at least one item"):
        linear_cross_entropy(hidden, items[:1], targets * 0, weights)
    with pytest.raises(UserError, match="chunk_size is 0"):
        linear_cross_entropy(hidden, items, targets, weights, chunk_size=0)


@pytest.mark.skipif(not interpreted("triton"), reason="this is the kernel's own backend")
def test_a_kernel_of_another_backend_raises_a_user_error():
    with pytest.raises(UserError, match=f"'triton' runs on a GPU, and JAX is on {jax.default_backend()}"):
        linear_cross_entropy(*make_inputs(CONTRACT_CASES[0]), implementation="triton")


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("implementation", (None, *get_args(Implementation)))
@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"hidden": (8, 3)}, "hidden has shape (8, 3) and items (6, 5)"),
        ({"items": (6,)}, "hidden has shape (8, 5) and items (6,)"),
        ({"targets": (7,)}, "targets have shape (7,) and weights (8,); expected (8,)"),
        ({"weights": (9,)}, "targets have shape (8,) and weights (9,); expected (8,)"),
        ({"weights": (8, 1)}, "targets have shape (8,) and weights (8, 1); expected (8,)"),
    ),
)
def test_shapes_that_do_not_fit_raise_a_user_error(implementation, changed, message):
    shapes = {"hidden": (8, 5), "items": (6, 5), "targets": (8,), "weights": (8,)} | changed
    inputs = [jnp.ones(shape, jnp.int32 if name == "targets" else jnp.float32) for name, shape in shapes.items()]
    with pytest.raises(UserError, match=re.escape(message)):
        linear_cross_entropy(*inputs, implementation=implementation)


def make_mesh(**sizes: int) -> Mesh:
    if math.prod(sizes.values()) > jax.device_count():
        pytest.skip(f"a mesh of {sizes} needs more than the {jax.device_count()} devices here")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["tokens divided", "items divided"])
@pytest.mark.parametrize("case", CONTRACT_CASES[3:5], ids=lambda case: case.name)
def test_sharded_value_and_gradients_equal_reference_in_float64(case, sizes):
    """Also where tokens and items do not divide among the devices, and where the last rows are no items."""
    mesh = make_mesh(data=sizes[0], items=sizes[1])
    with jax.enable_x64(True):
        hidden, items, targets, weights = make_inputs(case, jnp.float64)
        num_items = case.num_items - 4
        inputs = (hidden, items, jnp.minimum(targets, num_items), weights)
        expected = value_and_gradients(inputs, num_items=num_items, implementation="reference")
        actual = value_and_gradients(inputs, num_items=num_items, chunk_size=case.chunk_size, mesh=mesh)
        assert_trees_close(actual, expected, rtol=1e-11, atol=1e-12)
        assert not np.any(actual[1][1][num_items + 1 :]) and not np.any(actual[1][1][0])


def test_sharded_products_of_bfloat16_accumulate_in_float32():
    hidden, items, targets, weights = make_inputs(CONTRACT_CASES[4])
    inputs = (hidden.astype(jnp.bfloat16), items, targets, weights)
    expected = value_and_gradients(inputs, chunk_size=37)
    actual = value_and_gradients(inputs, chunk_size=37, mesh=make_mesh(data=1, items=2))
    assert [gradient.dtype for gradient in actual[1]] == [jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    for gradient, wanted in zip(actual[1], expected[1], strict=True):
        np.testing.assert_allclose(gradient.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["tokens divided", "items divided"])
def test_a_device_of_a_mesh_needs_far_less_memory_than_its_logits(sizes):
    case = Case(name="memory", tokens=4096, num_items=4001, width=16)
    mesh = make_mesh(data=sizes[0], items=sizes[1])

    def gradient(*inputs):
        return jax.grad(partial(linear_cross_entropy, chunk_size=64, mesh=mesh), argnums=(0, 1))(*inputs)

    assert temporary_bytes(gradient, *make_inputs(case)) < case.tokens * case.num_items * 4 / 16


def test_mixed_precision_rounds_products_to_the_dtype_of_hidden_and_keeps_the_items_gradient_in_float32():
    hidden, items, targets, weights = make_inputs(CONTRACT_CASES[4])
    rounded = (hidden.astype(jnp.bfloat16), items, targets, weights)
    value, gradients = value_and_gradients(rounded, chunk_size=37)
    widened = (rounded[0].astype(jnp.float32), items.astype(jnp.bfloat16).astype(jnp.float32), targets, weights)
    expected, expected_gradients = value_and_gradients(widened, implementation="reference")
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, rtol=1e-2, atol=1e-2)


def test_a_mesh_for_another_implementation_or_with_other_axes_raises_a_user_error():
    inputs = make_inputs(CONTRACT_CASES[0])
    with pytest.raises(UserError, match="expected a mesh for 'sharded' and for it alone"):
        linear_cross_entropy(*inputs, implementation="sharded")
    with pytest.raises(UserError, match="expected a mesh for 'sharded' and for it alone"):
        linear_cross_entropy(*inputs, implementation="xla", mesh=make_mesh(data=1, items=1))
    with pytest.raises(UserError, match="expected 'data' and 'items'"):
        linear_cross_entropy(*inputs, mesh=make_mesh(data=1, rows=1))
    with pytest.raises(UserError, match="num_items is 5; expected 1 to 4"):
        linear_cross_entropy(*inputs, num_items=5)
