"""``cda4rec bench request``: how long one warm request takes, where its time goes, and what lies around the device's kernels."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.bench.harness import OtherLoad, check_folder, measurement_json, method_lines, say, times, write_json
from cda4rec_jax.bench.request_chart import waterfall_chart
from cda4rec_jax.bench.request_device import EMPTY, KERNELS, PATH, DevicePath, device_path
from cda4rec_jax.bench.request_systems import (
    BRANCH_MS,
    CONCURRENT,
    HEAVIEST,
    LOCAL,
    SEQUENTIAL,
    SLATE,
    Waterfall,
    branch_contestants,
    devices_of,
    request_systems,
    waterfall_of,
)
from cda4rec_jax.bench.systems import System, call_times_ms, calls_of, first_calls, measure_calls, percentile_cells, systems_json
from cda4rec_jax.errors import UserError
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.runs import provenance
from cda4rec_jax.runs.artifacts import load_trained
from cda4rec_jax.runtime.recommend import Recommender
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, measure, usable_cores

PAPER_MS = 100.0  # "under 100 ms per request" (arXiv 2509.01551; its own models, data and machines)
TARGET_P50_MS, TARGET_P99_MS, TARGET_SPEEDUP, TARGET_PATH = 10.0, 25.0, 1.7, 1.3
PATH_PLANS = ("fresh-full-100-device", "fresh-full-500-device")
BRANCH_DEVICES = 4


@dataclass(frozen=True, kw_only=True)
class PathFound:
    """The device's part of a request, and its kernels."""

    path: DevicePath
    latency: dict[str, LatencySummary]  # of single calls
    measurement: Measurement
    others: OtherLoad

    @property
    def ratio_without_dispatch(self) -> float:
        """The path's p50 over that of its kernels, of which an empty program was taken off for each."""
        path_ms, kernels_ms, empty_ms = (self.latency[name].p50_ms for name in (PATH, KERNELS, EMPTY))
        return path_ms / (kernels_ms - len(self.path.kernels) * empty_ms)

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "candidates": self.path.candidates,
            "tokens": self.path.tokens,
            "systems": systems_json(self.path.systems, self.latency, usable_cores()),
            "path_over_kernels": asdict(self.measurement.ratio(KERNELS, PATH)),
            "path_over_kernels_without_dispatch": self.ratio_without_dispatch,
            "measurement": measurement_json(self.measurement, self.others),
        }

    def print(self, console: Console) -> None:
        """Print as a table."""
        say(console, [f"\nThe device's part of one request: {self.path.tokens} tokens, {self.path.candidates} candidates"])
        console.print(_path_table(self))
        lines = [
            f"path over kernels: {times(self.measurement.ratio(KERNELS, PATH))} (aim: at most {TARGET_PATH}); where {EMPTY!r} is taken "
            f"off each kernel: {self.ratio_without_dispatch:.2f}",
            first_calls(self.path.systems),
            *method_lines(self.measurement, usable_cores(), self.others),
        ]
        say(console, lines)


