"""What every command ``cda4rec bench`` shares: threads, the words about a measurement, and the files of a result.

The method of timing itself is ``cda4rec_jax.timing``, which kernels can import too.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console

from cda4rec_jax.errors import UserError
from cda4rec_jax.timing import Measurement, Spread, usable_cores

MOST_OTHER_CORES = 0.1  # that may be busy without disturbing


def times(spread: Spread) -> str:
    """A ratio with its 10th to 90th percentile."""
    return f"{spread.median:.2f} [{spread.p10:.2f}, {spread.p90:.2f}]"


def megabytes(num_bytes: int) -> str:
    """Of 2^20 bytes."""
    return f"{num_bytes / 2**20:,.1f}"


def in_full(dtype: str) -> AbstractContextManager[Any]:
    """Products of float32 in float32, by all alike: accelerators would round the operands of those that do not say otherwise."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory that a compiled program needs besides inputs and outputs, by XLA's own plan. Raises UserError where the backend has none."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise UserError(f"JAX on {jax.default_backend()} does not tell the memory of its programs: measure on another backend")
    return analysis.temp_size_in_bytes


class OtherLoad:
    """A context manager: ``cores`` that all other processes of the machine kept busy inside of it; None where Linux does not tell.

    A null does not see them all: XLA hands work to whatever core is free, while OpenMP (torch) waits for the slowest, up to tenfold.
    """

    cores: float | None = None

    def __enter__(self) -> "OtherLoad":
        self._start = _busy_seconds()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        end = _busy_seconds()
        if self._start is not None and end is not None:
            wall, machine, own = (after - before for before, after in zip(self._start, end, strict=True))
            self.cores = max(0.0, machine - own) / wall

    @property
    def disturbs(self) -> bool:
        """True where others took more than the cores that are not ours."""
        return self.cores is not None and self.cores > MOST_OTHER_CORES + (os.cpu_count() or 1) - usable_cores()


def _busy_seconds() -> tuple[float, float, float] | None:
    """Seconds on the clock, seconds of all cores (stolen ones too), and of this process."""
    file = Path("/proc/stat")
    if not file.is_file():
        return None
    user, nice, system, _, _, *rest = map(int, file.read_text(encoding="ascii").splitlines()[0].split()[1:9])
    times = os.times()
    return time.monotonic(), (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK"), times.user + times.system


def method_lines(measurement: Measurement, threads: int, others: OtherLoad) -> list[str]:
    """How it was measured, and whether to believe it."""
    low, high = measurement.null_bounds
    nulls = ", ".join(f"{name} {null:.3f}" for name, null in measurement.nulls.items())
    lines = [
        f"{measurement.rounds} rounds in turns in one process, {threads} threads for each system; ratios are medians of the rounds' "
        "ratios with their 10th to 90th percentile",
        f"null (a system against itself; within {low}-{high}): {nulls}",
    ]
    if not measurement.accepted:
        lines.append(
            f"NOT QUIET: after {measurement.attempts} attempts a null is still outside of its bounds; read the ratios loosely, and repeat "
            "this on a quiet machine"
        )
    elif measurement.attempts > 1:
        lines.append(f"the first {measurement.attempts - 1} attempts were rejected: a null was outside of its bounds")
    if others.disturbs:
        lines.append(
            f"NOT QUIET: other processes kept {others.cores:.1f} cores busy; torch suffers from that several times as much as JAX, so its "
            "figures are worth nothing: repeat this on a quiet machine"
        )
    cold = [name for name, warm in measurement.warm.items() if not warm]
    if cold:
        lines.append(f"not steady after warming up: {', '.join(cold)}")
    return lines


def is_quiet(measurement: Measurement, others: OtherLoad) -> bool:
    """Whether to believe a measurement: every null within its bounds, and no other process in the way."""
    return measurement.accepted and not others.disturbs


def measurement_json(measurement: Measurement, others: OtherLoad) -> dict[str, Any]:
    """Everything of a measurement, ready for JSON."""
    quiet = is_quiet(measurement, others)
    return {**asdict(measurement), "accepted": measurement.accepted, "other_cores": others.cores, "quiet": quiet}


def not_installed_lines(peers: Sequence[str]) -> list[str]:
    """Who was left out, and what brings them; no line where nobody was."""
    return [f"not installed: {', '.join(peers)} (pip install 'cda4rec_jax[bench]')"] if peers else []


def say(console: Console, lines: Sequence[str]) -> None:
    """Print lines as they are."""
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def check_folder(out: Path) -> Path:
    """A folder that can be written to, before hours are spent. Raises UserError."""
    out = out.expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; name another --out") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write to {out}: permission denied; name another --out")
    return out


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Written whole or not at all."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    staged.replace(path)
