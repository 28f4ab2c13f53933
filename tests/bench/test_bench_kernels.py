"""``cda4rec bench kernels``: what it measures, what it writes, and what it refuses."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.bench import kernels
from cda4rec_jax.bench.kernels import in_a_loop
from cda4rec_jax.cli import main
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.linear_cross_entropy import bench as loss_bench
from cda4rec_jax.kernels.linear_cross_entropy.cases import Case as LossCase
from cda4rec_jax.kernels.rank_candidates import bench as ranking_bench
from cda4rec_jax.kernels.rank_candidates.cases import SMALL_CASE
from cda4rec_jax.kernels.segment_attention import bench as attention_bench
from cda4rec_jax.kernels.segment_attention.cases import Case as AttentionCase
from cda4rec_jax.kernels.topk_dot import bench as search_bench
from cda4rec_jax.kernels.topk_dot.cases import Case as SearchCase
from cda4rec_jax.kernels.workloads import PLAIN, Workload
from cda4rec_jax.timing import TimingConfig

FEW_ROUNDS = TimingConfig(rounds=3, block_seconds=1e-6, warm_up_turns=2, attempts=1)
SEARCH = SearchCase(name="search", num_rows=200, queries=9, width=8, k=5)
LOSS = LossCase(name="loss", tokens=16, num_items=30, width=8)
ATTENTION = AttentionCase(name="rows", rows=2, length=16, heads=2, kv_heads=1, head_size=4, longest=5)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small workload of each kernel, few input batches and small ceilings."""
    monkeypatch.setattr(attention_bench, "INPUT_BYTES", 1)
    monkeypatch.setattr(kernels, "CPU_CEILING", (1 << 12, 8))
    monkeypatch.setattr(kernels, "CALLS", 3)
    monkeypatch.setattr(search_bench, "EXACT_PEERS", ("numpy",))
    made = {
        "topk_dot": lambda backend: iter([search_bench.workload(SEARCH, backend)]),
        "segment_attention": lambda backend: (attention_bench.workload(ATTENTION, rate, backend) for rate in (0.0, 0.5)),
        "linear_cross_entropy": lambda backend: iter([loss_bench.workload(LOSS, backend)]),
        "rank_candidates": lambda backend: iter([ranking_bench.workload(SMALL_CASE, backend)]),
    }
    assert set(made) == set(kernels.KERNELS)
    monkeypatch.setattr(kernels, "KERNELS", made)
    few = lambda rounds, block_seconds: dataclasses.replace(FEW_ROUNDS, rounds=rounds)  # noqa: E731
    monkeypatch.setattr("cda4rec_jax.timing.TimingConfig", few)


def test_the_command_measures_every_implementation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--rounds", "3", "--out", str(tmp_path)]) == 0
    assert "copy rate" in capsys.readouterr().out
    found = json.loads((tmp_path / "kernels-cpu.json").read_text())
    rates = found["ceilings"]["flops_per_second"]
    assert set(rates) == {"float32", "bfloat16"} and found["ceilings"]["copy_bytes_per_second"] > 0
    assert [one["kernel"] for one in found["workloads"]] == [
        "topk_dot",
        "segment_attention",
        "segment_attention",
        "linear_cross_entropy",
        "rank_candidates",
    ]
    assert all(not one["left_out"] for one in found["workloads"])
    for one in found["workloads"]:
        rows = {row["implementation"]: row for row in one["rows"]}
        assert rows[PLAIN]["times_as_fast"]["median"] == 1.0 and one["kernel"] in rows
        for name, row in rows.items():
            assert row["threads"] > 0 and row["version"] and 0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
            assert row["copy_share"] > 0 and row["matmul_share"] > 0 and row["latency"]["p99_ms"] > 0
            assert row["first_call_seconds"] > 0 and row["difference"] >= 0
            assert (row["temporary_bytes"] is None) == (row["compile_seconds"] is None) == (name == "numpy")
    search = {row["implementation"]: row for row in found["workloads"][0]["rows"]}
    assert {"numpy", "xla"} < set(search)
    expected = 2.0 * 200 * 8 * 9 / (search["xla"]["ms"]["median"] / 1e3) / rates["float32"]
    assert search["xla"]["matmul_share"] == pytest.approx(expected)


class StandInTensor:
    """As much of a torch tensor as a search needs; every array that was moved to the GPU, and every product, is noted."""

    log: ClassVar[list[str]] = []

    def __init__(self, array: np.ndarray):
        self.array = array

    def to(self, device: str, dtype: Any = None) -> "StandInTensor":
        self.log.append(f"to {device}")
        return StandInTensor(self.array if dtype is None else self.array.astype(dtype))

    T = property(lambda self: StandInTensor(self.array.T))
    float = cpu = lambda self: self

    def __matmul__(self, other: "StandInTensor") -> "StandInTensor":
        return StandInTensor(self.array @ other.array)

    def numpy(self) -> np.ndarray:
        return np.asarray(self.array, np.float32) if self.array.dtype == jnp.bfloat16 else self.array


