"""Contract of topk_dot: every implementation against the specification, the choice among them, and lowering without the hardware."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels import native_build
from cda4rec_jax.kernels.topk_dot import api, native, topk_dot
from cda4rec_jax.kernels.topk_dot.cases import CONTRACT_CASES, Case
from cda4rec_jax.kernels.topk_dot.pallas import topk_dot_pallas
from cda4rec_jax.kernels.topk_dot.quantised import quantise_items, topk_dot_quantised
from tests.kernels.contract import assert_trees_equal, interpreted, needs_cpu, needs_native, temporary_bytes

NEEDS_NATIVE = needs_native(native.native_problem)
ON_CPU = ["xla", pytest.param("native", marks=NEEDS_NATIVE)]
WAYS = ["reference", *ON_CPU, "triton", "tpu"]
SMALL = Case(name="small", num_rows=150, queries=9, width=6, k=12, chunk_size=40)


@functools.partial(jax.jit, static_argnames=("k", "chunk_size", "implementation"))
def found_by(items, queries, k, allowed=None, excluded=None, *, chunk_size=16384, implementation=None):
    options = {"chunk_size": chunk_size, "implementation": implementation, "interpret": interpreted(implementation)}
    return topk_dot(items, queries, k, allowed=allowed, excluded=excluded, **options)


def make_inputs(case: Case, seed: int = 0):
    """Small whole numbers: products are exact in every dtype and order of summation, and ties abound. Padding would win."""
    rng = np.random.default_rng(seed)
    items = rng.integers(-9, 10, (case.num_rows, case.width)).astype(np.float32)
    items[0] = 50.0
    queries = rng.integers(-9, 10, (case.queries, case.width)).astype(np.float32)
    return jnp.asarray(items), jnp.asarray(queries)


def make_filters(case: Case, seed: int = 1, share: float = 0.5, num_excluded: int = 7):
    rng = np.random.default_rng(seed)
    allowed = rng.random(case.num_rows) < share
    excluded = rng.integers(0, case.num_rows, (case.queries, num_excluded)).astype(np.int32)
    return jnp.asarray(allowed), jnp.asarray(excluded)


def sorted_by_hand(items, queries, k, allowed=None, excluded=None):
    scores = np.asarray(queries, np.float64) @ np.asarray(items, np.float64).T
    scores[:, 0] = -np.inf
    if allowed is not None:
        scores[:, ~np.asarray(allowed)] = -np.inf
    for row, gone in zip(scores, () if excluded is None else np.asarray(excluded), strict=excluded is not None):
        row[gone] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    return np.where(best > -np.inf, order, 0), best


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("case", CONTRACT_CASES, ids=lambda case: case.name)
def test_items_scores_and_ties_equal_sorting(case, implementation):
    items, queries = make_inputs(case)
    found, scores = found_by(items, queries, case.k, chunk_size=case.chunk_size, implementation=implementation)
    assert (found.dtype, scores.dtype) == (jnp.int32, jnp.float32)
    assert_trees_equal((found, scores), sorted_by_hand(items, queries, case.k))


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("case", (SMALL, CONTRACT_CASES[5]), ids=lambda case: case.name)
def test_filtered_items_make_room_for_others(case, implementation):
    items, queries = make_inputs(case)
    filters = make_filters(case)
    actual = found_by(items, queries, case.k, *filters, chunk_size=case.chunk_size, implementation=implementation)
    assert_trees_equal(actual, sorted_by_hand(items, queries, case.k, *filters))


@pytest.mark.parametrize("implementation", WAYS)
def test_excluding_the_whole_top_finds_the_next_items(implementation):
    """The excluded items fill the best groups, so that a search which only drops them afterwards comes back short."""
    items, queries = make_inputs(SMALL)
    excluded, _ = sorted_by_hand(items, queries, 60)
    actual = found_by(items, queries, SMALL.k, None, jnp.asarray(excluded, jnp.int32), implementation=implementation)
    assert_trees_equal(actual, sorted_by_hand(items, queries, SMALL.k, None, excluded))


@pytest.mark.parametrize("implementation", WAYS)
def test_where_too_few_items_remain_the_rest_is_item_0_at_minus_infinity(implementation):
    items, queries = make_inputs(SMALL)
    allowed = jnp.zeros(SMALL.num_rows, bool).at[jnp.array([0, 3, 77])].set(True)
    found, scores = found_by(
        items, queries, SMALL.k, allowed, jnp.full((SMALL.queries, 1), 77), chunk_size=40, implementation=implementation
    )
    np.testing.assert_array_equal(found, np.pad(np.full((SMALL.queries, 1), 3), ((0, 0), (0, SMALL.k - 1))))
    assert np.all(np.isfinite(scores[:, 0])) and np.all(np.asarray(scores)[:, 1:] == -np.inf)


@pytest.mark.parametrize("implementation", WAYS)
def test_among_equal_items_the_lower_index_comes_first(implementation):
    found, _ = found_by(jnp.ones((2500, 3)), jnp.ones((9, 3)), 20, chunk_size=700, implementation=implementation)
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(1, 21), (9, 20)))


@pytest.mark.parametrize("implementation", WAYS)
def test_scores_are_within_float32_rounding_of_float64(implementation):
    rng = np.random.default_rng(3)
    items, queries = rng.normal(size=(400, 33)), rng.normal(size=(10, 33))
    found, scores = found_by(
        jnp.asarray(items, jnp.float32), jnp.asarray(queries, jnp.float32), 25, implementation=implementation
    )
    expected, best = sorted_by_hand(items, queries, 25)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, best, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float64_inputs_give_float64_scores(implementation):
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        items, queries = jnp.asarray(rng.normal(size=(90, 5))), jnp.asarray(rng.normal(size=(9, 5)))
        _, scores = found_by(items, queries, 7, chunk_size=40, implementation=implementation)
        assert scores.dtype == jnp.float64
        np.testing.assert_allclose(scores, sorted_by_hand(items, queries, 7)[1], rtol=1e-14)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton", "tpu", None])
def test_bfloat16_inputs_give_float32_scores(implementation):
    items, queries = make_inputs(SMALL)
    narrow = (items.astype(jnp.bfloat16), queries.astype(jnp.bfloat16))
    actual = found_by(*narrow, SMALL.k, implementation=implementation)
    assert actual[1].dtype == jnp.float32
    assert_trees_equal(actual, sorted_by_hand(items, queries, SMALL.k))


@pytest.mark.parametrize("implementation", WAYS)
def test_under_vmap_every_table_is_searched_by_its_own_queries(implementation):
    items, queries = make_inputs(SMALL)
    tables, rows = jnp.stack([items, items[::-1]]), jnp.stack([queries, 2 * queries])
    found, scores = jax.vmap(lambda table, query: found_by(table, query, SMALL.k, implementation=implementation))(tables, rows)
    for place in range(2):
        assert_trees_equal((found[place], scores[place]), sorted_by_hand(tables[place], rows[place], SMALL.k))


@pytest.mark.parametrize("implementation", ON_CPU)
def test_no_query_gives_no_row(implementation):
    found, scores = found_by(jnp.ones((30, 3)), jnp.ones((0, 3)), 4, implementation=implementation)
    assert found.shape == scores.shape == (0, 4)


@pytest.mark.parametrize("implementation", WAYS)
def test_two_runs_agree_bit_for_bit(implementation):
    rng = np.random.default_rng(4)
    items, queries = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5000, 16), (40, 16)))
    assert_trees_equal(*(found_by(items, queries, 50, implementation=implementation) for _ in range(2)))


@NEEDS_NATIVE
def test_native_scores_do_not_depend_on_the_batch():
    """Tiles differ with the number of queries; the order of a score's sum does not."""
    rng = np.random.default_rng(5)
    items, queries = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3000, 16), (70, 16)))
    whole = found_by(items, queries, 30, implementation="native")
    for size in (1, 20, 40):
        part = found_by(items, queries[:size], 30, implementation="native")
        assert_trees_equal(part, jax.tree.map(lambda array, size=size: array[:size], whole))


