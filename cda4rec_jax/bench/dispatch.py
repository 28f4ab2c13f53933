"""``cda4rec bench dispatch``: what a call of compiled code costs from Python, which is the floor under every path of one request.

Every system adds 1 to 16 numbers, so that the call is all there is to time. What differs is how arrays and weights get into it.
"""

import importlib.metadata
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cda4rec_jax.bench.charts import bar_chart
from cda4rec_jax.bench.harness import (
    OtherLoad,
    check_folder,
    measurement_json,
    method_lines,
    not_installed_lines,
    say,
    write_json,
)
from cda4rec_jax.bench.peers import DISPATCH_PEERS, chosen_peers
from cda4rec_jax.bench.systems import System, call_times_ms, first_calls, percentile_cells, systems_json
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.rank_candidates import score_candidates
from cda4rec_jax.kernels.rank_candidates.cases import CONTRACT_CASES, random_inputs, random_weights
from cda4rec_jax.kernels.rank_candidates.native import native_problem
from cda4rec_jax.metrics.system import LatencySummary, summarise_latency
from cda4rec_jax.runs import provenance
from cda4rec_jax.timing import Contestant, Measurement, Spread, TimingConfig, measure, usable_cores

JIT = "jit"  # what all others are compared with: one array in and one out, both where the program runs
ARRAYS = (4, 16, 64)
REPEATS = 20  # calls that the harness sees as one
CALLS, MOST_SECONDS = 3000, 0.5  # single calls whose percentiles are taken, and the most that they may take
REMOTE_REPEATS = 5000  # of another process, which is asked over a pipe
X = np.arange(16, dtype=np.float32)  # small whole numbers, whose parts and sums are exact


