"""Every implementation that runs here, and what one would use instead; see ``kernels.workloads``."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from cda4rec_jax.kernels.topk_dot import topk_dot
from cda4rec_jax.kernels.topk_dot.api import Implementation
from cda4rec_jax.kernels.topk_dot.cases import ACCELERATOR_CASES, WORKLOAD_CASES, Case
from cda4rec_jax.kernels.topk_dot.native import native_problem
from cda4rec_jax.kernels.topk_dot.quantised import quantise_items, topk_dot_quantised
from cda4rec_jax.kernels.workloads import PLAIN, DevicePeer, Workload
from cda4rec_jax.timing import usable_cores

NUM_BATCHES = 8  # of queries, which take turns; the items of a big catalogue do not fit into a cache either
MOST_OTHER_ITEMS = {
    "float32": 1e-4,
    "bfloat16": 0.02,
}  # share: sums in another order may swap neighbours, and in 16 bits many are near
EXACT_PEERS = ("numpy", "torch", "faiss flat")
NARROW = "torch, scores in 16 bits"  # rounded to 8 bits, so that many tie at the end of the list, and others are found
MOST_OTHERS_OF_NARROW = 0.15
Search = Callable[[Float[np.ndarray, "b d"]], Int[np.ndarray, "b k"]]


def plain_search(items: Float[Array, "i d"], queries: Float[Array, "b d"], *, k: int) -> tuple[Array, Array]:
    """What one would write: all scores, and their top k. Row 0 is never found."""
    scores = jnp.matmul(queries, items.T, preferred_element_type=jnp.float32).at[:, 0].set(-jnp.inf)
    best, found = jax.lax.top_k(scores, k)
    return found, best


def exact_peers(items: Float[np.ndarray, "i d"], k: int, threads: int, names: Sequence[str] = EXACT_PEERS) -> dict[str, Search]:
    """Exact searches of others, as far as they are installed, over rows 1 to i - 1: of NumPy queries to NumPy item indices.

    For torch see ``torch_device``.
    """

    def by_partition(queries: np.ndarray) -> np.ndarray:
        scores = queries @ items[1:].T
        found = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, found, axis=1), axis=1)
        return 1 + np.take_along_axis(found, order, axis=1)

    found: dict[str, Search] = {"numpy": by_partition} if "numpy" in names else {}
    if "torch" in names and importlib.util.find_spec("torch") is not None:
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        device = torch_device()
        transposed = torch.from_numpy(items[1:]).to(device).T
        found["torch"] = lambda queries: (
            1 + torch.topk(torch.from_numpy(queries).to(device) @ transposed, k).indices.cpu().numpy()  # which waits
        )
    if "faiss flat" in names and importlib.util.find_spec("faiss") is not None:
        import faiss  # pyright: ignore[reportMissingImports]

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatIP(items.shape[1])
        index.add(items[1:])
        found["faiss flat"] = lambda queries: 1 + index.search(queries, k)[1]
    return found


def torch_device() -> str:
    """Where torch, which is installed, searches: on the GPU where JAX does, if it can."""
    import torch  # pyright: ignore[reportMissingImports]

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def torch_on_gpu(
    items: np.ndarray, queries: Sequence[np.ndarray], k: int, dtype: str
) -> tuple[dict[str, DevicePeer], str | None]:
    """Torch's exact search with operands of ``dtype``, and what stands in its way.

    Scores of 16-bit operands are had in float32, as ours are, and in 16 bits, which is what one would write.
    """
    if importlib.util.find_spec("torch") is None:
        return {}, "not installed"
    import torch  # pyright: ignore[reportMissingImports]

    if not torch.cuda.is_available():
        return {}, "sees no GPU"
    operands = getattr(torch, dtype)
    transposed = torch.from_numpy(items[1:]).to("cuda", operands).T
    batches = [torch.from_numpy(rows).to("cuda", operands) for rows in queries]
    wide = {} if dtype == "float32" else {"out_dtype": torch.float32}

    def peer(tolerance: float | None = None, **options: Any) -> DevicePeer:
        return DevicePeer(
            start=lambda number: torch.topk(torch.mm(batches[number % len(batches)], transposed, **options), k),
            wait=torch.cuda.synchronize,
            result=lambda found: (1 + found.indices.cpu().numpy(), found.values.float().cpu().numpy()),
            tolerance=tolerance,
        )

    narrow = {} if dtype == "float32" else {NARROW: peer(MOST_OTHERS_OF_NARROW)}
    return {"torch": peer(**wide)} | narrow, None


def workloads(backend: str) -> Iterator[Workload]:
    """Of the catalogues that we have on a CPU, and of a large one in 16 bits elsewhere."""
    for case in WORKLOAD_CASES if backend == "cpu" else ACCELERATOR_CASES:
        yield workload(case, backend)


def workload(case: Case, backend: str) -> Workload:
    """One case with the implementations of a backend."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(case.num_rows, case.width)).astype(np.float32)
    queries = [rng.normal(size=(case.queries, case.width)).astype(np.float32) for _ in range(NUM_BATCHES)]
    table = jnp.asarray(items, case.dtype)
    programs: dict[str, Callable[..., Any]] = {PLAIN: partial(plain_search, k=case.k)}
    names: tuple[Implementation | None, ...] = (None, "xla", *_special(backend))
    for name in names:
        programs[name or "topk_dot"] = partial(topk_dot, k=case.k, implementation=name)
    peers: Mapping[str, Callable[..., Any]] = {}
    device_peers: Mapping[str, DevicePeer] = {}
    left_out: dict[str, str] = {}
    if backend == "gpu":
        device_peers, problem = torch_on_gpu(items, queries, case.k, case.dtype)
        left_out = {} if problem is None else {"torch": problem}
    if backend == "cpu":
        peers = {name: _with_scores(search) for name, search in exact_peers(items, case.k, usable_cores()).items()}
        left_out = {name: "not installed" for name in EXACT_PEERS if name not in peers}
        if native_problem() is None:
            codes = quantise_items(items)
            programs["8-bit codes"] = lambda _, rows: topk_dot_quantised(codes, rows, case.k)
    return Workload(
        kernel="topk_dot",
        name=case.name,
        shapes=f"{case.num_rows - 1:,} x {case.width}, {case.queries} queries, k = {case.k}, {case.dtype}",
        constants=(table,),
        batches=[(jnp.asarray(rows, case.dtype),) for rows in queries],
        programs=programs,
        peers=peers,
        device_peers=device_peers,
        left_out=left_out,
        flops=2.0 * case.num_rows * case.width * case.queries,
        bytes_moved=table.nbytes + case.queries * (case.width * table.dtype.itemsize + 8.0 * case.k),
        dtype=case.dtype,
        difference=_share_of_other_items,
        tolerance=MOST_OTHER_ITEMS[case.dtype],
    )


def _special(backend: str) -> tuple[Implementation, ...]:
    if backend == "cpu":
        return ("native",) if native_problem() is None else ()
    return ("triton",) if backend == "gpu" else ("tpu",)


def _with_scores(search: Search) -> Callable[..., Any]:
    """In the form of ``topk_dot``; peers give their scores too, of which nothing is said here."""
    return lambda rows: (search(rows), None)


def _share_of_other_items(found: Any, expected: Any) -> float:
    return float(
        np.mean([np.isin(a, b, invert=True).mean() for a, b in zip(np.asarray(found[0]), np.asarray(expected[0]), strict=True)])
    )