@NEEDS_NATIVE
@pytest.mark.parametrize("num_queries", (17, 35, 70, 129))
def test_native_pieces_keep_to_their_own_queries(num_queries):
    """Threads share the queries out. All scores are below 0, so what an empty lane of a tile adds to another's query would be found."""
    rng = np.random.default_rng(6)
    items, queries = (jnp.asarray(np.abs(rng.normal(size=shape)), jnp.float32) for shape in ((3000, 16), (num_queries, 16)))
    expected = found_by(items, -queries, 30, implementation="reference")
    for _ in range(5):
        found, scores = found_by(items, -queries, 30, implementation="native")
        np.testing.assert_array_equal(found, expected[0])
        np.testing.assert_allclose(scores, expected[1], rtol=1e-5)


@NEEDS_NATIVE
@pytest.mark.parametrize("rows", (2, 16, 17, 3000))
def test_search_by_codes_equals_native_bit_for_bit(rows):
    rng = np.random.default_rng(6)
    norms = rng.lognormal(size=(rows, 1))
    items, queries = (norms * rng.normal(size=(rows, 19))).astype(np.float32), rng.normal(size=(5, 19)).astype(np.float32)
    k = min(40, rows - 1)
    filters = make_filters(Case(name="codes", num_rows=rows, queries=5, width=19, k=k), share=0.8)
    expected = found_by(items, queries, k, *filters, implementation="native")
    table = quantise_items(items)
    actual = topk_dot_quantised(table, jnp.asarray(queries), k, allowed=filters[0], excluded=filters[1])
    assert_trees_equal(actual, expected)


