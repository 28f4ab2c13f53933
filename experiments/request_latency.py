"""How long one request takes on this machine, and what running its two branches side by side gains.

    python experiments/request_latency.py --run RUN

Takes a finished run of a joint preset and trains nothing. Writes ``results/request-latency-<dataset>.json`` beside this file.

- Warm requests, one at a time, without link delay: planning, release through the gate, wire codec, cloud, ranking on the device. The
  device's state (history, embedding and candidates of an earlier request) is at hand, as it is on a device.
- Both branches made 50 ms on the real clock: the cloud branch waits 25 ms for each direction of the link, the device branch repeats
  structured modelling for 50 ms. Sequential and concurrent execution take turns; a null compares sequential with sequential.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from cda4rec_jax.cli.process import set_up_process
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel, HistoryBatch
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.planner import PLANS, plan_index
from cda4rec_jax.privacy.gate import Gate
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.runs import provenance
from cda4rec_jax.runs.artifacts import load_trained
from cda4rec_jax.runtime import NO_DELAY, DeviceClient, Executor, ExecutorConfig, LinkRealisation, Request
from cda4rec_jax.runtime.functions import DeviceFunctions
from cda4rec_jax.runtime.models import DeviceState, device_functions
from cda4rec_jax.runtime.recommend import Recommender
from cda4rec_jax.runtime.recommend.planning import Situation, choose, prediction_of

RESULTS = Path(__file__).resolve().parent / "results"
PAPER_MS = 100.0  # "under 100 ms per request" (arXiv 2509.01551; its own models, data and machines)
TARGET_P50_MS, TARGET_P99_MS, TARGET_SPEEDUP = 10.0, 25.0, 1.7
NULL_BOUNDS = (0.95, 1.05)
SLATE = 10
BRANCH_MS = 50.0
REQUESTS_PER_ROUND = 4
PATIENT_MS = 600_000.0  # deadline of a request that compiles
# One plan of each family that asks for most: candidates, structured modelling, release.
FAMILIES = {
    "fresh": "fresh-full-500-device",
    "fresh, skip": "fresh-full-500-skip",
    "reuse": "reuse-500-device",
    "local": "local-reuse-device",
    "cloud": "cloud-full-cloud",
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """One user's device, ready to ask."""

    history: HistoryBatch
    state: DeviceState
    executor: Executor


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """Sequential over concurrent time, as the median of the rounds' ratios, and the null of sequential over sequential."""

    rounds: int
    sequential_ms: float
    concurrent_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    null_ratio: float


def main(run: Path, requests: int = 300, rounds: int = 15, users: int = 64, out: Path = RESULTS) -> Table:
    """Measure, store and show.

    Args:
        run: directory that ``cda4rec train`` wrote.
        requests: timed requests for each plan.
        rounds: rounds of sequential against concurrent execution.
        users: users who take turns.
        out: folder of the results.
    """
    set_up_process()
    load_before = os.getloadavg()[0]
    trained = load_trained(run)
    interactions = trained.corpus.interactions
    with Recommender(trained) as recommender, ExitStack() as stack:
        chosen = np.linspace(0, interactions.num_users - 1, min(users, interactions.num_users)).astype(int)
        names = [interactions.user_ids[row] for row in chosen]
        devices = _devices(recommender, names, stack)
        latency = {
            family: summarise_latency(_request_times(recommender, devices, plan_index(name), requests))
            for family, name in FAMILIES.items()
        }
        latency["planner's choice"] = summarise_latency(_request_times(recommender, devices, None, requests))
        latency["recommend(), all of it"] = summarise_latency(_recommend_times(recommender, names, requests))
        speedup = _speedup(recommender, devices, rounds)
    result = {
        "dataset": interactions.name,
        "num_items": interactions.num_items,
        "users": len(names),
        "index": trained.run.read_json("index/index")["implementation"],
        "plans": FAMILIES,
        "latency": {name: dataclasses.asdict(summary) for name, summary in latency.items()},
        "speedup": dataclasses.asdict(speedup),
        "targets": {"p50_ms": TARGET_P50_MS, "p99_ms": TARGET_P99_MS, "ratio": TARGET_SPEEDUP},
        "paper_ms": PAPER_MS,
        "load_average": [load_before, os.getloadavg()[0]],
        "provenance": provenance(dataset_fingerprint=interactions.fingerprint),
    }
    out.mkdir(parents=True, exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(result), indent=2)
    (out / f"request-latency-{interactions.name}.json").write_bytes(text + b"\n")
    return _show(result, latency, speedup)


def _devices(recommender: Recommender, names: Sequence[str], stack: ExitStack) -> list[Device]:
    devices = []
    for name in names:
        history = recommender.history(name)
        state = recommender.state(history, recommender.planner.plan(history, Situation()))
        functions = device_functions(recommender.functions, state, SLATE)
        devices.append(Device(history=history, state=state, executor=_executor(recommender, functions, ExecutorConfig(), stack)))
    return devices


def _executor(recommender: Recommender, functions: DeviceFunctions, config: ExecutorConfig, stack: ExitStack) -> Executor:
    ledger = Ledger()
    stack.callback(ledger.close)
    client = DeviceClient(recommender.service.handle, Gate(EgressLevel.FULL, ledger))
    return stack.enter_context(Executor(functions, client, config))


