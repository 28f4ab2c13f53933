"""What all benchmarks share."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cda4rec_jax.bench import harness
from cda4rec_jax.bench.harness import OtherLoad, check_folder, method_lines
from cda4rec_jax.bench.systems import measure_calls
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig


def make_measurement(null: float, attempts: int = 1) -> Measurement:
    return Measurement(
        rounds=15,
        attempts=attempts,
        rates={},
        warm={"a": True, "b": False},
        comparisons=(),
        nulls={"a": null},
        null_bounds=(0.95, 1.05),
    )


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="Linux tells")
def test_the_load_of_other_processes_is_seen() -> None:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with OtherLoad() as load:
            time.sleep(0.6)
    finally:
        other.kill()
        other.wait()
    assert load.cores is not None and load.cores > 0.2


def test_own_time_does_not_count_and_cores_that_are_not_ours_may_be_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = iter([(10.0, 100.0, 5.0), (20.0, 118.0, 13.0)])
    monkeypatch.setattr(harness, "_busy_seconds", lambda: next(snapshots))
    monkeypatch.setattr(harness, "usable_cores", lambda: 2)
    monkeypatch.setattr(harness.os, "cpu_count", lambda: 2)
    with OtherLoad() as load:
        pass
    assert load.cores == 1.0 and load.disturbs
    monkeypatch.setattr(harness.os, "cpu_count", lambda: 4)
    assert not load.disturbs, "two cores are left to others"


def test_what_cannot_be_believed_is_said() -> None:
    quiet = OtherLoad()
    told = "\n".join(method_lines(make_measurement(1.01), 2, quiet))
    assert "NOT QUIET" not in told and "a 1.010" in told and "not steady after warming up: b" in told
    assert "first 1 attempts were rejected" in "\n".join(method_lines(make_measurement(1.01, attempts=2), 2, quiet))
    assert "NOT QUIET: after 3 attempts" in "\n".join(method_lines(make_measurement(1.2, attempts=3), 2, quiet))
    busy = OtherLoad()
    busy.cores = 1e6
    assert "NOT QUIET: other processes" in "\n".join(method_lines(make_measurement(1.01), 2, busy))


def test_times_of_single_calls_are_those_of_the_rounds_that_count() -> None:
    """Slow calls while warming up, and an attempt that no null can pass, leave no trace."""
    seen = []

    def call(number: int) -> float:
        seen.append(number)
        time.sleep(0.05 if len(seen) <= 3 else 0.0)
        return 1.0

    config = TimingConfig(rounds=4, block_seconds=1e-9, warm_up_turns=2, attempts=3, null_bounds=(2.0, 1.0))
    measurement, latency = measure_calls([Contestant(name="a", call=call)], [("a", "a")], config)
    assert measurement.attempts == 3 and len(seen) > 2 * latency["a"].count
    assert latency["a"].count == 4 * 2 * 2, "four rounds of the pair and of the null, two turns each"
    assert latency["a"].max_ms < 50.0


def test_a_folder_is_made_before_anything_is_measured(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "a" / "b").is_dir()