@dataclass(frozen=True, kw_only=True)
class DispatchBenchmark:
    """All that was found."""

    systems: tuple[System, ...]
    latency: dict[str, LatencySummary]  # of single calls
    measurement: Measurement
    others: OtherLoad
    async_dispatch: bool
    not_installed: tuple[str, ...]
    provenance: dict[str, Any]

    def microseconds(self, name: str) -> Spread:
        """Of one call."""
        rate = self.measurement.rates[name]
        return Spread(median=1e6 / rate.median, p10=1e6 / rate.p90, p90=1e6 / rate.p10)

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "benchmark": "dispatch",
            "backend": jax.default_backend(),
            "async_dispatch": self.async_dispatch,
            "systems": systems_json(self.systems, self.latency, usable_cores()),
            "measurement": measurement_json(self.measurement, self.others),
            "not_installed": list(self.not_installed),
            "provenance": self.provenance,
        }

    def print(self, console: Console) -> None:
        """A table, and how it was measured."""
        table = Table(title=f"One call from Python, on {jax.default_backend()}", box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("call")
        for column in ("p50 us", "p95 us", "p99 us", f"times {JIT}", "threads", "version"):
            table.add_column(column, justify="right")
        for one in self.systems:
            ratio = "1" if one.name == JIT else f"{self.measurement.ratio(JIT, one.name).median:.2f}"
            table.add_row(one.name, *percentile_cells(self.latency[one.name]), ratio, str(usable_cores()), one.version)
        console.print(table)
        lines = [
            f"every call adds 1 to 16 numbers, the C++ call ranks one candidate; {JIT}: one array in and one out, both where the program "
            "runs; NumPy: in and out; split once: the module's arrays are passed as a list, as RequestFunctions does; constants: they are "
            "part of the program, as ServedPlanner and ServedRanker have them",
            f"jax_cpu_enable_async_dispatch is {'on' if self.async_dispatch else 'off'} but where a row says otherwise, which is timed "
            "in a process of its own",
            first_calls(self.systems),
            *method_lines(self.measurement, usable_cores(), self.others),
            *not_installed_lines(self.not_installed),
        ]
        say(console, lines)


def bench_dispatch(
    *,
    peers: tuple[str, ...] | None = None,
    timing: TimingConfig,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> DispatchBenchmark:
    """Measure, and write JSON and (where matplotlib is installed) a chart into ``out``.

    Args:
        peers: names of ``bench.peers.DISPATCH_PEERS``; None takes all that are installed.
        timing: how much to measure.
        out: folder of the results.
        progress: hears of the stage, and how much of it is done.

    Raises:
        UserError: bad peer or folder; a call with another result.
    """
    chosen, not_installed = chosen_peers(peers, DISPATCH_PEERS)
    folder = check_folder(out)
    with ExitStack() as stack:
        systems = [*_of_arrays(), *_of_modules(), *_of_compilers(), *_of_peers(chosen)]
        contestants = [Contestant(name=one.name, call=partial(_repeated, one)) for one in systems]
        remote = stack.enter_context(OtherProcess()) if jax.default_backend() == "cpu" else None
        if remote is not None:
            contestants.append(remote.contestant)
        with OtherLoad() as others:
            taken = call_times_ms(systems, CALLS, most_seconds=MOST_SECONDS)
            if remote is not None:
                taken[remote.system.name] = np.asarray(remote.call_ms(CALLS))
                systems.insert(1, remote.system)
            pairs = [(JIT, one.name) for one in systems if one.name != JIT]
            measurement = measure(contestants, pairs, timing, progress=lambda *done: progress("calls", *done))
    result = DispatchBenchmark(
        systems=tuple(systems),
        latency={name: summarise_latency(values) for name, values in taken.items()},
        measurement=measurement,
        others=others,
        async_dispatch=_async_dispatch(),
        not_installed=not_installed,
        provenance=provenance(dataset_fingerprint="none: 16 numbers"),
    )
    write_json(folder / "dispatch.json", result.json())
    found = {one.name: result.microseconds(one.name) for one in systems}
    ours = [one.name for one in systems if one.version == _JAX]
    bar_chart(folder / "dispatch.png", "One call from Python", "microseconds per call", found, ours, log=True)
    return result


_JAX = f"jax {jax.__version__}"


def _async_dispatch() -> bool:
    return bool(jax.config.read("jax_cpu_enable_async_dispatch"))


def _repeated(one: System, number: int) -> float:
    run, given = one.run, one.inputs[0]
    for _ in range(REPEATS):
        run(given)
    return float(REPEATS)


def _system(name: str, run: Callable[[Any], Any], given: Any, version: str = _JAX, expected: np.ndarray = X + 1) -> System:
    """After its first call. Raises UserError where that gives something else than ``expected``."""
    start = time.perf_counter()
    found = np.asarray(run(given))
    seconds = time.perf_counter() - start
    if not np.allclose(found, expected, 1e-5, 1e-6):
        raise UserError(f"{name!r} gives {found} instead of {expected}, so its time says nothing. This is a bug to report")
    return System(name=name, version=version, against=(), run=run, inputs=(given,), first_call_seconds=seconds)


def _ready(program: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda given: jax.block_until_ready(program(given))


def _plus_one(x: Any) -> Any:
    return x + 1.0


def _of_arrays() -> list[System]:
    """Arrays in place and arrays of NumPy, one and many, and many that were packed into one."""
    one, many = jax.jit(_plus_one), jax.jit(lambda parts: sum(parts) + 1.0)
    constant, packed = jax.jit(lambda: jnp.asarray(X) + 1.0), jax.jit(lambda rows: rows.sum(axis=0) + 1.0)
    most = ARRAYS[-1]
    parts = {count: [X / count for _ in range(count)] for count in ARRAYS}
    return [
        _system(JIT, _ready(one), jnp.asarray(X)),
        _system("jit, no arguments", lambda _: jax.block_until_ready(constant()), None),
        *(_system(f"jit, {count} arrays", _ready(many), list(map(jnp.asarray, parts[count]))) for count in ARRAYS),
        _system("jit, NumPy", lambda x: np.asarray(one(x)), X),
        *(_system(f"jit, {count} NumPy arrays", lambda given: np.asarray(many(given)), parts[count]) for count in ARRAYS),
        _system(f"jit, {most} NumPy arrays in one", lambda rows: np.asarray(packed(rows)), np.stack(parts[most])),
    ]


class _Module(nnx.Module):
    """As many parameters as the longest list of arrays, that add up to 1."""

    def __init__(self) -> None:
        self.parts = nnx.List([nnx.Param(jnp.full(X.shape, 1.0 / ARRAYS[-1])) for _ in range(ARRAYS[-1])])

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + sum(part[...] for part in self.parts)


def _of_modules() -> list[System]:
    """A module's weights: flattened at every call, split once and passed as a list, and as constants of the program."""
    module, x, words = _Module(), jnp.asarray(X), f"module of {ARRAYS[-1]}"
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    flat = partial(jax.jit(lambda arrays, x: nnx.merge(graph, jax.tree.unflatten(tree, arrays))(x)), leaves)
    return [
        _system(f"nnx.jit, {words}", _ready(partial(nnx.jit(lambda module, x: module(x)), module)), x),
        _system(f"jit, {words}, split once", _ready(flat), x),
        _system(f"jit, {words}, constants", _ready(jax.jit(module)), x),
    ]


def _of_compilers() -> list[System]:
    """Compiled ahead of time, over a donated buffer, and a C++ custom call that has next to nothing to do."""
    x = jnp.asarray(X)
    donated, kept = jax.jit(_plus_one, donate_argnums=0), [jnp.array(X)]

    def donate(_: object) -> jax.Array:
        kept[0] = jax.block_until_ready(donated(kept[0]))
        return kept[0]

    compiled = jax.jit(_plus_one).lower(x).compile()
    found = [_system("compiled ahead of time", _ready(compiled), x), _system("jit, buffer donated", donate, None)]
    if jax.default_backend() == "cpu" and native_problem() is None:
        case = CONTRACT_CASES[0]
        weights, inputs = random_weights(case), random_inputs(case)
        given = (inputs.tokens[0], inputs.vectors, inputs.vector_scales, inputs.features)
        programs = {name: jax.jit(partial(score_candidates, weights, implementation=name)) for name in ("native", "xla")}
        expected = np.asarray(programs["xla"](*given))
        state, *rest = map(jnp.asarray, given)
        run = _ready(lambda state: programs["native"](state, *rest))
        found.append(_system("jit, C++ custom call", run, state, expected=expected))
    return found


def _of_peers(peers: Sequence[str]) -> list[System]:
    runs: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if "onnxruntime" in peers:
        from cda4rec_jax.bench.peers.onnx_dispatch import onnx_call

        runs["onnxruntime"] = onnx_call(X.size, threads=usable_cores())
    if "torch" in peers:
        from cda4rec_jax.bench.peers.torch_dispatch import torch_call

        runs["torch"] = torch_call(threads=usable_cores())
    if "numpy" in peers:
        runs["numpy"] = _plus_one
    return [_system(f"{name}, NumPy", run, X, f"{name} {importlib.metadata.version(name)}") for name, run in runs.items()]


class OtherProcess:
    """A context manager: the plain call under the other setting of ``jax_cpu_enable_async_dispatch``, which holds for a whole process."""

    def __enter__(self) -> "OtherProcess":
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, not _async_dispatch()), daemon=True)
        self._process.start()
        theirs.close()
        name = f"jit, async dispatch {'on' if self._pipe.recv() else 'off'}"
        (first_ms,) = self.call_ms(1)
        self.system = System(
            name=name, version=_JAX, against=(), run=self.call_ms, inputs=(1,), first_call_seconds=first_ms / 1e3
        )
        self.contestant = Contestant(name=name, call=lambda _: self._repeated())
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def call_ms(self, count: int) -> list[float]:
        """Milliseconds of single calls there."""
        self._pipe.send((count, True))
        return self._pipe.recv()

    def _repeated(self) -> float:
        self._pipe.send((REMOTE_REPEATS, False))
        self._pipe.recv()
        return float(REMOTE_REPEATS)


def _serve(pipe: Connection, async_dispatch: bool) -> None:
    jax.config.update("jax_cpu_enable_async_dispatch", async_dispatch)
    run, x, clock = _ready(jax.jit(_plus_one)), jnp.asarray(X), time.perf_counter_ns
    pipe.send(_async_dispatch())
    with suppress(EOFError):
        while True:
            count, each = pipe.recv()
            taken = []
            for _ in range(count):
                start = clock() if each else 0
                run(x)
                if each:
                    taken.append((clock() - start) / 1e6)
            pipe.send(taken)