def _request_times(recommender: Recommender, devices: Sequence[Device], wanted: int | None, count: int) -> np.ndarray:
    """Wall time of planning and execution; every device has run the plan before it is timed."""

    def ask(device: Device) -> None:
        started_s = time.perf_counter()
        served = recommender.planner.decide(device.history, Situation())
        planning_ms = 1e3 * (time.perf_counter() - started_s)
        planned = recommender.planner.explain(device.history, Situation(), served)
        choice = choose(planned, wanted)
        request = Request(
            plan=planned.costs.space.plans[choice.plan_index],
            fallback=planned.costs.space.plans[int(planned.fallback[0, choice.plan_index])],
            link=NO_DELAY,
            planning_ms=planning_ms,
            prediction=prediction_of(planned, choice.plan_index),
            deadline_ms=PATIENT_MS,
        )
        trace = device.executor.execute(request).trace
        if trace.executed_plan != trace.plan:
            raise UserError(
                f"{trace.plan.name} ended as {trace.executed_plan.name} ({', '.join(trace.flags)}); nothing was measured"
            )

    return _timed(ask, devices, count)


def _recommend_times(recommender: Recommender, names: Sequence[str], count: int) -> np.ndarray:
    """Wall time of the whole call: also reading the history, replaying the earlier request, drawing the link, and the report."""
    return _timed(lambda name: recommender.recommend(name, k=SLATE), names, count)


def _timed(ask: Callable[[Any], object], subjects: Sequence[Any], count: int) -> np.ndarray:
    for subject in subjects:
        ask(subject)
    times_ms = np.zeros(count)
    for number in range(count):
        started_s = time.perf_counter()
        ask(subjects[number % len(subjects)])
        times_ms[number] = 1e3 * (time.perf_counter() - started_s)
    return times_ms


def _speedup(recommender: Recommender, devices: Sequence[Device], rounds: int) -> Speedup:
    link = LinkRealisation(transfer_ms=lambda payload_bytes, direction: BRANCH_MS / 2)
    plan = PLANS[plan_index(FAMILIES["fresh"])]
    request = {"plan": plan, "fallback": PLANS[plan_index("local-skip-skip")], "link": link, "deadline_ms": PATIENT_MS}
    times: dict[str, list[float]] = {"sequential": [], "concurrent": [], "again": []}
    with ExitStack() as stack:
        ready = {
            concurrent: [
                _executor(
                    recommender,
                    _slowed(device_functions(recommender.functions, device.state, SLATE)),
                    ExecutorConfig(real_delay=True, concurrent=concurrent),
                    stack,
                )
                for device in devices[:REQUESTS_PER_ROUND]
            ]
            for concurrent in (False, True)
        }
        for number in range(rounds + 1):
            for name in times:
                started_s = time.perf_counter()
                for executor in ready[name == "concurrent"]:
                    executor.execute(Request(**request))
                if number:  # the first round warms up
                    times[name].append(1e3 * (time.perf_counter() - started_s) / REQUESTS_PER_ROUND)
    taken = {name: np.asarray(values) for name, values in times.items()}
    ratios = taken["sequential"] / taken["concurrent"]
    return Speedup(
        rounds=rounds,
        sequential_ms=float(np.median(taken["sequential"])),
        concurrent_ms=float(np.median(taken["concurrent"])),
        ratio=float(np.median(ratios)),
        ratio_p10=float(np.percentile(ratios, 10)),
        ratio_p90=float(np.percentile(ratios, 90)),
        null_ratio=float(np.median(taken["sequential"] / taken["again"])),
    )


def _slowed(functions: DeviceFunctions) -> DeviceFunctions:
    """Structured modelling again and again for 50 ms: a device that computes, not one that sleeps."""

    def structured() -> object:
        end_s = time.perf_counter() + BRANCH_MS / 1e3
        while True:
            state = functions.structured()
            if time.perf_counter() >= end_s:
                return state

    return dataclasses.replace(functions, structured=structured)


def _show(result: dict[str, Any], latency: dict[str, LatencySummary], speedup: Speedup) -> Table:
    title = f"{result['dataset']}: {result['num_items']:,} items, {result['index']} index, no link delay"
    table = Table(title=title, caption=_caption(result, speedup), caption_justify="left")
    table.add_column("one warm request")
    for column in ("p50 ms", "p95 ms", "p99 ms", "requests"):
        table.add_column(column, justify="right")
    for name, summary in latency.items():
        label = f"{name}: {FAMILIES[name]}" if name in FAMILIES else name
        table.add_row(label, f"{summary.p50_ms:.2f}", f"{summary.p95_ms:.2f}", f"{summary.p99_ms:.2f}", str(summary.count))
    table.add_row("aim", f"{TARGET_P50_MS:.0f}", "", f"{TARGET_P99_MS:.0f}", "", style="dim")
    table.add_row("paper (its own models and machines)", f"under {PAPER_MS:.0f}", "", "", "", style="dim")
    return table


def _caption(result: dict[str, Any], speedup: Speedup) -> str:
    valid = NULL_BOUNDS[0] <= speedup.null_ratio <= NULL_BOUNDS[1]
    return (
        f"Both branches {BRANCH_MS:.0f} ms: sequential {speedup.sequential_ms:.1f} ms, concurrent {speedup.concurrent_ms:.1f} ms, "
        f"ratio {speedup.ratio:.2f} (p10-p90 {speedup.ratio_p10:.2f}-{speedup.ratio_p90:.2f}, {speedup.rounds} rounds, "
        f"aim {TARGET_SPEEDUP}); null {speedup.null_ratio:.3f} {'is fine' if valid else 'is off: run again'}. "
        f"Load average {result['load_average'][0]:.1f} before, {result['load_average'][1]:.1f} after."
    )


if __name__ == "__main__":
    try:
        Console().print(tyro.cli(main))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