@dataclass(frozen=True, kw_only=True)
class RequestBenchmark:
    """All that was found."""

    dataset: str
    num_items: int
    index: str
    users: int
    systems: tuple[System, ...]
    latency: dict[str, LatencySummary]  # of single requests
    waterfalls: tuple[Waterfall, ...]
    branches: Measurement
    branch_latency: dict[str, LatencySummary]  # of single requests, in the rounds
    others: OtherLoad
    paths: tuple[PathFound, ...]
    provenance: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "benchmark": "request",
            "dataset": self.dataset,
            "num_items": self.num_items,
            "index": self.index,
            "users": self.users,
            "slate": SLATE,
            "threads": usable_cores(),
            "targets": {
                "p50_ms": TARGET_P50_MS,
                "p99_ms": TARGET_P99_MS,
                "one_after_the_other_over_side_by_side": TARGET_SPEEDUP,
                "path_over_kernels": TARGET_PATH,
            },
            "paper_ms": PAPER_MS,
            "requests": systems_json(self.systems, self.latency, usable_cores()),
            "branches": {
                "each_ms": BRANCH_MS,
                "threads": usable_cores(),
                "version": f"jax {jax.__version__}",
                "latency": {name: asdict(latency) for name, latency in self.branch_latency.items()},
                "measurement": measurement_json(self.branches, self.others),
            },
            "device_path": [one.json() for one in self.paths],
            "waterfalls": [_waterfall_json(one) for one in self.waterfalls],
            "provenance": self.provenance,
        }

    def print(self, console: Console) -> None:
        """Tables of requests, of where the time of one goes, and of the device's part."""
        title = f"One warm request on {self.dataset}: {self.num_items:,} items, {self.index} index, {self.users} users in turn"
        say(console, [title])
        console.print(_request_table(self))
        branches = {name: 1e3 / self.branches.rates[name].median for name in (SEQUENTIAL, CONCURRENT)}
        lines = [
            "planning, release through the gate, wire codec, cloud, ranking on the device; cloud and device in one process, no link delay; "
            "the device's history, kept embedding and candidates are at hand",
            first_calls(self.systems),
            f"both branches made {BRANCH_MS:.0f} ms: {SEQUENTIAL} {branches[SEQUENTIAL]:.1f} ms, {CONCURRENT} "
            f"{branches[CONCURRENT]:.1f} ms, {times(self.branches.ratio(CONCURRENT, SEQUENTIAL))} times as fast (aim {TARGET_SPEEDUP})",
            *method_lines(self.branches, usable_cores(), self.others),
        ]
        say(console, lines)
        for waterfall in self.waterfalls:
            say(console, [f"\n{waterfall.title}: {waterfall.plan}, slate after {waterfall.latency_ms:.2f} ms"])
            console.print(_waterfall_table(waterfall))
        meaning = (
            "times since the request began, of the request with the median latency; link times are the model's, as estimated; what lies "
            "between the parts is wire codec, threads and Python"
        )
        say(console, [meaning])
        for found in self.paths:
            found.print(console)
        meaning = (
            "device path: structured modelling, features, head and top-k as the runtime runs them, from history and candidates as they "
            "came over the wire to the slate, NumPy to NumPy; its kernels: each program by itself, over arrays that are in place, "
            f"one after the other. Aim: the path takes at most {TARGET_PATH} times as long as its kernels"
        )
        say(console, [meaning])


