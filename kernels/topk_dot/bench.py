"""Every implementation that runs here, and what one would use instead: ``python -m cda4rec_jax.kernels.topk_dot.bench``.

By the method of ``cda4rec_jax.timing``: peers get as many threads as JAX, and must find the same items. An exclamation mark stands behind
a null that is outside of .95 to 1.05 after three attempts: the machine was too busy, run again.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cda4rec_jax.kernels.topk_dot import topk_dot
from cda4rec_jax.kernels.topk_dot.cases import WORKLOAD_CASES, Case
from cda4rec_jax.kernels.topk_dot.native import native_problem
from cda4rec_jax.kernels.topk_dot.quantised import quantise_items, topk_dot_quantised
from cda4rec_jax.timing import Contestant, measure, usable_cores

NUM_BATCHES = 8  # of queries, which take turns; the items of a big catalogue do not fit into a cache either
LEAST_AGREEMENT = 0.9999  # of found items: sums in another order may swap neighbours
EXACT_PEERS = ("numpy", "torch", "faiss flat")
THREADS = usable_cores()
Search = Callable[[np.ndarray], np.ndarray]


def systems(case: Case, items: np.ndarray) -> dict[str, Search]:
    """Searches that return found rows as NumPy arrays; row 0 of ``items`` is a vector like any other, but never found by ours."""
    table = jnp.asarray(items)

    def compiled(function: Callable) -> Search:
        program = jax.jit(function)
        return lambda queries: np.asarray(jax.block_until_ready(program(table, jnp.asarray(queries)))[0])

    names = (None, "xla") + (("native",) if native_problem() is None else ())
    found = {name or "topk_dot": compiled(partial(topk_dot, k=case.k, implementation=name)) for name in names}
    if native_problem() is None:
        codes = quantise_items(items)
        search = jax.jit(partial(topk_dot_quantised, k=case.k))
        found["8-bit codes"] = lambda queries: np.asarray(jax.block_until_ready(search(codes, jnp.asarray(queries)))[0])
    return found | {"plain jax": compiled(partial(plain_search, k=case.k))} | exact_peers(items, case.k, THREADS)


def plain_search(items: jax.Array, queries: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    """What one would write: all scores, and their top k. Row 0 is never found."""
    scores, found = jax.lax.top_k((queries @ items.T).at[:, 0].set(-jnp.inf), k)
    return found, scores


def exact_peers(items: np.ndarray, k: int, threads: int, names: Sequence[str] = EXACT_PEERS) -> dict[str, Search]:
    """Exact searches of others, as far as they are installed, over rows 1 to i - 1: of NumPy queries to NumPy item indices."""

    def by_partition(queries: np.ndarray) -> np.ndarray:
        scores = queries @ items[1:].T
        found = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, found, axis=1), axis=1)
        return 1 + np.take_along_axis(found, order, axis=1)

    found: dict[str, Search] = {"numpy": by_partition} if "numpy" in names else {}
    if "torch" in names and importlib.util.find_spec("torch") is not None:
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        transposed = torch.from_numpy(items[1:]).T
        found["torch"] = lambda queries: 1 + torch.topk(torch.from_numpy(queries) @ transposed, k).indices.numpy()
    if "faiss flat" in names and importlib.util.find_spec("faiss") is not None:
        import faiss  # pyright: ignore[reportMissingImports]

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatIP(items.shape[1])
        index.add(items[1:])
        found["faiss flat"] = lambda queries: 1 + index.search(queries, k)[1]
    return found


def contestant(name: str, search: Search, batches: list[np.ndarray]) -> Contestant:
    """One call is one batch of queries."""

    def call(number: int) -> float:
        search(batches[number % len(batches)])
        return 1.0

    return Contestant(name=name, call=call)


def measured(case: Case) -> list[str]:
    """The lines of a table."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(case.num_rows, case.width)).astype(np.float32)
    batches = [rng.normal(size=(case.queries, case.width)).astype(np.float32) for _ in range(NUM_BATCHES)]
    searches = systems(case, items)
    expected = searches["plain jax"](batches[0])
    for name, search in searches.items():
        agreement = (np.sort(search(batches[0])) == np.sort(expected)).mean()
        assert agreement >= LEAST_AGREEMENT, f"{name} finds {agreement:.4%} of the items of plain jax"
    contestants = [contestant(name, search, batches) for name, search in searches.items()]
    ours = [name for name in ("topk_dot", "8-bit codes") if name in searches]
    found = measure(contestants, [(name, other) for name in ours for other in searches if other not in ours])
    null = ", ".join(f"{name} {value:.3f}" for name, value in found.nulls.items()) + ("" if found.accepted else "!")
    lines = [f"\n{case.name}: {case.num_rows - 1:,} x {case.width}, {case.queries} queries, k = {case.k}; null: {null}"]
    lines.extend(f"{name:12} {1e3 / rate.median:9.3f} ms" for name, rate in found.rates.items())
    for comparison in found.comparisons:
        ratio = comparison.ratio
        lines.append(
            f"{comparison.name} is {ratio.median:.2f} [{ratio.p10:.2f}, {ratio.p90:.2f}] times as fast as {comparison.other}"
        )
    return lines


def main() -> None:
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, {THREADS} threads, float32, numpy to numpy")
    for case in WORKLOAD_CASES:
        print("\n".join(measured(case)), flush=True)


if __name__ == "__main__":
    main()