@pytest.fixture
def stand_in_torch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Torch with a GPU: a product waits for nothing, as it would, so that only ``synchronize`` ends a turn."""

    def mm(rows: StandInTensor, table: StandInTensor, out_dtype: Any = jnp.bfloat16) -> StandInTensor:
        StandInTensor.log.append("product")
        return StandInTensor((rows.array.astype(np.float32) @ table.array.astype(np.float32)).astype(out_dtype))

    def topk(scores: StandInTensor, k: int) -> SimpleNamespace:
        found = np.argsort(-scores.array.astype(np.float32), axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores.array, found, axis=1)
        return SimpleNamespace(indices=StandInTensor(found), values=StandInTensor(best))

    waits = lambda: StandInTensor.log.append("wait")  # noqa: E731
    dtypes = {"float32": np.float32, "bfloat16": jnp.bfloat16}
    cuda = SimpleNamespace(is_available=lambda: True, synchronize=waits)
    functions = {"from_numpy": StandInTensor, "mm": mm, "topk": topk, "set_num_threads": lambda count: None}
    module = SimpleNamespace(cuda=cuda, **functions, **dtypes)
    StandInTensor.log.clear()
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setattr(search_bench.importlib.util, "find_spec", lambda package: object())
    monkeypatch.setattr(kernels, "version_of", lambda package: f"{package} stand-in")
    return module


def test_torch_is_a_peer_on_a_gpu_and_every_turn_waits_for_its_products(stand_in_torch: SimpleNamespace) -> None:
    case = dataclasses.replace(SEARCH, dtype="bfloat16")
    workload = search_bench.workload(case, "gpu")
    assert set(workload.device_peers) == {"torch", search_bench.NARROW} and not workload.left_out
    differences = kernels._require_equal_outputs(dataclasses.replace(workload, programs={PLAIN: workload.programs[PLAIN]}))
    assert differences["torch"] <= search_bench.MOST_OTHER_ITEMS["bfloat16"]
    moved = StandInTensor.log.count("to cuda")
    StandInTensor.log.clear()
    ready = kernels._device_peer("torch", workload.device_peers["torch"])
    assert (ready.version, ready.calls_per_run, moved) == ("torch stand-in", kernels.LOOPS, 1 + search_bench.NUM_BATCHES)
    assert StandInTensor.log == ["product", "wait"], "the first call"
    assert ready.call(3) == kernels.LOOPS
    assert StandInTensor.log == ["product", "wait", *["product"] * kernels.LOOPS, "wait"], "inputs stay on the GPU"


@pytest.mark.usefixtures("stand_in_torch")
def test_every_program_of_ours_takes_turns_with_torch_on_a_gpu() -> None:
    workload = search_bench.workload(dataclasses.replace(SEARCH, dtype="bfloat16"), "gpu")
    few = dataclasses.replace(workload, programs={name: workload.programs[name] for name in (PLAIN, "topk_dot")})
    ceilings = kernels.Ceilings(copy_bytes_per_second=1.0, flops_per_second={"bfloat16": 1.0})
    found = kernels.measure_workload(few, "gpu", ceilings, FEW_ROUNDS, lambda done, total: None)
    assert {row.implementation for row in found.rows} == {PLAIN, "topk_dot", "torch", search_bench.NARROW}
    assert all(found.measurement.ratio("topk_dot", peer).median > 0 for peer in ("torch", search_bench.NARROW))
    assert all(row.latency.count > 0 and row.version for row in found.rows)


def test_bench_retrieval_searches_by_torch_where_jax_does(
    stand_in_torch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for backend, moved in (("cpu", "cpu"), ("gpu", "cuda")):
        monkeypatch.setattr(search_bench.jax, "default_backend", lambda backend=backend: backend)
        StandInTensor.log.clear()
        search = search_bench.exact_peers(items, 3, 1, ("torch",))["torch"]
        np.testing.assert_array_equal(search(items[7:8])[0], 1 + np.argsort(-(items[1:] @ items[7]))[:3])
        assert set(StandInTensor.log) == {f"to {moved}"} and search_bench.torch_device() == moved
    stand_in_torch.cuda.is_available = lambda: False
    assert search_bench.torch_device() == "cpu"


@pytest.mark.usefixtures("stand_in_torch")
def test_a_peer_on_a_gpu_with_other_items_is_refused() -> None:
    workload = search_bench.workload(dataclasses.replace(SEARCH, dtype="bfloat16"), "gpu")
    shifted = dataclasses.replace(workload.device_peers["torch"], result=lambda found: (2 + found.indices.numpy(), None))
    wrong = dataclasses.replace(workload, programs={PLAIN: workload.programs[PLAIN]}, device_peers={"torch": shifted})
    with pytest.raises(UserError, match=r"'torch' is .* off 'plain jax'"):
        kernels._require_equal_outputs(wrong)


def test_a_gpu_without_torch_is_told(stand_in_torch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_torch.cuda.is_available = lambda: False
    assert search_bench.workload(SEARCH, "gpu").left_out == {"torch": "sees no GPU"}
    monkeypatch.setattr(search_bench.importlib.util, "find_spec", lambda package: None)
    assert search_bench.workload(SEARCH, "gpu").left_out == {"torch": "not installed"}


def test_a_loop_on_the_device_gives_the_output_of_its_last_call() -> None:
    table, batches = jnp.arange(12.0).reshape(4, 3), [(jnp.full((2, 3), value),) for value in (1.0, 2.0, 5.0)]
    stacked = (jnp.stack([batch[0] for batch in batches]),)
    run = jax.jit(lambda first, count: in_a_loop(lambda table, rows: {"scores": rows @ table.T}, (table,), stacked, first, count))
    for first, count, last in ((0, 1, 0), (0, 3, 2), (1, 3, 0), (2, 5, 0)):
        np.testing.assert_array_equal(run(first, count)["scores"], batches[last][0] @ table.T)


def test_pairs_of_tokens_are_counted_by_hand() -> None:
    assert attention_bench._reads(np.array([[1, 1, 1, 2, 0], [1, 2, 2, 0, 0]])) == (1 + 2 + 3 + 1) + (1 + 1 + 2)


def test_a_catalogue_too_large_for_plain_jax_is_held_to_the_chunked_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_bench, "MOST_PLAIN_LOGITS", 100)
    found = loss_bench.workload(LOSS, "gpu")
    assert found.baseline == "xla" and PLAIN not in found.programs


def test_products_of_a_full_pass_are_counted_by_hand() -> None:
    """One layer of width 4 with 2 heads of 2 channels over 3 tokens; 5 candidates with 4 features, of which 2 moderate."""
    case = dataclasses.replace(SMALL_CASE, layers=1, width=4, kv_heads=1, mlp_hidden=6, tokens=3, head_hidden=8)
    keys_and_values, query_and_out, attention, mlp = 3 * 4 * 4, 4 * 4 + 4 * 4, 2 * 3 * 4, 3 * 4 * 6
    head = 5 * (4 + 4 + (2 * 4 + 2) + (4 * 8 + 8))
    assert ranking_bench._flops(case) == 2.0 * (keys_and_values + query_and_out + attention + mlp + head)


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(backend: str):
        yield loss_bench.workload(LOSS, backend)
        raise RuntimeError("out of memory")

    monkeypatch.setitem(kernels.KERNELS, "linear_cross_entropy", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        kernels.bench_kernels(only=("topk_dot", "linear_cross_entropy"), timing=FEW_ROUNDS, out=tmp_path)
    found = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert [one["kernel"] for one in found["workloads"]] == ["topk_dot", "linear_cross_entropy"]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_all_products_of_float32_are_full_on_accelerators(dtype: str) -> None:
    case = dataclasses.replace(SEARCH, dtype=dtype)
    workload = search_bench.workload(case, "tpu")
    with kernels.in_full(dtype):
        traced = jax.jit(workload.programs[PLAIN]).trace(*workload.constants, *workload.batches[0])
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("precision = [HIGHEST, HIGHEST]" in lowered) == (dtype == "float32")


def test_another_output_and_an_unknown_kernel_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(backend: str):
        right: Workload = loss_bench.workload(LOSS, backend)
        doubled = lambda *given: jax.tree.map(lambda x: 2 * x, right.programs[PLAIN](*given))  # noqa: E731
        yield dataclasses.replace(right, programs={**right.programs, "doubled": doubled})

    monkeypatch.setitem(kernels.KERNELS, "linear_cross_entropy", wrong)
    for only, message in (("linear_cross_entropy", "'doubled' is 1.0e+00 off 'plain jax'"), ("softmax", "choose from topk_dot")):
        assert main(["bench", "kernels", "--only", only, "--rounds", "3", "--out", str(tmp_path)]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert message in error and "Traceback" not in error
    assert not list(tmp_path.glob("*.json"))