def bench_request(
    run: Path,
    *,
    requests: int = 300,
    users: int = 64,
    timing: TimingConfig,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> RequestBenchmark:
    """Measure, and write JSON and (where matplotlib is installed) a chart into ``out``.

    Args:
        run: a finished joint run.
        requests: timed requests of each plan, and calls of the device's part.
        users: users who take turns.
        timing: how much to measure.
        out: folder of the results.
        progress: hears of the stage, and how much of it is done.

    Raises:
        UserError: bad run, number or folder; a request that ended in another plan than it was asked for.
    """
    if requests < 1 or users < 1:
        raise UserError(f"got {requests} requests of {users} users: expected at least 1 of each")
    trained = load_trained(run)
    folder = check_folder(out)
    interactions = trained.corpus.interactions
    with Recommender(trained) as recommender, ExitStack() as stack:
        progress("first requests", 0, 1)
        devices = devices_of(recommender, users, stack)
        systems = request_systems(recommender, devices)
        progress("first requests", 1, 1)
        contestants = branch_contestants(recommender, devices[:BRANCH_DEVICES], stack)
        progress("warm requests", 0, 1)
        with OtherLoad() as others:
            latency = _latency(systems, requests)
            waterfalls = tuple(
                waterfall_of(recommender, devices, title, plan, requests, with_link=with_link)
                for title, plan, with_link in _WATERFALLS
            )
            progress("warm requests", 1, 1)
            branches, branch_latency = measure_calls(
                contestants, [(CONCURRENT, SEQUENTIAL)], timing, progress=lambda *done: progress("two branches", *done)
            )
        paths = [_path_found(device_path(recommender, trained, devices, plan), requests, timing, progress) for plan in PATH_PLANS]
    result = RequestBenchmark(
        dataset=interactions.name,
        num_items=interactions.num_items,
        index=trained.run.read_json("index/index")["implementation"],
        users=len(devices),
        systems=tuple(systems),
        latency=latency,
        waterfalls=waterfalls,
        branches=branches,
        branch_latency=branch_latency,
        others=others,
        paths=tuple(paths),
        provenance=provenance(dataset_fingerprint=interactions.fingerprint),
    )
    write_json(folder / f"request-{interactions.name}.json", result.json())
    waterfall_chart(folder / f"request-{interactions.name}.png", f"One request on {interactions.name}", waterfalls)
    return result


_WATERFALLS = (
    ("The heaviest plan over WiFi", HEAVIEST, True),
    ("The same without the link's time", HEAVIEST, False),
    ("A local plan", LOCAL, False),
)


def _latency(systems: Sequence[System], calls: int) -> dict[str, LatencySummary]:
    return {name: summarise_latency(taken) for name, taken in call_times_ms(systems, calls).items()}


def _path_found(path: DevicePath, calls: int, timing: TimingConfig, progress: Callable[[str, int, int], None]) -> PathFound:
    stage = f"device path, {path.candidates} candidates"
    contestants = [Contestant(name=one.name, call=calls_of(one, 1)) for one in (path.path, path.together)]
    with OtherLoad() as others:
        latency = _latency(path.systems, calls)
        measurement = measure(contestants, [(KERNELS, PATH)], timing, progress=lambda *done: progress(stage, *done))
    return PathFound(path=path, latency=latency, measurement=measurement, others=others)


def _waterfall_json(waterfall: Waterfall) -> dict[str, Any]:
    stages = [{"name": one.name, "where": one.where, "start_ms": one.start_ms, "end_ms": one.end_ms} for one in waterfall.parts]
    return {
        "title": waterfall.title,
        "plan": waterfall.plan,
        "latency_ms": waterfall.latency_ms,
        "parts": stages,
        "threads": usable_cores(),
    }


def _table(first: str, *columns: str) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _request_table(found: RequestBenchmark) -> Table:
    table = _table("request", "p50 ms", "p95 ms", "p99 ms", "threads", "version")
    for one in found.systems:
        taken = found.latency[one.name]
        cells = [f"{value:.2f}" for value in (taken.p50_ms, taken.p95_ms, taken.p99_ms)]
        table.add_row(one.name, *cells, str(usable_cores()), one.version)
    table.add_row("aim", f"{TARGET_P50_MS:.0f}", "", f"{TARGET_P99_MS:.0f}", style="dim")
    table.add_row("paper (its own models and machines)", f"under {PAPER_MS:.0f}", style="dim")
    return table


def _waterfall_table(waterfall: Waterfall) -> Table:
    table = _table("part", "where", "start ms", "end ms", "ms")
    for part in waterfall.parts:
        cells = (part.start_ms, part.end_ms, part.end_ms - part.start_ms)
        table.add_row(part.name, part.where, *(f"{value:.2f}" for value in cells))
    return table


def _path_table(found: PathFound) -> Table:
    table = _table("part", "p50 us", "p95 us", "p99 us", "of the path", "threads", "version")
    whole_ms = found.latency[PATH].p50_ms
    for one in found.path.systems:
        taken = found.latency[one.name]
        share = f"{taken.p50_ms / whole_ms:.0%}"
        table.add_row(one.name, *percentile_cells(taken), share, str(usable_cores()), one.version)
    return table