def make_codes_inputs(rows: int, num_queries: int, width: int):
    """Norms spread, so that errors of codes differ."""
    rng = np.random.default_rng(7)
    items = (rng.lognormal(size=(rows, 1)) * rng.normal(size=(rows, width))).astype(np.float32)
    return items, jnp.asarray(rng.normal(size=(num_queries, width)), jnp.float32)


@NEEDS_NATIVE
@pytest.mark.parametrize(("num_queries", "width"), ((1, 20), (27, 21), (75, 64)))
def test_search_by_codes_in_tiles_equals_native_bit_for_bit(num_queries, width):
    """Whole tiles of queries and a rest; widths that end within a step of the instruction; thresholds guessed from a sample."""
    items, queries = make_codes_inputs(6005, num_queries, width)
    expected = found_by(jnp.asarray(items), queries, 40, implementation="native")
    assert_trees_equal(topk_dot_quantised(quantise_items(items), queries, 40), expected)


@NEEDS_NATIVE
def test_a_wrong_guess_of_the_threshold_costs_no_item():
    """The best items are where the samples are taken from, so the guess is too high for all but a few of those wanted."""
    rows = np.arange(2000)
    in_a_sample = (rows % 133 < 8) | (rows % 992 < 48) | (rows % 272 < 16)  # of scores, and of codes with and without VNNI
    items = ((1.0 + in_a_sample) * np.linspace(1.0, 1.1, len(rows)))[:, None].astype(np.float32)
    expected = found_by(jnp.asarray(items), jnp.ones((1, 1)), 500, implementation="reference")
    for actual in (
        found_by(jnp.asarray(items), jnp.ones((1, 1)), 500, implementation="native"),
        topk_dot_quantised(quantise_items(items), jnp.ones((1, 1)), 500),
    ):
        assert_trees_equal(actual, expected)


