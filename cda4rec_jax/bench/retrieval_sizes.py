"""Time and memory of one query by catalogue size, each system at each size in a process of its own, so that memory is its alone."""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.bench.charts import curves
from cda4rec_jax.bench.harness import say
from cda4rec_jax.bench.retrieval_data import hard_item_chunks, hard_items, hard_queries
from cda4rec_jax.bench.retrieval_systems import HNSWLIB, SCANN, WIDTH, IndexSearch, Search, makers, version_of
from cda4rec_jax.bench.systems import System, call_times_ms
from cda4rec_jax.kernels.topk_dot.native import native_problem
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.retrieval import ExactIndex, MappedIndex, ScannIndex, mean_recall
from cda4rec_jax.timing import usable_cores

MAPPED = "ours, mapped"
# Systems by the largest catalogue at which building one takes minutes and not hours on two cores.
MOST_ITEMS = {
    MAPPED: 100_000_000,
    "ours, exact": 10_000_000,
    "ours, quantised": 10_000_000,
    SCANN: 1_000_000,
    "faiss flat": 10_000_000,
    HNSWLIB: 100_000,
}
APPROXIMATE = {SCANN: "", HNSWLIB: "M 16, ef 200"}  # and the setting that is measured; "" is our default
PEERS_OF = {"faiss flat": ("faiss",), HNSWLIB: ("hnswlib",)}
CALLS, MOST_SECONDS = 300, 10.0


@dataclass(frozen=True, kw_only=True)
class SizePoint:
    """One system at one size. Memory is what the process held beyond what it held before; None where the system does not tell.

    Pages of mapped files count as held once they are read.
    """

    system: str
    setting: str
    version: str
    threads: int
    num_items: int
    recall: float
    build_seconds: float
    first_call_seconds: float
    latency: LatencySummary  # of one query
    resident_bytes: int | None  # once built and asked
    own_bytes: int | None  # of it, what is no page of a file, and cannot be taken back
    peak_bytes: int | None  # of the whole process, building included
    file_bytes: int  # on disk; 0 for what lies in memory

    @property
    def label(self) -> str:
        return f"{self.system}, {self.setting}" if self.setting else self.system