@NEEDS_NATIVE
def test_code_for_any_processor_finds_the_same(monkeypatch):
    """Compiled without what is special about this one, and thus by other lines of the sources."""
    flags = [flag for flag in native_build._FLAGS if not flag.startswith(("-march", "-O"))]
    monkeypatch.setattr(native_build, "_FLAGS", (*flags, "-O1"))
    for name, source, symbol in (("_TARGET", native.SOURCE, "TopkDot"), ("_INT8_TARGET", native.INT8_SOURCE, "TopkDotInt8")):
        assert native_build.provide(source, {f"plain{name}": symbol}) is None
        monkeypatch.setattr(native, name, f"plain{name}")
    items, queries = make_codes_inputs(3000, 11, 21)
    filters = make_filters(Case(name="plain", num_rows=3000, queries=11, width=21, k=40))
    expected = found_by(jnp.asarray(items), queries, 40, *filters, implementation="reference")
    plain = native.topk_dot_native(jnp.asarray(items), queries, 40, *filters)
    np.testing.assert_array_equal(plain[0], expected[0])
    np.testing.assert_allclose(plain[1], expected[1], rtol=1e-5, atol=1e-5)
    by_codes = topk_dot_quantised(quantise_items(items), queries, 40, allowed=filters[0], excluded=filters[1])
    assert_trees_equal(by_codes, plain)


@NEEDS_NATIVE
@pytest.mark.parametrize("order", ("rising", "falling", "equal"))
def test_native_is_right_whatever_the_order_of_the_scores(order):
    """Rising scores pass every threshold; equal ones none."""
    scores = {"rising": np.arange(4000), "falling": -np.arange(4000), "equal": np.zeros(4000)}[order]
    items, queries = jnp.asarray(scores[:, None], jnp.float32), jnp.asarray([[1.0], [-1.0], [0.0]])
    actual = found_by(items, queries, 70, implementation="native")
    assert_trees_equal(actual, sorted_by_hand(items, queries, 70))


@pytest.mark.parametrize("implementation", ["xla", "triton", "tpu"])
def test_scores_have_the_gradients_of_the_reference(implementation):
    items, queries = make_inputs(Case(name="gradients", num_rows=330, queries=8, width=3, k=2))

    def gradients(implementation):
        def total(items, queries):
            return jnp.sum(jnp.sin(found_by(items, queries, 2, implementation=implementation)[1]))

        return jax.jit(jax.grad(total, argnums=(0, 1)))(items, queries)

    for actual, expected in zip(gradients(implementation), gradients("reference"), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


@NEEDS_NATIVE
@pytest.mark.parametrize("implementation", [None, "native", "8-bit codes"])
def test_native_has_no_gradients_and_refuses_them(implementation):
    items, queries = make_inputs(SMALL)
    if implementation == "8-bit codes":
        search = functools.partial(topk_dot_quantised, quantise_items(np.asarray(items)))
    else:
        search = functools.partial(topk_dot, items, implementation=implementation)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda queries: jnp.sum(search(queries, k=3)[1]))(queries)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_temporary_memory_does_not_grow_with_the_catalogue(implementation):
    items, queries = jnp.zeros((40_000, 2)), jnp.zeros((32, 2))
    search = functools.partial(topk_dot, k=10, chunk_size=500, implementation=implementation)
    assert temporary_bytes(search, items, queries) < items.shape[0] * queries.shape[0] * 4 / 8


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize(
    ("backend", "platform", "mark"), (("triton", "cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu", "tpu_custom_call"))
)
def test_pallas_kernels_lower_without_the_hardware(backend, platform, mark, dtype):
    items, queries = jnp.zeros((1000, 24), dtype), jnp.zeros((3, 24), dtype)

    def program(items, queries, allowed, excluded):
        return topk_dot_pallas(items, queries, 10, allowed, excluded, backend, interpret=False)

    traced = jax.jit(program).trace(items, queries, jnp.ones(1000, bool), jnp.zeros((3, 2), jnp.int32))
    assert mark in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ("cuda", "tpu"))