@dataclass(frozen=True, kw_only=True)
class SizesFound:
    """All points."""

    k: int
    points: tuple[SizePoint, ...]
    left_out: tuple[str, ...]  # systems at sizes above theirs

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        told = {"width": WIDTH, "k": self.k, "most_items": MOST_ITEMS, "left_out": self.left_out}
        return {**told, "points": [asdict(point) for point in self.points]}

    def print(self, console: Console) -> None:
        """A row for each point."""
        table = Table(
            title=f"One query by catalogue size: width {WIDTH}, k = {self.k}, {usable_cores()} threads",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        table.add_column("system")
        for column in ("items", "recall", "p50 ms", "p95 ms", "p99 ms", "build s", "MB", "own MB", "peak MB", "files MB"):
            table.add_column(column, justify="right")
        for point in self.points:
            latency = (point.latency.p50_ms, point.latency.p95_ms, point.latency.p99_ms)
            memory = (
                "-" if value is None else f"{value / 2**20:,.0f}"
                for value in (point.resident_bytes, point.own_bytes, point.peak_bytes, point.file_bytes)
            )
            table.add_row(
                point.label,
                f"{point.num_items:,}",
                f"{point.recall:.3f}",
                *(f"{value:.2f}" for value in latency),
                f"{point.build_seconds:.1f}",
                *memory,
            )
        console.print(table)
        lines = [
            "MB: resident, beyond that of the process before; own: no page of a file; peak: of the whole process, building included",
            *([f"left out, since building would take too long: {'; '.join(self.left_out)}"] if self.left_out else []),
            f"versions: {', '.join(dict.fromkeys(point.version for point in self.points))}",
        ]
        say(console, lines)

    def chart(self, path: Path) -> bool:
        """Time and memory, both axes logarithmic."""
        time_lines: dict[str, tuple[list[float], list[float]]] = {}
        memory_lines: dict[str, tuple[list[float], list[float]]] = {}
        for point in self.points:
            for lines, value in ((time_lines, point.latency.p50_ms), (memory_lines, point.resident_bytes)):
                if value is not None:
                    x, y = lines.setdefault(point.label, ([], []))
                    x.append(float(point.num_items))
                    y.append(value if lines is time_lines else max(value, 2**20) / 2**20)
        panels = {"one query": time_lines, "resident memory (1 MB at least)": memory_lines}
        ours = [point.label for point in self.points if point.system.startswith("ours")]
        return curves(path, panels, "items", ("p50 ms", "MB"), ours, log_x=True)


def measure_sizes(
    sizes: Sequence[int], k: int, peers: Sequence[str], progress: Callable[[int, int], None] = lambda done, total: None
) -> SizesFound:
    """Every system of ``MOST_ITEMS`` that is here, at every size that it is meant for."""
    here = [*makers(peers), *((MAPPED,) if native_problem() is None else ())]
    all_here = [(name, most, size) for name, most in MOST_ITEMS.items() if name in here for size in sorted(sizes)]
    todo = [(name, size) for name, most, size in all_here if size <= most]
    left_out = tuple(f"{name} at {size:,} items" for name, most, size in all_here if size > most)
    points: list[SizePoint] = []
    for done, (name, size) in enumerate(todo):
        progress(done, len(todo))
        points.append(in_its_own_process(measure_size, name, size, k))
    progress(len(todo), len(todo))
    return SizesFound(k=k, points=tuple(points), left_out=left_out)


def in_its_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a fresh process, which imports everything anew."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_size(system: str, num_items: int, k: int) -> SizePoint:
    """One system at one size, on the generated set."""
    queries = hard_queries(256, WIDTH)
    before, own_before = _memory("VmRSS"), _memory("RssAnon")
    with tempfile.TemporaryDirectory(prefix="cda4rec-bench-") as folder:
        start = time.perf_counter()
        search, package = _built(system, num_items, k, Path(folder))
        build_seconds = time.perf_counter() - start
        file_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        start = time.perf_counter()
        search(queries[:1])
        first_call_seconds = time.perf_counter() - start
        version, rows = version_of(package), [row[None] for row in queries]
        timed = System(name=system, version=version, against=(), run=search, inputs=rows)
        (taken,) = call_times_ms([timed], CALLS, most_seconds=MOST_SECONDS).values()
        resident, own, peak = _memory("VmRSS"), _memory("RssAnon"), _peak()
        return SizePoint(
            system=system,
            setting=APPROXIMATE.get(system, ""),
            version=version,
            threads=usable_cores(),
            num_items=num_items,
            recall=_recall(search, queries[:64], num_items, k) if system in APPROXIMATE else 1.0,
            build_seconds=build_seconds,
            first_call_seconds=first_call_seconds,
            latency=summarise_latency(taken),
            resident_bytes=None if resident is None or before is None else max(0, resident - before),
            own_bytes=None if own is None or own_before is None else max(0, own - own_before),
            peak_bytes=peak,
            file_bytes=file_bytes,
        )


def _recall(search: Search, queries: np.ndarray, num_items: int, k: int) -> float:
    truth, _ = ExactIndex.build(hard_items(num_items, WIDTH)).search(queries, k)
    return mean_recall(search(queries), truth)


def _built(system: str, num_items: int, k: int, folder: Path) -> tuple[Search, str | None]:
    chunks = hard_item_chunks(num_items, WIDTH)
    if system == MAPPED:
        return IndexSearch(MappedIndex.build_streamed(chunks, folder), k), None
    items = _in_memory(chunks, num_items)
    if system == SCANN:
        return IndexSearch(ScannIndex.build(items), k), None
    package, make = makers(tuple(PEERS_OF.get(system, ())))[system]
    return make(items, k, usable_cores())[APPROXIMATE.get(system, "")], package


def _in_memory(chunks: Iterator[np.ndarray], num_items: int) -> np.ndarray:
    """In one table, without a second copy of it."""
    items, filled = np.empty((num_items + 1, WIDTH), np.float32), 0
    for chunk in chunks:
        items[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return items


def _memory(field: str) -> int | None:
    """Of this process: ``VmRSS`` is resident now, ``RssAnon`` of it no page of a file, ``VmHWM`` was resident at most. None off Linux."""
    file = Path("/proc/self/status")
    lines = file.read_text(encoding="ascii").splitlines() if file.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _peak() -> int | None:
    """The most that was resident at a time; from the parent's on, where only getrusage tells."""
    own = _memory("VmHWM")
    if own is not None:
        return own
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