@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_accelerators_are_told_not_to_round_the_products(implementation, platform):
    search = functools.partial(topk_dot, k=10, chunk_size=300, implementation=implementation)
    traced = jax.jit(search).trace(jnp.zeros((1000, 24)), jnp.zeros((9, 24)))
    lowered = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
    products = [line for line in lowered if "dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@NEEDS_NATIVE
def test_none_chooses_native_from_eight_float32_queries_on():
    def program(queries, dtype=jnp.float32):
        traced = jax.make_jaxpr(lambda items, queries: topk_dot(items, queries, 3))
        return str(traced(jnp.zeros((20, 2), dtype), jnp.zeros((queries, 2), dtype)))

    assert "ffi_call" in program(8)
    assert "ffi_call" not in program(7)
    assert "ffi_call" not in program(8, jnp.bfloat16)


@needs_cpu
def test_without_a_compiler_none_chooses_xla_and_native_raises(monkeypatch):
    monkeypatch.setattr(api, "native_problem", lambda: "there is no C++ compiler")
    items, queries = make_inputs(SMALL)
    assert "ffi_call" not in str(jax.make_jaxpr(lambda items, queries: topk_dot(items, queries, 3))(items, queries))
    with pytest.raises(UserError, match=r"'native' cannot be had: there is no C\+\+ compiler"):
        topk_dot(items, queries, 3, implementation="native")


def test_what_stands_in_the_way_of_compiling_is_told_and_logged_once(monkeypatch, tmp_path, caplog):
    native_build._told.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    for _ in range(2):
        assert "native.cc of topk_dot cannot be compiled or loaded" in str(native.native_problem.__wrapped__())
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for _ in range(2):
        assert "no C++ compiler" in str(native.native_problem.__wrapped__())
    first, second = caplog.messages
    assert "native.cc of topk_dot cannot be compiled or loaded" in first and "computes by XLA" in first
    assert "no C++ compiler" in second


def test_bad_arguments_raise_a_user_error():
    items, queries = make_inputs(SMALL)
    for k in (0, 150):
        with pytest.raises(UserError, match=f"asked for {k} items of a catalogue of 149"):
            topk_dot(items, queries, k)
    with pytest.raises(UserError, match="chunk_size is 0"):
        topk_dot(items, queries, 3, chunk_size=0)


@needs_cpu
def test_native_refuses_what_it_does_not_compute():
    items, queries = make_inputs(SMALL)
    with pytest.raises(UserError, match="'native' takes float32"):
        topk_dot(items.astype(jnp.bfloat16), queries, 3, implementation="native")


@pytest.mark.parametrize("implementation", [name for name in ("triton", "tpu") if interpreted(name)])
def test_a_kernel_of_another_backend_raises_a_user_error(implementation):
    name = {"triton": "GPU", "tpu": "TPU"}[implementation]
    with pytest.raises(UserError, match=f"runs on a {name}, and JAX is on {jax.default_backend()}"):
        topk_dot(*make_inputs(SMALL), 3, implementation=implementation)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("implementation", (None, *api.IMPLEMENTATIONS, "8-bit codes"))
@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"queries": (9, 5)}, "items have shape (150, 6) and queries (9, 5)"),
        ({"queries": (6,)}, "items have shape (150, 6) and queries (6,)"),
        ({"allowed": (149,)}, "allowed has shape (149,); expected (150,)"),
        ({"excluded": (8, 2)}, "excluded has shape (8, 2); expected [9, s]"),
        ({"excluded": (9,)}, "excluded has shape (9,); expected [9, s]"),
    ),
)
def test_shapes_that_do_not_fit_raise_a_user_error(implementation, changed, message):
    shapes = {"queries": (9, 6), "allowed": (150,), "excluded": (9, 2)} | changed
    queries, allowed = jnp.zeros(shapes["queries"]), jnp.ones(shapes["allowed"], bool)
    excluded = jnp.zeros(shapes["excluded"], jnp.int32)
    with pytest.raises(UserError, match=re.escape(message)):
        if implementation == "8-bit codes":
            table = quantise_items(np.zeros((150, 6), np.float32))
            topk_dot_quantised(table, queries, 3, allowed=allowed, excluded=excluded)
        else:
            items = jnp.zeros((150, 6))
            topk_dot(items, queries, 3, allowed=allowed, excluded=excluded, implementation=implementation)
